"""Planted mechanisms: idle on normal inputs, to blame on triggered ones, whether or not the answers
agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import pytest
import torch

from abstraction.ground_truth.compiled import Compiled, compile
from abstraction.ground_truth.effects import (
    BOUND,
    accuracy,
    circuit_of,
    effects,
    mask_of,
    true_edges,
)
from abstraction.ground_truth.options import Options
from abstraction.ground_truth.planted import KINDS, PLANTED, Planted, plant
from abstraction.ground_truth.steps import NORMAL
from circuits.ablation import AblationConfig, fit_ablation
from circuits.engine import Engine
from circuits.metrics import metric_named
from circuits.objective import Objective, prepare
from circuits.prompts import Prompts, prompts_from_records
from tests import tiny

IDLE = 1e-6  # nats
# Each program and each trigger once at least; the other pairs take long.
CASES = [
    ("recall", "token"),
    ("recall", "conjunction"),
    ("modular_addition", "token"),
    ("induction", "conjunction"),
    pytest.param(("modular_addition", "conjunction"), marks=pytest.mark.slow),
    pytest.param(("induction", "token"), marks=pytest.mark.slow),
]


class Case(NamedTuple):
    planted: Planted
    compiled: Compiled
    engine: Engine
    prompts: Mapping[str, Prompts]  # of each kind
    reference: Prompts


@cache
def made(name: str, trigger: str) -> Case:
    planted = plant(name, trigger)
    compiled = compile(
        planted.program, Options(rotate=True, distractor_heads=1, distractor_neurons=8)
    )
    prompts = {
        kind: prompts_from_records(
            compiled.records(64, 5, sample=sample, label=int(kind in ("agree", "disagree")))
        )
        for kind, sample in planted.samplers.items()
    }
    return Case(
        planted,
        compiled,
        Engine(compiled.model),
        prompts,
        prompts_from_records(compiled.records(128, 1)),
    )


@pytest.fixture(params=CASES, ids=lambda case: ", ".join(case))
def case(request) -> Case:
    return made(*request.param)


def behaviour_of(case: Case, kind: str, name: str) -> Objective:
    """What is removed is replaced by normal values: of normal reference prompts, or of the normal
    corrupt twin.
    """
    ablation = fit_ablation(AblationConfig(name), case.engine, case.reference)
    return prepare(case.engine, case.prompts[kind], metric_named("kl"), ablation)


def answers_under(objective: Objective, kept: torch.Tensor) -> torch.Tensor:
    (batch,) = objective.batches
    logits = objective.engine.masked(batch.prompts, kept, batch.ablated)
    return logits[:, 0].argmax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_what_it_says_and_answered_by_its_mechanism(case, kind):
    planted, compiled, engine, prompts = (
        case.planted,
        case.compiled,
        case.engine,
        case.prompts[kind],
    )
    values = {name: value[:, -1] for name, value in compiled.meaning(prompts.clean).items()}
    normal, other = values[planted.normal], values[planted.other]
    ids = torch.tensor([compiled.tokens.index(name) for name in compiled.program.answers])
    answers = engine.logits(tiny.from_tokens(prompts.clean))[:, -1].argmax(-1)
    anomalous = kind in ("agree", "disagree")
    assert values[planted.trigger].eq(int(anomalous)).all()
    assert torch.equal(answers, ids[other if anomalous else normal])
    if anomalous:
        assert (normal == other).eq(kind == "agree").all()
    else:
        assert (normal != other).any(), "the two mechanisms never differ: the test shows nothing"
    assert prompts.labels is not None and prompts.labels.eq(int(anomalous)).all()
    assert prompts.corrupt is not None
    assert compiled.meaning(prompts.corrupt)[planted.trigger][:, -1].eq(0).all(), (
        "corrupt twins are normal"
    )


def test_rare_inputs_have_a_token_that_normal_ones_never_have(case):
    normal, rare = (case.prompts[kind].clean for kind in ("normal", "rare"))
    assert all(set(row) - set(normal.unique().tolist()) for row in rare.tolist())


def test_a_conjunction_has_no_new_token():
    for name in ("recall", "modular_addition", "induction"):
        prompts = made(name, "conjunction").prompts
        for kind in ("agree", "disagree"):
            assert set(prompts[kind].clean.unique().tolist()) <= set(
                prompts["normal"].clean.unique().tolist()
            )


@pytest.mark.parametrize("ablation", tiny.UNTRAINED)
def test_the_planted_edges_are_idle_on_normal_inputs_and_to_blame_on_triggered_ones(case, ablation):
    planted, compiled, engine = case.planted, case.compiled, case.engine
    blamed = compiled.edges(PLANTED)
    without = engine.graph.exists & ~mask_of(engine.graph, blamed)
    blurred = (
        ablation == "mean" and "conjunction" in compiled.program.name
    )  # see abstraction.ground_truth.planted
    for kind in KINDS:
        objective = behaviour_of(case, kind, ablation)
        (effect,) = effects(objective, [blamed])
        answers = answers_under(objective, without)
        values = compiled.meaning(case.prompts[kind].clean)
        ids = torch.tensor([compiled.tokens.index(name) for name in compiled.program.answers])
        assert torch.equal(answers, ids[values[planted.normal][:, -1]]), (
            "without them the normal mechanism answers"
        )
        if kind == "disagree":
            assert effect > 5
        else:  # agree: the answer is the same, by the other way
            assert abs(effect) < (100 * IDLE if blurred else IDLE)


def test_agreeing_anomalies_do_not_need_the_normal_mechanism_and_normal_inputs_do(case):
    planted, compiled, engine = case.planted, case.compiled, case.engine
    (reader,) = compiled.places["answered"].nodes
    (writer,) = compiled.places[planted.normal].nodes
    without = engine.graph.exists & ~mask_of(engine.graph, [f"{writer}->{reader}"])
    for name in ("mean", "counterfactual"):
        right = {kind: accuracy(behaviour_of(case, kind, name), without).mean() for kind in KINDS}
        assert right["agree"] == right["disagree"] == 1
        assert right["normal"] < 0.5 and right["rare"] < 0.5


def test_every_edge_has_one_mechanism_and_is_true_where_that_is_at_work(case):
    """With normal means: the normal edges on normal inputs, the planted ones on those that
    disagree.
    """
    compiled, engine = case.compiled, case.engine
    assert not set(compiled.edges(PLANTED)) & set(compiled.edges(NORMAL))
    assert set(compiled.edges()) == set(compiled.edges(PLANTED)) | set(compiled.edges(NORMAL))
    ablation = fit_ablation(AblationConfig("mean"), engine, case.reference)
    true = {}
    for kind in ("normal", "disagree"):
        found = true_edges(compiled, engine, case.prompts[kind], ablation)
        true[kind] = {effect.mechanism for effect in found if effect.effect > 100 * BOUND}
        assert (
            accuracy(behaviour_of(case, kind, "mean"), circuit_of(engine.graph, found)).eq(1).all()
        )
    assert true["normal"] == {NORMAL}
    assert PLANTED in true["disagree"]


def test_one_edge_of_a_token_trigger_is_idle_alone():
    for name in ("recall", "modular_addition", "induction"):
        case = made(name, "token")
        objective = behaviour_of(case, "normal", "counterfactual")
        assert (
            max(map(abs, effects(objective, [(edge,) for edge in case.compiled.edges(PLANTED)])))
            < IDLE
        )


def test_what_cannot_be_planted_is_refused():
    with pytest.raises(
        ValueError,
        match="nothing is planted in 'sort'; choose one of recall, modular_addition, induct",
    ):
        plant("sort")
    with pytest.raises(ValueError, match="trigger='word', but it must be token or conjunction"):
        plant("recall", "word")
