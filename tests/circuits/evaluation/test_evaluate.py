"""Everything at once, its refusals, and what the figures say against a circuit."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch

from circuits.circuit import Circuit
from circuits.discovery import EAPIG, METHODS, Found, Method
from circuits.engine import Engine
from circuits.evaluation.evaluate import Effort, evaluate
from circuits.extraction import extract
from circuits.faithfulness import by_metric, under_each_metric
from circuits.graph import Graph
from circuits.prompts import prompts_from_records
from circuits.selection import Selection, ranking
from tests import tiny
from tests.circuits.evaluation.made import (
    DISCOVERY,
    ENGINE,
    EVALUATION,
    GRAPH,
    circuit,
    found,
    scale,
    with_clear_answers,
)

LITTLE = Effort(random_draws=2, knockouts=2, minimality=3, redraws=1)


def test_all_figures_fit_into_json_and_say_what_they_depend_on():
    own = circuit()
    told = evaluate(own, ENGINE, EVALUATION, discovery=DISCOVERY, against=circuit(8), effort=LITTLE)
    again = json.loads(json.dumps(told, allow_nan=False))
    assert again["metric"] == "logit_diff" and again["ablation"] == "counterfactual"
    assert again["prompts"] == {"prompts": 12, "hash": EVALUATION.hash()}
    assert again["circuit"] == own.hash() and again["edges_kept"] == len(own)
    assert again["faithfulness"] == pytest.approx(scale().faithfulness(own.kept).value)
    assert len(again["completeness"]["knockouts"]) == 2 and again["minimality"]["tested"] == 3
    assert again["stability"]["redraws"] == 1 and again["against"]["edges"]["recall"] == 1
    repeated = evaluate(
        own, ENGINE, EVALUATION, discovery=DISCOVERY, against=circuit(8), effort=LITTLE
    )
    assert {**repeated, "seconds": 0} == {**told, "seconds": 0}


def test_parts_that_are_not_asked_for_are_left_out():
    told = evaluate(circuit(), ENGINE, EVALUATION, effort=Effort(0, 0, 0, 0))
    assert [told[name] for name in ("completeness", "minimality", "stability", "against")] == [
        None
    ] * 4
    assert told["random_circuits"]["count"] == 0 and told["random_curve"] == []


def test_a_foreign_circuit_is_measured_by_a_metric_and_ablation_that_are_named():
    bare = replace(circuit(), about={})
    with pytest.raises(ValueError, match="does not say by which ablation .* give ablation=NAME"):
        evaluate(bare, ENGINE, EVALUATION)
    given = {"metric": "kl", "ablation": "mean"}
    told = evaluate(bare, ENGINE, EVALUATION, effort=Effort(0, 0, 0, 0), **given)
    assert (told["metric"], told["ablation"]) == ("kl", "mean")


bare = prompts_from_records([{"clean": r["clean"]} for r in tiny.records(5, 4)])
other = Graph(2, 2, attention_only=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": EVALUATION.select([0])}, "1 prompts to evaluate on, but standard errors need"),
        ({"prompts": bare}, "corrupt"),
        ({"engine": Engine(tiny.gpt2(n_embd=8, n_head=4))}, "the circuit is of Graph.*this model"),
        (
            {"against": Circuit(other, other.exists, other.exists.float())},
            "the circuit is of another graph: 2 layers of 2 heads, 2 key-value heads, no MLPs",
        ),
        ({"metric": "nothing"}, "metric='nothing', but the metrics are"),
        ({"ablation": "nothing"}, "ablation='nothing', but the ablations are"),
        ({"effort": Effort(knockouts=-1)}, "knockouts=-1, but it must be at least 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, message):
    arguments = {"engine": ENGINE, "prompts": EVALUATION, "effort": Effort(0, 0, 0, 0), **change}
    with pytest.raises(ValueError, match=message):
        evaluate(circuit(), **arguments)


# ---- what figures say against a circuit ----------------------------------------------------------


def extracted(kept: torch.Tensor, prompts, **changes) -> dict:
    """The figures of an extraction whose method finds just these edges."""
    decided = Found(kept.float(), kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "eap_ig", Method(EAPIG, lambda *_: decided, decides=True))
        return extract(ENGINE, DISCOVERY, prompts, EAPIG(), **changes).metrics


def test_a_circuit_that_keeps_one_metric_and_not_another_is_warned_of(caplog):
    """It keeps the logit difference, and is hardly ever right."""
    prompts = with_clear_answers(20, 21)
    scores, generator = found(prompts).scores, torch.Generator().manual_seed(0)
    made = []
    for _ in range(60):
        noisy = scores * (1 + 0.5 * torch.randn(scores.shape, generator=generator))
        kept = ranking(GRAPH, noisy).circuit(24)
        ours = scale(prompts)
        by = by_metric(ours, under_each_metric(ours.objective, kept))
        made.append((by["logit_diff"].value - by["accuracy"].value, by, kept))
    gap, by, kept = max(made, key=lambda one: one[0])
    assert gap > 0.5
    with caplog.at_level(logging.WARNING, "circuits.extraction"):
        told = extracted(kept, prompts, metric="logit_diff", random_draws=0, accept_worse=True)
    start = f"the circuit keeps {by['logit_diff'].value:.2f} of logit_diff, but "
    (line,) = [line for line in told["warnings"] if line.startswith(start)]
    accuracy = by["accuracy"]
    numbers = f"({accuracy.circuit:.3g}; model {accuracy.model:.3g})"
    assert f"{accuracy.value:.2f} of accuracy {numbers}" in line and line in caplog.text
    whole = extracted(GRAPH.exists, prompts, metric="logit_diff", random_draws=0)
    assert not any("keeps" in warning for warning in whole["warnings"])


def test_a_circuit_that_is_worse_than_none_is_warned_of_where_it_is_wanted(caplog):
    ours = scale(metric="prob_diff")

    def loss(kept: torch.Tensor) -> float:
        gap = (ours.objective.empty() - ours.objective.measure(kept)).double()
        return (gap.mean() / (gap.std() / len(gap) ** 0.5)).item()

    from circuits.selection import random_circuits

    worst = max(random_circuits(GRAPH, 3, 20, 0), key=loss)
    assert loss(worst) > 2
    told = extracted(worst, EVALUATION, random_draws=0, accept_worse=True)
    own = told["by_metric"]["prob_diff"]
    wanted = (
        f"by prob_diff the circuit of {int(worst.sum())} edges ({own['circuit']:.3g}; empty "
        f"{own['empty']:.3g}, model {own['model']:.3g}) is worse than the empty one"
    )
    assert any(line.startswith(wanted) for line in told["warnings"])


def of_few_prompts(count: int) -> dict:
    made = [
        prompts_from_records(tiny.with_own_answers(ENGINE, tiny.records(n, seed, longest=7)))
        for n, seed in ((count, 14), (40, 104))
    ]
    return extract(ENGINE, *made, EAPIG(), metric="logit_diff", random_draws=0).metrics


def test_a_target_that_held_out_prompts_do_not_reach_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "circuits.extraction"):
        told = of_few_prompts(3)
    value, error = told["faithfulness"], told["by_metric"]["logit_diff"]["error"]
    assert value + 2 * error < 0.9
    line = (
        f"selection.faithfulness=0.9 was reached on the discovery prompts, but on 40 held-out ones "
        f"faithfulness is {value:.2f} (standard error {error:.2f})"
    )
    assert told["warnings"][-1].startswith(line) and line in caplog.text


def test_a_target_that_they_do_reach_or_that_nobody_asked_for_is_not():
    assert not any("held-out" in line for line in of_few_prompts(120)["warnings"])
    asked = extract(
        ENGINE,
        DISCOVERY,
        EVALUATION,
        EAPIG(),
        metric="logit_diff",
        selection=Selection(edges=6),
        random_draws=0,
        accept_worse=True,
    )
    assert asked.metrics["faithfulness"] < 0.9
    assert not any("held-out" in line for line in asked.metrics["warnings"])
