"""The compiler: random programs decode exactly; sizes, rotation, norm, distractors, redundancy,
records, refusals.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abstraction.ground_truth.compiled import Compiled, compile
from abstraction.ground_truth.effects import accuracy, circuit_of, effects, mask_of, true_edges
from abstraction.ground_truth.options import Options
from abstraction.ground_truth.program import Program
from abstraction.ground_truth.programs import (
    PROGRAMS,
    brackets,
    induction,
    modular_addition,
    recall,
    sort,
)
from abstraction.ground_truth.steps import Attend, Combine, Lookup, Switch, Threshold, at, back
from circuits.ablation import AblationConfig, fit_ablation
from circuits.engine import Engine
from circuits.metrics import metric_named
from circuits.objective import prepare
from circuits.prompts import prompts_from_records
from tests import tiny

EXACT = 1e-6  # what attention may leak
ROUNDING = 2e-5  # of float32, once the residual stream is rotated
ALL = Options(rotate=True, distractor_heads=2, distractor_neurons=9, norm="rms")


def tokens_for(program: Program, count: int = 64, length: int | None = None) -> torch.Tensor:
    """Any tokens, valid input or not."""
    shape = count, length or program.length
    return torch.randint(len(program.tokens), shape, generator=torch.Generator().manual_seed(1))


def worst(compiled: Compiled, engine: Engine, tokens: torch.Tensor) -> float:
    """How far any variable is, anywhere, from what the causal model says."""
    writers, meaning = engine.clean(tiny.from_tokens(tokens)).writers, compiled.meaning(tokens)
    errors = []
    for name, size in compiled.program.sizes.items():
        value = meaning[name]
        exact = value[..., None] if size is None else torch.nn.functional.one_hot(value, size)
        errors.append(
            (compiled.coordinates(engine.graph, writers, name) - exact).abs().max().item()
        )
    return max(errors)


def objectives(
    compiled: Compiled, names: tuple[str, ...] = tiny.UNTRAINED, engine: Engine | None = None
):
    engine = engine or Engine(compiled.model)
    prompts, reference = (
        prompts_from_records(compiled.records(count, seed)) for seed, count in ((0, 64), (1, 128))
    )
    for name in names:
        ablation = fit_ablation(AblationConfig(name), engine, reference)
        objective = prepare(engine, prompts, metric_named("kl"), ablation)
        yield name, objective, true_edges(compiled, engine, prompts, ablation)


# ---- what is compiled is what the program means --------------------------------------------------


def random_program(draw: random.Random) -> Program:
    """Steps of every kind over random variables, tables, matches, cuts."""
    length, tokens = draw.randint(2, 7), ("a", "b", "c", "d")
    sizes: dict[str, int | None] = {"token": len(tokens), "position": length}
    steps = []

    def pick(categorical: bool = True, size: int | None = None) -> str | None:
        able = [n for n, s in sizes.items() if (s is not None) == categorical and size in (None, s)]
        return draw.choice(able) if able else None

    for number in range(draw.randint(2, 7)):
        name, kind = (
            f"v{number}",
            draw.choice(["fetch", "mean", "lookup", "threshold", "combine", "switch"]),
        )
        category = pick()
        assert category is not None
        key = pick() if draw.random() < 0.8 else None
        query = pick() if key is not None and draw.random() < 0.6 else None
        table = {(q, k): draw.random() < 0.4 for q in range(8) for k in range(8)}
        match = (lambda q, k, t=table: t[q, k]) if query else (lambda k, t=table: t[0, k])
        number_of = pick(categorical=False)
        trigger = pick(size=2)
        if kind == "fetch":
            steps.append(
                Attend(name, category, key, query, match, ties=draw.choice(["first", "last"]))
            )
            sizes[name] = sizes[category]
        elif kind == "mean" or (kind in ("threshold", "combine") and number_of is None):
            numbers = tuple(draw.uniform(-1, 1) for _ in range(sizes[category] or 0))
            steps.append(Attend(name, category, key, query, match, ties="mean", numbers=numbers))
            sizes[name] = None
        elif kind == "threshold":
            steps.append(Threshold(name, number_of or "", (-0.4, 0.3), gap=1e-3))
            sizes[name] = 3
        elif kind == "combine":
            steps.append(
                Combine(
                    name,
                    (number_of or "",) * 2,
                    (draw.uniform(-1, 1), 0.5),
                    bias=draw.uniform(-1, 1),
                )
            )
            sizes[name] = None
        elif kind == "switch" and trigger is not None:
            steps.append(Switch(name, trigger, category, pick(size=sizes[category]) or category))
            sizes[name] = sizes[category]
        else:
            inputs = tuple(pick() or "token" for _ in range(draw.randint(1, 3)))
            salt = draw.randint(0, 99)
            steps.append(Lookup(name, inputs, lambda *x, salt=salt: hash((salt, *x)) % 2, size=2))
            sizes[name] = 2
    steps.append(Lookup("last", (pick() or "token",), lambda x: x % 2, size=2))
    return Program(
        "random",
        tokens,
        length,
        tuple(steps),
        "last",
        ("a", "b"),
        sample=lambda count, _: torch.zeros(count, length).long(),
        causal=draw.random() < 0.7,
    )


def within_gaps(program: Program, tokens: torch.Tensor) -> torch.Tensor:
    """Which inputs keep every threshold's promise that no cut is met."""
    values, fine = (
        program.causal_model.run({"token": tokens}),
        torch.ones(len(tokens), dtype=torch.bool),
    )
    for step in program.steps:
        if isinstance(step, Threshold):
            distance = (values[step.input][..., None] - torch.tensor(step.cuts)).abs().amin(-1)
            fine &= (distance > step.gap).all(1)
    return fine


@settings(max_examples=15)
@given(
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.sampled_from(["none", "rms"]),
    st.sampled_from([0, 1]),
)
def test_random_programs_compute_what_they_mean(seed, rotate, norm, distractors):
    """In float64, so that the cuts' small gap shows no rounding; TransformerLens's RMS norm rounds
    to float32.
    """
    program = random_program(random.Random(seed))
    options = Options(
        rotate=rotate,
        norm=norm,
        distractor_heads=distractors,
        distractor_neurons=3 * distractors,
        seed=seed % 1000,
        dtype=torch.float64,
    )
    compiled = compile(program, options)
    engine, tokens = Engine(compiled.model), tokens_for(program, 32)
    tokens = tokens[within_gaps(program, tokens)]
    if not len(tokens):
        return
    assert worst(compiled, engine, tokens) < (EXACT if norm == "none" else 2e-3)
    torch.testing.assert_close(
        engine.logits(tiny.from_tokens(tokens)), compiled.model.bridge(tokens), atol=1e-3, rtol=0
    )
    assert torch.equal(
        engine.logits(tiny.from_tokens(tokens)).argmax(-1), compiled.meaning(tokens)["answer"]
    )


def test_attention_leaks_less_than_stated():
    """Over a long input, where the wrong positions are many."""
    program = induction(length=64)
    compiled = compile(program, Options(dtype=torch.float64))
    assert 0 < worst(compiled, Engine(compiled.model), tokens_for(program)) < EXACT


def test_shorter_inputs_mean_the_same():
    for name in ("induction", "brackets", "same_ends"):
        compiled = compile(PROGRAMS[name]())
        for length in range(1, compiled.program.length):
            tokens = tokens_for(compiled.program, length=length)
            assert worst(compiled, Engine(compiled.model), tokens) < ROUNDING


# ---- options -------------------------------------------------------------------------------------


def test_rotation_turns_every_basis_and_changes_no_logit():
    plain, turned = (
        compile(modular_addition(), Options(rotate=rotate)) for rotate in (False, True)
    )
    tokens = tokens_for(plain.program)
    torch.testing.assert_close(
        plain.model.bridge(tokens), turned.model.bridge(tokens), atol=ROUNDING, rtol=0
    )
    rows = torch.cat([aligned.basis for aligned in turned.alignment.values()])
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-6, rtol=0)
    assert rows.abs().max() < 0.9, "some variable still lies along an axis"
    other = compile(modular_addition(), Options(rotate=True, seed=1))
    assert not torch.allclose(rows[0], other.alignment["token"].basis[0], atol=0.1)


def test_rms_norm_changes_no_logit_and_is_there():
    plain, normed = (
        compile(brackets(), Options(norm=norm, rotate=True)) for norm in ("none", "rms")
    )
    tokens = tokens_for(plain.program)
    torch.testing.assert_close(
        plain.model.bridge(tokens), normed.model.bridge(tokens), atol=1e-3, rtol=0
    )
    norm = normed.model.bridge.blocks[1].ln1.original_component
    x = torch.randn(3, normed.model.bridge.cfg.d_model)
    torch.testing.assert_close(norm(2 * x), norm(x), atol=1e-3, rtol=1e-3)


def test_distractors_compute_something_that_nobody_of_the_program_reads():
    plain, distracted = (
        compile(recall(), Options(rotate=True, distractor_heads=n, distractor_neurons=8 * n))
        for n in (0, 2)
    )
    tokens = tokens_for(plain.program)
    torch.testing.assert_close(
        plain.model.bridge(tokens), distracted.model.bridge(tokens), atol=ROUNDING, rtol=0
    )
    engine, used = Engine(distracted.model), {"a0.h0", "a1.h0"}
    writers = engine.clean(tiny.from_tokens(tokens)).writers
    read = torch.cat([aligned.basis for aligned in distracted.alignment.values()])
    for name in set(engine.graph.writers) - used - {"input"}:
        written = writers[engine.graph.writer_index[name]]
        assert written.std(0).max() > 0.1, f"{name} does not depend on the input"
        assert (written @ read.T).abs().max() < 1e-5, f"{name} writes where the program reads"


def test_given_sizes_are_kept_and_smaller_ones_spread_over_layers():
    given = {"n_layers": 4, "n_heads": 1, "d_model": 50, "d_head": 20, "d_mlp": 70}
    compiled = compile(modular_addition(), Options(**given, rotate=True))
    assert {name: getattr(compiled.model.bridge.cfg, name) for name in given} == given
    assert {name: where.nodes for name, where in compiled.places.items()} == {
        "first": ("a0.h0",),
        "second": ("a1.h0",),
        "sum": ("m1",),
    }
    assert worst(compiled, Engine(compiled.model), tokens_for(compiled.program)) < ROUNDING


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"n_layers": 1},
            "'brackets' needs n_layers=3, n_heads=1, d_model=23, d_head=1, d_mlp=6, but n_layers=1 "
            "was",
        ),
        ({"d_model": 20}, "needs .* d_model=23, .*, but d_model=20 was given; raise it"),
        ({"d_mlp": 3}, "step 'sign' needs 4 neurons in an MLP, but d_mlp leaves 3"),
        (
            {"n_heads": 1, "distractor_heads": 1},
            "step 'height' needs 1 heads in a layer, but n_heads leaves 0",
        ),
        ({"norm": "layer"}, "norm='layer', but it must be none or rms"),
        ({"junk": 0}, "junk=0, but distractors need at least 1 dimension"),
        ({"distractor_heads": -1}, "distractor_heads=-1, but it cannot be below 0"),
        (
            {"redundant": "height"},
            "redundant='height' is no categorical variable that a head computes; those are ",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_sizes(given, message):
    with pytest.raises(ValueError, match=message):
        compile(brackets(), Options(**given))


def test_inputs_for_which_attention_would_not_be_hard_are_refused():
    with pytest.raises(ValueError, match="length=257, but attention is hard only up to 256 tokens"):
        compile(induction(length=257))


def test_too_few_heads_need_more_layers_than_given():
    with pytest.raises(
        ValueError, match="needs n_layers=2, n_heads=1, .*, but n_layers=1 was given"
    ):
        compile(modular_addition(), Options(n_heads=1, n_layers=1))


# ---- edges ---------------------------------------------------------------------------------------


def test_edges_by_name():
    compiled = compile(recall())
    assert sorted(compiled.edges()) == sorted(
        [
            "input->a0.h0<q>",
            "input->a0.h0<k>",
            "input->a0.h0<v>",
            "a0.h0->a1.h0<k>",
            "input->a1.h0<k>",
            "input->a1.h0<q>",
            "input->a1.h0<v>",
            "a1.h0->logits",
        ]
    )
    assert sorted(compiled.edges(split_input=True)) == sorted(
        [
            "input.position->a0.h0<q>",
            "input.position->a0.h0<k>",
            "input.token->a0.h0<v>",
            "a0.h0->a1.h0<k>",
            "input.position->a1.h0<k>",
            "input.token->a1.h0<q>",
            "input.token->a1.h0<v>",
            "a1.h0->logits",
        ]
    )
    per_position = compiled.edges(per_position=True)
    assert "a1.h0->logits@8" in per_position and "a1.h0->logits@7" not in per_position


@pytest.mark.parametrize("variant", [{"split_input": True}, {"n_positions": 9}])
def test_true_edges_with_a_split_input_and_per_position(variant):
    compiled = compile(recall(), Options(rotate=True))
    engine = Engine(compiled.model, **variant)
    for _, objective, found in objectives(compiled, ("zero", "counterfactual"), engine):
        assert accuracy(objective, circuit_of(engine.graph, found)).eq(1).all()
        program = mask_of(engine.graph, (edge for effect in found for edge in effect.edges))
        others = (engine.graph.exists & ~program).nonzero().tolist()
        assert max(effects(objective, [(engine.graph.edge_name(*edge),) for edge in others])) < 1e-6


def test_an_edge_that_carries_nothing_is_not_true():
    """The program claims an edge; the weights behind it are wiped out."""
    compiled = compile(recall())
    bridge = compiled.model.bridge
    with torch.no_grad():
        bridge.blocks[0].attn.o.original_component.weight.zero_()
    wiped = Compiled(
        compiled.program, compiled.options, _rewrapped(bridge), compiled.alignment, compiled.places
    )
    for _, _, found in objectives(wiped, ("zero", "mean", "counterfactual")):
        true = {effect.edges[0] for effect in found if effect.true}
        assert "a0.h0->a1.h0<k>" not in true and "input->a0.h0<v>" not in true
        assert "a1.h0->logits" in true


def _rewrapped(bridge):
    from circuits.model.load import from_bridge

    return from_bridge(bridge)


def test_ground_truth_needs_the_right_model_and_ablation():
    compiled, other = compile(recall(), Options(norm="rms")), compile(recall())
    prompts, zero = prompts_from_records(compiled.records(8, 0)), AblationConfig("zero")
    engine = Engine(compiled.model)
    with pytest.raises(ValueError, match="another model"):
        true_edges(other, engine, prompts, fit_ablation(zero, engine, prompts))
    with pytest.raises(
        ValueError, match="ablation=zero removes the constant that keeps the norm of an RMS model"
    ):
        true_edges(compiled, engine, prompts, fit_ablation(zero, engine, prompts))
    with pytest.raises(ValueError, match="bound=0.0"):
        engine = Engine(other.model)
        true_edges(other, engine, prompts, fit_ablation(zero, engine, prompts), bound=0.0)


# ---- redundancy ----------------------------------------------------------------------------------


def test_with_a_majority_no_single_edge_of_a_group_shows_under_any_ablation():
    compiled = compile(
        modular_addition(), Options(redundant="first", copies=3, needed=2, rotate=True)
    )
    assert compiled.alignment["first"].nodes == ("a0.h0", "a0.h1", "a0.h2")
    for name, objective, found in objectives(compiled):
        kept = circuit_of(objective.engine.graph, found)
        assert accuracy(objective, kept).eq(1).all()
        true = [effect for effect in found if effect.true]
        groups = [effect for effect in true if len(effect.edges) == 3]
        assert len(groups) == (3 if name == "zero" else 2), (
            "values, and what the lookup reads; with zero also keys"
        )
        assert max(abs(alone) for effect in groups for alone in effect.alone) < 1e-6
        assert min(effects(objective, [effect.edges for effect in true], kept)) > 0.5
        votes = [
            effect.edges[:2] for effect in groups if not effect.edges[0].endswith("<k>")
        ]  # lost keys blur a vote
        assert min(effects(objective, votes, kept)) > 0.5, "two of three show"


def test_a_spare_head_takes_over_from_one_that_is_silent_but_not_from_one_that_errs():
    for program, variable, reader in (
        (modular_addition(), "first", "m0"),
        (induction(), "previous", "a1.h0<k>"),
    ):
        compiled = compile(program, Options(redundant=variable, rotate=True))
        for name, objective, found in objectives(compiled, ("zero", "mean", "counterfactual")):
            group = next(effect for effect in found if f"a0.h0->{reader}" in effect.edges)
            assert accuracy(objective, objective.engine.graph.exists).eq(1).all()
            assert accuracy(objective, circuit_of(objective.engine.graph, found)).eq(1).all()
            assert group.effect > 1
            assert (
                (min(group.alone) > 0.1) if name == "counterfactual" else (max(group.alone) < 1e-6)
            )


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        (induction(), {"redundant": "next"}, "redundant='next' is the output"),
        (
            induction(),
            {"redundant": "previous", "copies": 3, "needed": 2},
            "cannot be read by step 'next'",
        ),
        (
            modular_addition(),
            {"redundant": "first", "copies": 2, "needed": 2},
            "it must be 1 <= needed < copies",
        ),
        (modular_addition(), {"redundant": "sum"}, r"those are \['first', 'second'\]"),
        (
            modular_addition(),
            {"redundant": "first", "n_heads": 1},
            "step 'first' needs 2 heads in a layer",
        ),
    ],
)
def test_redundancy_that_readers_cannot_use_is_refused(program, options, message):
    with pytest.raises(ValueError, match=message):
        compile(program, Options(**options))


# ---- prompts -------------------------------------------------------------------------------------


def test_records_are_prompts_with_a_counterfactual_twin():
    for program in (sort(), brackets()):
        compiled = compile(program)
        records = compiled.records(50, 3)
        assert records == compiled.records(50, 3) and records != compiled.records(50, 4)
        prompts = prompts_from_records(
            records, vocabulary=len(program.tokens), max_length=program.length
        )
        assert (
            prompts.corrupt is not None
            and prompts.answers is not None
            and prompts.wrong_answers is not None
        )
        places = list(program.scored_positions)
        assert torch.equal(
            prompts.answers[..., 0], compiled.meaning(prompts.clean)["answer"][:, places]
        )
        corrupt = compiled.meaning(prompts.corrupt)["answer"][:, places]
        differs = corrupt != prompts.answers[..., 0]
        assert differs.any(1).all()
        assert torch.equal(prompts.wrong_answers[..., 0][differs], corrupt[differs])


def test_unknown_tokens_and_long_inputs_are_refused():
    compiled = compile(same := PROGRAMS["same_ends"]())
    assert compiled.encode(["x1", "x3"]) == [1, 3]
    with pytest.raises(
        ValueError, match="token 'z' is unknown to same_ends; it has x0, x1, x2, x3, no, yes"
    ):
        compiled.encode(["x0", "z"])
    with pytest.raises(ValueError, match="7 tokens, but same_ends was compiled for 1 to 6"):
        compiled.encode(["x0"] * 7)
    with pytest.raises(ValueError, match="inputs of 7 tokens, but same_ends was compiled for 6"):
        compiled.meaning(tokens_for(same, 2, 7))
    with pytest.raises(ValueError, match="token ids from 0 to 6, but same_ends has 0 to 5"):
        compiled.meaning(torch.tensor([[0, 6]]))
    with pytest.raises(ValueError, match="context is 6"):
        Engine(compiled.model).logits(tiny.from_tokens(tokens_for(same, 2, 7)))


def test_a_program_with_one_answer_has_no_counterfactual():
    steps = (
        Attend("x", "token", **at(0)),
        Lookup("y", ("x",), lambda x: 0, 1),
        Attend("z", "y", **back(0)),
    )
    one = Program(
        "one", ("a", "b"), 2, steps, "z", ("a",), lambda c, g: torch.randint(2, (c, 2), generator=g)
    )
    with pytest.raises(ValueError, match="no input of one with another answer in 100 draws"):
        compile(one).records(4, 0)
