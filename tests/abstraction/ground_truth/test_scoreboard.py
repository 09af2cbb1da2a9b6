"""Methods put to the test: what counts as exact, AUCs by hand, the suite, its command and its
picture.
"""

from __future__ import annotations

import json
import math
from dataclasses import make_dataclass, replace

import pytest
import torch

from abstraction.ground_truth.scoreboard import Result, judge, put_to_the_test
from abstraction.ground_truth.scoreboard_plot import draw_truth
from circuits.discovery import ACDC, EAP, EAPIG, METHODS
from circuits.discovery.masks.settings import MaskTraining
from circuits.discovery.method import Found
from circuits.graph import Graph
from mad.commands.main import main

GRAPH = Graph(1, 1, attention_only=True)  # input -> q, k, v of a0.h0; both -> logits
TRUE = ("input->a0.h0<v>", "a0.h0->logits")


def mask(*names: str) -> torch.Tensor:
    kept = torch.zeros_like(GRAPH.exists)
    for name in names:
        kept[GRAPH.edge_index(name)] = True
    return kept


def scores(**by_reader: float) -> torch.Tensor:
    values = torch.zeros(GRAPH.exists.shape)
    for reader, score in by_reader.items():
        name = {"direct": "input->logits", "logits": "a0.h0->logits"}.get(
            reader, f"input->a0.h0<{reader}>"
        )
        values[GRAPH.edge_index(name)] = score
    return values


def judged(found: Found) -> Result:
    return judge(GRAPH, mask(*TRUE), found, program="p", variant="plain", method="m", seconds=0.0)


def test_a_method_that_scores_is_exact_when_its_best_edges_are_the_true_ones():
    result = judged(Found(scores(v=-3.0, logits=2.0, q=1.0, k=-0.5)))
    assert (
        result.exact
        and result.edge_auc == 1.0
        and (result.true_edges, result.found_edges, result.edges) == (2, 2, 5)
    )
    assert result.missing == result.extra == ()


def test_ties_between_true_and_other_edges_are_no_success():
    """The n best edges are the true ones only because ties are broken by edge order."""
    tied = judged(Found(scores(v=1.0)))
    assert not tied.exact and tied.edge_auc == pytest.approx((3 + 3 * 0.5) / 6)


def test_what_was_missed_and_what_was_added_is_named():
    result = judged(Found(scores(v=3.0, q=-2.0, logits=1.0, direct=0.5)))
    assert (
        not result.exact
        and result.missing == ("a0.h0->logits",)
        and result.extra == ("input->a0.h0<q>",)
    )
    assert result.edge_auc == pytest.approx(
        5 / 6
    )  # of six pairs one is wrong: a0.h0->logits against q


def test_ties_count_half_and_nodes_go_by_their_best_edge():
    result = judged(Found(scores(v=1.0, logits=1.0, q=1.0)))
    assert result.edge_auc == pytest.approx((2 * 2 + 2 * 0.5) / 6)
    assert math.isnan(result.node_auc)  # both nodes have a true edge
    alone = judge(
        GRAPH,
        mask("a0.h0->logits"),
        Found(scores(v=1.0, logits=2.0)),
        program="p",
        variant="plain",
        method="m",
        seconds=0.0,
    )
    assert alone.node_auc == 1.0


def test_kept_edges_come_before_all_others():
    deltas = scores(v=0.1, logits=0.2, q=5.0)
    assert judged(Found(deltas, kept=mask(*TRUE))).edge_auc == 1.0
    wrong = judged(Found(deltas, kept=mask(*TRUE, "input->a0.h0<q>")))
    assert not wrong.exact and wrong.extra == ("input->a0.h0<q>",) and wrong.found_edges == 3


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
def test_acdc_recovers_compiled_circuits_exactly(ablation):
    programs, variants = ("recall", "sort", "sensors"), ("plain", "rotated, distractors")
    results = list(
        put_to_the_test({"acdc": ACDC(tau=1e-3)}, programs, variants, ablation=ablation, prompts=32)
    )
    assert len(results) == 6 and all(result.exact and result.edge_auc == 1.0 for result in results)
    assert [result.program for result in results[::2]] == list(programs)


def test_acdc_by_kl_recovers_trained_circuits_exactly():
    results = list(
        put_to_the_test({"acdc": ACDC()}, ("recall", "sort", "greater_than"), ("trained",))
    )
    assert [result.program for result in results] == [
        "recall",
        "greater_than",
    ]  # sort is not shipped trained
    assert all(result.exact and result.edges == 110 for result in results)


def test_gradients_at_the_clean_run_miss_attention_that_is_saturated():
    """Hard attention has no gradient: plain EAP cannot see what it attends by."""
    methods = {"eap": EAP(), "eap_ig": EAPIG()}
    plain, integrated = put_to_the_test(methods, ("recall",), ("plain",), prompts=32)
    assert not plain.exact and set(plain.missing) == {"input->a1.h0<q>", "a0.h0->a1.h0<k>"}
    assert integrated.exact


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            {"methods": {"edge": None}},
            "method 'edge' is unknown; the methods are acdc, eap, clean_corrupt, eap_ig",
        ),
        (
            {"programs": ["sorting"]},
            "program 'sorting' is unknown; the programs are modular_addition",
        ),
        ({"variants": ["turned"]}, "variant 'turned' is unknown; the variants are plain, rotated"),
    ],
)
def test_unknown_names_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        next(put_to_the_test(**{"methods": {"eap": EAP()}, **words}))


def test_the_command_tests_every_registered_method(tmp_path, capsys, monkeypatch):
    for name, method in METHODS.items():
        if issubclass(method.schema, MaskTraining):  # a few steps show as much
            schema = method.schema
            quick = make_dataclass(schema.__name__, [("steps", int, 40)], bases=(schema,))
            monkeypatch.setitem(METHODS, name, replace(method, schema=quick))
    words = [
        "truth",
        "programs=[same_ends,majority]",
        "variants=[plain]",
        "prompts=16",
        f"out={tmp_path}",
    ]
    assert main(words) == 0
    data = json.loads((tmp_path / "truth.json").read_text())
    assert [r["method"] for r in data["results"]] == [*METHODS, *METHODS]
    assert data["config"]["prompts"] == 16
    assert len((tmp_path / "truth.md").read_text().splitlines()) == 2 + 2 * len(METHODS)
    assert (tmp_path / "truth.png").stat().st_size > 10_000
    assert "acdc" in capsys.readouterr().out
    assert main(words) == 1 and "holds truth.json already" in capsys.readouterr().err
    assert main(["truth", "methods=[eap]", "metric=kl", "programs=[same_ends]"]) == 1
    assert "method=eap_ig, or metric=logit_diff" in capsys.readouterr().err


def test_there_must_be_something_to_draw(tmp_path):
    with pytest.raises(ValueError, match="there are 0 results to draw"):
        draw_truth([], tmp_path / "t.png")
