"""Trained ground truth: the shipped models have their program's circuit, and loss by loss it is why
they have it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache

import pytest
import torch

from abstraction.ground_truth.compiled import compile
from abstraction.ground_truth.effects import BOUND, effects, mask_of, true_edges
from abstraction.ground_truth.options import Options
from abstraction.ground_truth.trained import (
    FOLDER,
    GATES,
    TRUTHS,
    Trained,
    TrainedTruth,
    edge_effects,
    load_trained,
    measure,
    objectives,
    wanted,
    without,
)
from abstraction.ground_truth.training import run, train
from circuits.ablation import AblationConfig, fit_ablation
from circuits.engine import Engine
from circuits.model.load import local_path
from circuits.prompts import prompts_from_records
from circuits.training import GateMissed, check_gates

KILOBYTES = 200
NEGLIGIBLE = 0.02  # nats: what all edges outside the circuit may do together


@cache
def shipped(name: str) -> Trained:
    return load_trained(name)


@pytest.fixture(params=TRUTHS)
def trained(request) -> Trained:
    return shipped(request.param)


# ---- the shipped models --------------------------------------------------------------------------


def test_shipped_files_pass_every_gate(trained):
    found = measure(trained, prompts=256, seed=77)  # other inputs than those they were measured on
    assert set(found) == set(GATES)
    check_gates(found, GATES, trained.config.steps)
    check_gates(trained.gates, GATES, trained.config.steps)  # and on those


def test_what_lies_outside_the_circuit_does_next_to_nothing(trained):
    for name, objective in objectives(trained, prompts=256, seed=5).items():
        alone = objective.measure(
            mask_of(objective.engine.graph, trained.edges)
        )  # minus KL(model || circuit)
        assert -alone.mean() < NEGLIGIBLE, name


def test_every_edge_of_the_circuit_has_an_effect_and_none_of_it_can_be_left_out(trained):
    found = edge_effects(trained, objectives(trained, prompts=256, seed=5))
    assert list(found) == list(trained.edges)
    assert min(found.values()) > GATES["effect"]


def test_the_circuit_is_that_of_the_compiled_program(trained):
    """Of what the program reads, just those edges are true that have an effect where it is
    compiled.
    """
    compiled = compile(
        trained.program, Options(n_heads=trained.config.heads, n_layers=trained.config.layers)
    )
    engine, true = Engine(compiled.model), set()
    prompts, reference = (prompts_from_records(compiled.records(128, seed)) for seed in (1, 2))
    for name in ("resample", "zero"):
        ablation = fit_ablation(AblationConfig(name), engine, reference)
        found = true_edges(compiled, engine, prompts, ablation, bound=BOUND)
        true |= {edge for effect in found if effect.true for edge in effect.edges}
    assert true == set(trained.edges)


def test_the_folder_says_what_the_code_says(trained):
    folder = local_path(f"{FOLDER}/{trained.config.program}")
    told = json.loads((folder / "config.json").read_text())
    assert TRUTHS[trained.config.program] == trained.config
    assert told["config"] == json.loads(json.dumps(asdict(trained.config)))
    assert told["nodes"] == trained.nodes and told["edges"] == list(trained.edges)
    assert (folder / "model.safetensors").stat().st_size <= KILOBYTES * 1000
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n") and all(
        f"| {edge} |" in card for edge in trained.edges
    )
    assert all(f"{value:.4f}" in card for value in told["gates"].values())


def test_records_have_other_answers_in_the_corrupt_twin(trained):
    prompts = prompts_from_records(trained.records(64, 3))
    assert prompts.corrupt is not None
    answered = trained.program.answered
    assert (answered(prompts.clean) != answered(prompts.corrupt)).all()
    assert trained.records(64, 3) == trained.records(64, 3) != trained.records(64, 4)


def test_edges_through_which_the_program_reads_the_position_alone():
    fixed = wanted(TRUTHS["recall"]).fixed_edges
    assert fixed == ("input->a0.h0<k>", "input->a0.h0<q>")
    assert wanted(TRUTHS["modular_addition"]).fixed_edges == ("input->a0.h0<k>", "input->a0.h1<k>")
    tested = objectives(shipped("recall"), prompts=64, seed=5)["resample"]
    assert max(map(abs, effects(tested, [(edge,) for edge in fixed]))) < NEGLIGIBLE


# ---- training ------------------------------------------------------------------------------------

TINY = TrainedTruth(
    "same_ends", layers=1, heads=2, d_model=8, d_mlp=8, steps=3, batch=8, gate_prompts=16
)


def test_one_seed_gives_one_model_and_leaves_the_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = train(TINY, gates=False), train(TINY, gates=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.model.weight_hash == second.model.weight_hash
    assert first.model.weight_hash != train(replace(TINY, seed=1), gates=False).model.weight_hash
    assert not any(parameter.requires_grad for parameter in first.model.bridge.parameters())


def test_a_missed_gate_saves_nothing_and_is_named(tmp_path):
    with pytest.raises(
        GateMissed,
        match=r"accuracy=.* is below 0.99.* after steps=3; raise steps or try another seed",
    ):
        run(TINY, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_run_saves_what_load_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "abstraction.ground_truth.training.GATES", dict.fromkeys(GATES, float("-inf"))
    )
    out = str(tmp_path / "out")
    made, again = run(TINY, out), load_trained(out)
    assert again.config == TINY and again.model.weight_hash == made.model.weight_hash
    assert again.nodes == made.nodes and again.edges == made.edges
    assert again.gates == {name: round(value, 4) for name, value in made.gates.items()}
    with pytest.raises(
        FileExistsError, match="is not empty; choose another folder or set overwrite=true"
    ):
        run(TINY, out)
    run(TINY, out, overwrite=True)


def test_without_removes_just_what_a_node_writes():
    graph = Engine(shipped("recall").model).graph
    removed = graph.exists & ~without(graph, "a0.h1")
    assert {graph.edge_name(*edge).split("->")[0] for edge in removed.nonzero().tolist()} == {
        "a0.h1"
    }
    assert int(removed.sum()) == int(graph.exists[:, graph.writer_index["a0.h1"]].sum())


@pytest.mark.slow
def test_only_the_loss_on_edges_closes_shortcuts():
    """Without it a model can satisfy behaviour, interchange and strict, and fail once only the
    circuit is kept.
    """
    config = replace(TRUTHS["greater_than"], steps=1000)
    found, full = (
        train(replace(config, edges=0.0), gates=False).gates,
        shipped("greater_than").gates,
    )
    assert min(found["accuracy"], found["strict"]) >= 0.99 and found["interchange"] >= 0.95
    assert found["keep_resample"] < 0.9 < GATES["keep_resample"] <= full["keep_resample"]


# ---- refusals ------------------------------------------------------------------------------------


def test_refusals():
    with pytest.raises(
        ValueError,
        match=r"no trained truth 'nothing'; name a folder with config.json, or one of recal",
    ):
        load_trained("nothing")
    with pytest.raises(
        ValueError, match="program='nothing' is unknown; the programs are modular_addition, "
    ):
        wanted(TrainedTruth("nothing"))
    with pytest.raises(ValueError, match="layers=1, but program 'recall' needs 2; raise layers"):
        wanted(TrainedTruth("recall", layers=1))
    with pytest.raises(
        ValueError,
        match=r"unused edge 'm0->logits' is none of 'recall'; those are input->a0.h0<q>|in",
    ):
        wanted(TrainedTruth("recall", unused=("m0->logits",)))
    with pytest.raises(
        ValueError, match="d_model=9 is not a multiple of heads=2; change one of them"
    ):
        train(replace(TINY, d_model=9))
    with pytest.raises(
        ValueError, match="behaviour=0, edges=0, but training starts with these losses"
    ):
        train(replace(TINY, behaviour=0.0, edges=0.0))


def test_a_sampler_without_other_answers_is_refused():
    program = shipped("recall").program
    constant = replace(
        program,
        sample=lambda count, generator: torch.zeros(count, program.length, dtype=torch.int64),
    )
    with pytest.raises(
        ValueError, match="no input of recall with another answer in 100 draws; check its sampler"
    ):
        constant.records(4, 0)
