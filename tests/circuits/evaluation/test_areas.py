"""Standard errors, areas and NDF against slow and obvious versions of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuits.evaluation.areas import SHARES, area, areas, edges_at, rankings_of
from circuits.evaluation.bootstrap import DRAWS, Figure, Resampled, figure
from circuits.evaluation.figures import figures, ndf_each
from circuits.graph import Graph
from circuits.selection import select
from tests.circuits.evaluation.made import EVALUATION, GRAPH, circuit, scale

faith = st.lists(st.floats(-2, 3), min_size=10, max_size=10)


@given(faith)
def test_areas_are_those_of_mib(values):
    """MIB's evaluate_area_under_curve, written out."""
    cpr = cmd = 0.0
    for place in range(len(SHARES) - 1):
        width = SHARES[place + 1] - SHARES[place]
        one, other = values[place], values[place + 1]
        cpr += width * (one + other) / 2
        cmd += width * (abs(1 - one) + abs(1 - other)) / 2
    told = areas(torch.tensor(values), torch.tensor(values))
    assert told["cpr"].item() == pytest.approx(cpr, abs=1e-5)
    assert told["cmd"].item() == pytest.approx(cmd, abs=1e-5)


def test_a_perfect_curve_and_one_that_is_nothing():
    perfect, nothing = torch.ones(10), torch.zeros(10)
    told = {name: value.item() for name, value in areas(perfect, perfect).items()}
    assert told == pytest.approx({"cpr": 0.999, "cmd": 0, "cpr_log": 1, "cmd_log": 0}, abs=1e-9)
    told = {name: value.item() for name, value in areas(nothing, nothing).items()}
    assert told == pytest.approx({"cpr": 0, "cmd": 0.999, "cpr_log": 0, "cmd_log": 1}, abs=1e-9)


def test_each_decade_weighs_the_same_over_log_size():
    for first, last in ((0.001, 0.01), (0.01, 0.1), (0.1, 1.0)):
        inside = torch.tensor([float(first <= share <= last) for share in SHARES])
        logs = [math.log(share) for share in SHARES]
        slow = np.trapezoid(inside.numpy(), logs) / math.log(1000)
        assert area(inside, log=True).item() == pytest.approx(slow)
        assert slow > 1 / 3 - 1e-9


@pytest.mark.parametrize("graph", [Graph(2, 4), Graph(12, 12), Graph(30, 9, n_kv_heads=3)])
def test_the_ten_sizes_are_rounded_down_and_end_at_all_edges(graph):
    told = edges_at(graph)
    assert told[-1] == graph.n_edges and len(told) == 10
    for share, edges in zip(SHARES, told):
        assert edges <= share * graph.n_edges + 1e-6 < edges + 1


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.integers(0, 3))
def test_the_bootstrap_draws_prompts_with_replacement(values, seed):
    resampled = Resampled.of(len(values), seed)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (DRAWS, len(values)), generator=generator)
    slow = [sum(values[row] for row in rows) / len(values) for rows in drawn.tolist()]
    means = resampled.means(torch.tensor(values, dtype=torch.float64))
    assert means[1:].tolist() == pytest.approx(slow, abs=1e-9)
    assert means[0].item() == pytest.approx(sum(values) / len(values), abs=1e-9)


def test_the_error_of_a_mean_is_that_of_theory():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    one = figure(Resampled.of(400).means(values))
    assert one.value == pytest.approx(values.mean().item(), abs=1e-6)
    assert one.error == pytest.approx(values.std().item() / 20, rel=0.1)


def test_one_prompt_has_no_error():
    assert figure(Resampled.of(1).means(torch.tensor([3.0]))) == Figure(3.0, None)


def test_faithfulness_over_draws_is_the_quotient_of_means_over_draws():
    ours = scale()
    values = ours.objective.measure(circuit().kept)
    resampled = Resampled.of(len(EVALUATION), 3)
    drawn = ours.drawn(values, resampled)
    for draw in (0, 1, 7):
        weights = resampled.weights[draw]
        full, empty, own = (
            float((weights * each.double()).sum())
            for each in (ours.full_each, ours.empty_each, values)
        )
        assert drawn[draw].item() == pytest.approx((own - empty) / (full - empty))
    assert drawn[0].item() == pytest.approx(ours.of(values).value)


def test_ndf_of_each_prompt():
    ours = scale()
    values = ours.objective.measure(circuit().kept)
    slow = []
    for full, empty, own in zip(*(v.tolist() for v in (ours.full_each, ours.empty_each, values))):
        if full != empty:
            slow.append(1 - min(abs((full - own) / (full - empty)), 1))
    assert ndf_each(ours, values).tolist() == pytest.approx(slow)
    assert all(0 <= value <= 1 for value in slow)
    assert ndf_each(ours, ours.full_each).tolist() == [1.0] * len(slow)
    assert ndf_each(ours, ours.empty_each).tolist() == [0.0] * len(slow)


@pytest.mark.parametrize(("metric", "signed"), [("logit_diff", True), ("kl", False)])
def test_cpr_ranks_by_score_and_cmd_by_its_size(metric, signed):
    own, ours = circuit(metric=metric), scale(metric=metric)
    told = figures(ours, own.kept, rankings_of(own), random_draws=2)["areas"]
    assert told["cpr_ranking"] == ("signed" if signed else "absolute")
    assert told["own_ranking"] == ("signed" if signed else "absolute")
    curves = {}
    for way, absolute in (("signed", not signed), ("absolute", True)):
        masks = [select(GRAPH, own.scores, edges=n, absolute=absolute) for n in edges_at(GRAPH)]
        curves[way] = [ours.faithfulness(mask).value for mask in masks]
        points = [point[way] for point in told["sizes"]]
        assert [point["faithfulness"] for point in points] == pytest.approx(curves[way], abs=1e-6)
        assert [point["edges"] for point in points] == [int(mask.sum()) for mask in masks]
    slow = areas(torch.tensor(curves["signed"]), torch.tensor(curves["absolute"]))
    for name in ("cpr", "cmd", "cpr_log", "cmd_log"):
        assert told[name]["value"] == pytest.approx(slow[name].item(), abs=1e-6)
        assert told[name]["error"] > 0 and told[name]["random_mean"] is not None
    assert told["cpr"]["value"] > told["cpr"]["random_mean"]


def test_figures_have_errors_and_random_circuits_beside_them():
    own = circuit()
    told = figures(scale(), own.kept, rankings_of(own), random_draws=3)
    assert all(one["error"] > 0 for one in told["by_metric"].values())
    assert told["ndf"]["error"] > 0 and told["ndf"]["random_mean"] < told["ndf"]["value"]
    assert told["random_circuits"]["count"] == 3
    assert [point["edges"] for point in told["random_curve"]] == [2, 4, 9, 23, 46]
    assert all(point["low"] <= point["high"] for point in told["random_curve"])
