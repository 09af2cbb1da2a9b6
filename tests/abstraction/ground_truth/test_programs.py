"""Every program of the registry: right by an independent solution, decodable, with edges that
interventions confirm.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from abstraction.ground_truth.compiled import Compiled, compile
from abstraction.ground_truth.controls import randomised, relabelled, with_random_table
from abstraction.ground_truth.effects import (
    BOUND,
    accuracy,
    circuit_of,
    effects,
    mask_of,
    true_edges,
)
from abstraction.ground_truth.options import Options
from abstraction.ground_truth.programs import PROGRAMS
from abstraction.ground_truth.steps import Lookup
from circuits.ablation import AblationConfig, fit_ablation
from circuits.engine import Engine
from circuits.metrics import metric_named
from circuits.objective import prepare
from circuits.prompts import prompts_from_records
from tests import tiny

OPTIONS = {
    "plain": Options(),
    "disguised": Options(rotate=True, distractor_heads=1, distractor_neurons=12),
    "normalised": Options(rotate=True, distractor_heads=1, distractor_neurons=8, norm="rms"),
}
ROUNDING = 1e-4  # of float32: what a variable may be off
REDUNDANT = {
    "modular_addition": "first",
    "induction": "previous",
    "recall": "previous",
    "two_hop": "middle",
    "same_ends": "first",
    "sensors": "cause",
    "select": "side",
}
# How many of a program's edges have an effect under zero, mean, and each of the others
# (positional_mean, counterfactual, resample): position embeddings are the same in every prompt of a
# length, so that the others cannot touch what is read from them; nor can means touch a token that
# is always there (`^` in sort).
TRUE = {
    "modular_addition": (7, 6, 5),
    "induction": (8, 8, 5),
    "recall": (7, 7, 5),
    "two_hop": (11, 11, 8),
    "same_ends": (5, 4, 4),
    "brackets": (7, 7, 7),
    "sort": (8, 7, 6),
    "greater_than": (8, 7, 6),
    "sensors": (11, 10, 8),
    "select": (10, 9, 7),
    "majority": (3, 3, 3),
}


def yes(truth: bool) -> list[str]:
    return ["yes" if truth else "no"]


def balanced(word: list[str]) -> bool:
    while "()" in (text := "".join(word)):
        word = list(text.replace("()", ""))
    return not word


# Independent of the programs: from token names to the names of the answers.
SOLUTIONS = {
    "modular_addition": lambda t: [str((int(t[0]) + int(t[1])) % 7)],
    "induction": lambda t: [t[max(i for i in range(len(t) - 1) if t[i] == t[-1]) + 1]],
    "recall": lambda t: [t[t.index(t[-1]) + 1]],
    "two_hop": lambda t: [t[t.index(t[t.index(t[-1]) + 1], 5) + 1]],
    "same_ends": lambda t: yes(t[0] == t[-1]),
    "brackets": lambda t: yes(balanced(t[1:-1])),
    "sort": lambda t: sorted(t[1:]),
    "greater_than": lambda t: yes(int(t[1]) > int(t[0])),
    "sensors": lambda t: yes(t[0] == "event" or t[1:3] == ["noise", "noise"]),
    "select": lambda t: [t[1] if t[0] == "L" else t[2]],
    "majority": lambda t: yes(t.count("1") > t.count("0")),
}


@cache
def compiled(name: str, how: str) -> Compiled:
    return compile(PROGRAMS[name](), OPTIONS[how])


@pytest.fixture(params=list(PROGRAMS))
def name(request) -> str:
    return request.param


@pytest.fixture(params=list(OPTIONS))
def made(request, name) -> Compiled:
    return compiled(name, request.param)


# All programs as they are, two in every disguise; the others in disguise take long.
EVERY_CASE = [
    pytest.param(
        (name, how),
        id=f"{how}-{name}",
        marks=() if how == "plain" or name in ("recall", "sort") else pytest.mark.slow,
    )
    for how in OPTIONS
    for name in PROGRAMS
]


def objectives(made: Compiled, engine: Engine):
    prompts, reference = (
        prompts_from_records(made.records(count, seed)) for seed, count in ((0, 64), (1, 256))
    )
    for name in tiny.UNTRAINED:
        if made.options.norm == "rms" and name not in (
            "mean",
            "counterfactual",
        ):  # zero is refused; two are enough
            continue
        ablation = fit_ablation(AblationConfig(name), engine, reference)
        yield (
            name,
            prepare(engine, prompts, metric_named("kl"), ablation),
            true_edges(made, engine, prompts, ablation),
        )


def test_there_is_a_solution_and_a_count_for_each():
    assert set(SOLUTIONS) == set(TRUE) == set(PROGRAMS) and len(PROGRAMS) >= 8


def test_always_right_and_decodable(made):
    program, engine = made.program, Engine(made.model)
    tokens = program.sample(300, torch.Generator().manual_seed(2))
    clean, meaning, places = (
        engine.clean(tiny.from_tokens(tokens)),
        made.meaning(tokens),
        list(program.scored_positions),
    )
    answers = [
        [program.tokens[i] for i in row] for row in clean.logits.argmax(-1)[:, places].tolist()
    ]
    names = [[program.tokens[i] for i in row] for row in tokens.tolist()]
    assert answers == [SOLUTIONS[program.name](row) for row in names]
    assert len({tuple(row) for row in answers}) > 1
    torch.testing.assert_close(clean.logits, made.model.bridge(tokens), atol=1e-3, rtol=0)
    for variable, size in program.sizes.items():
        exact = meaning[variable][..., None]
        exact = exact if size is None else torch.nn.functional.one_hot(exact[..., 0], size)
        ours = made.coordinates(engine.graph, clean.writers, variable)
        torch.testing.assert_close(ours.double(), exact.double(), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("case", EVERY_CASE)
def test_every_true_edge_shows_and_they_alone_suffice(case):
    """Under every ablation: the right number of edges, each needed, and no other one."""
    made = compiled(*case)
    engine = Engine(made.model)
    counts = TRUE[made.program.name]
    for name, objective, found in objectives(made, engine):
        true = [effect for effect in found if effect.true]
        assert len(true) == {"zero": counts[0], "mean": counts[1]}.get(name, counts[2]), name
        kept = circuit_of(engine.graph, found)
        assert accuracy(objective, kept).eq(1).all(), name
        assert min(effects(objective, [effect.edges for effect in true], kept)) > 3 * BOUND, name
        assert min(effect.effect for effect in true) > 3 * BOUND, name
        others = (engine.graph.exists & ~kept).nonzero().tolist()
        assert (
            max(effects(objective, [(engine.graph.edge_name(*edge),) for edge in others]))
            < BOUND / 100
        ), name


def test_interchange_of_any_variable_does_what_the_causal_model_says(name):
    """Each variable, alone, swapped in its subspace at its positions by hooks of the bridge."""
    made = compiled(name, "disguised")
    program, engine, bridge = made.program, Engine(made.model), made.model.bridge
    base, source = (program.sample(48, torch.Generator().manual_seed(seed)) for seed in (3, 4))
    places = list(program.scored_positions)
    plain = made.meaning(base)["answer"][:, places]
    for variable in (step.name for step in program.steps):
        aligned = made.alignment[variable]
        wanted = made.coordinates(
            engine.graph, engine.clean(tiny.from_tokens(source)).writers, variable
        )
        fired = []

        def swap(value, hook, aligned=aligned, wanted=wanted, fired=fired):
            fired.append(hook.name)
            at = list(aligned.positions)
            value = value.clone()
            value[:, at] += (wanted[:, at] - value[:, at] @ aligned.basis.T) @ aligned.basis
            return value

        (node,) = aligned.nodes
        kind, layer = (
            ("attn" if node[0] == "a" else "mlp"),
            int(node[1 : node.find(".")] if "." in node else node[1:]),
        )
        logits = bridge.run_with_hooks(base, fwd_hooks=[(f"blocks.{layer}.{kind}.hook_out", swap)])
        expected = program.causal_model.interchange({"token": base}, {variable: {"token": source}})[
            "answer"
        ][:, places]
        assert len(fired) == 1
        assert torch.equal(logits.argmax(-1)[:, places], expected), variable
        assert not torch.equal(expected, plain), (
            f"swapping {variable} changes no answer: the test shows nothing"
        )


def test_redundant_heads_compute_the_same(name):
    if name not in REDUNDANT:
        with pytest.raises(ValueError, match="redundant="):
            compile(PROGRAMS[name](), Options(redundant=PROGRAMS[name]().steps[0].name))
        return
    made = compile(PROGRAMS[name](), Options(redundant=REDUNDANT[name], rotate=True))
    engine, tokens = Engine(made.model), made.program.sample(100, torch.Generator().manual_seed(5))
    assert torch.equal(
        engine.logits(tiny.from_tokens(tokens)).argmax(-1)[:, -1],
        made.meaning(tokens)["answer"][:, -1],
    )
    nodes = made.alignment[REDUNDANT[name]].nodes
    assert len(nodes) == 2
    writers = engine.clean(tiny.from_tokens(tokens)).writers[
        [engine.graph.writer_index[node] for node in nodes]
    ]
    torch.testing.assert_close(writers[0], writers[1], atol=1e-5, rtol=0)


# ---- controls ------------------------------------------------------------------------------------


def test_relabelled_programs_have_the_same_circuit_and_other_answers(name):
    program = PROGRAMS[name]()
    other = compile(relabelled(program, seed=1))
    assert sorted(other.edges()) == sorted(compiled(name, "plain").edges())
    tokens = program.sample(100, torch.Generator().manual_seed(6))
    places, given = (
        list(program.scored_positions),
        dict(zip(program.answers, other.program.answers, strict=True)),
    )
    logits = Engine(other.model).logits(tiny.from_tokens(tokens)).argmax(-1)[:, places].tolist()
    names = [[program.tokens[i] for i in row] for row in tokens.tolist()]
    solved = [[given[answer] for answer in SOLUTIONS[name](row)] for row in names]
    assert [[program.tokens[i] for i in row] for row in logits] == solved
    assert solved != [SOLUTIONS[name](row) for row in names]


def test_random_tables_have_the_same_circuit_and_other_answers():
    program = PROGRAMS["modular_addition"]()
    other = compile(with_random_table(program, "sum", seed=1))
    assert other.edges() == compiled("modular_addition", "plain").edges()
    tokens = program.sample(200, torch.Generator().manual_seed(6))
    ours = Engine(other.model).logits(tiny.from_tokens(tokens)).argmax(-1)[:, -1]
    step = other.program.by_name["sum"]
    assert isinstance(step, Lookup) and isinstance(step.table, dict)
    assert ours.tolist() == [step.table[a, b] for a, b, _ in tokens.tolist()]
    assert (
        ours == compiled("modular_addition", "plain").meaning(tokens)["answer"][:, -1]
    ).float().mean() < 0.5
    with pytest.raises(
        ValueError, match="step='first' is no lookup of 'modular_addition'; its lookups are sum"
    ):
        with_random_table(program, "first", seed=1)


def test_random_weights_have_the_same_shapes_and_know_nothing(name):
    made = compiled(name, "disguised")
    control = randomised(made, seed=3)
    shapes = {key: value.shape for key, value in made.model.bridge.state_dict().items()}
    assert {key: value.shape for key, value in control.bridge.state_dict().items()} == shapes
    assert control.weight_hash != made.model.weight_hash
    assert control.weight_hash != randomised(made, seed=4).weight_hash
    tokens = made.program.sample(200, torch.Generator().manual_seed(7))
    right = (
        Engine(control).logits(tiny.from_tokens(tokens)).argmax(-1)
        == made.meaning(tokens)["answer"]
    )
    assert right[:, list(made.program.scored_positions)].float().mean() < 0.75


def test_mask_names_edges_of_the_graph_only():
    graph = Engine(compiled("recall", "plain").model).graph
    assert int(mask_of(graph, compiled("recall", "plain").edges()).sum()) == 8
    with pytest.raises(ValueError, match="is not in this graph"):
        mask_of(graph, ["a7.h0->logits"])
