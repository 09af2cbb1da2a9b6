"""AUROC and its intervals are what their definitions say."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import roc_auc_score

from mad.benchmark.auroc import auroc, roc_curve, separations
from mad.benchmark.results import FOUND, Results, Scorer
from tests.mad.benchmark.made_up import STRATA, drawn, subject


def of_kind(parts: dict, kind: str) -> torch.Tensor:
    return parts["anomaly"][torch.tensor([name == kind for name in STRATA["anomaly"]])]


@pytest.mark.parametrize("step", [0.0, 0.5])
def test_auroc_is_that_of_scikit_learn(step):
    parts = drawn(0, step=step)
    found = separations(Results((subject({"s": parts}),)), draws=0)
    assert len({one.place for one in found}) == len(found) == 4
    for one in found:
        normal, anomalous = parts[one.place.group], of_kind(parts, one.place.stratum)
        labels = [0] * len(normal) + [1] * len(anomalous)
        expected = roc_auc_score(labels, torch.cat([normal, anomalous]).numpy())
        assert one.auroc == auroc(normal, anomalous) == pytest.approx(expected, abs=1e-6)
        assert (one.low, one.high) == (None, None)
        assert (one.normals, one.anomalies) == (len(normal), len(anomalous))


def test_a_roc_curve_has_the_area_that_it_says():
    parts = drawn(0, step=0.5)
    curve = roc_curve("s", "in distribution", parts["normal_iid"], parts["anomaly"])
    false, true = (
        torch.tensor(rates) for rates in (curve.false_positive_rate, curve.true_positive_rate)
    )
    assert torch.trapezoid(true, false).item() == pytest.approx(curve.auroc)
    assert (curve.name, curve.group) == ("s", "in distribution")


def test_intervals_are_those_of_a_slow_bootstrap():
    parts = drawn(1, step=0.25)
    found = separations(Results((subject({"s": parts}),)), draws=2000)
    (one,) = (s for s in found if s.place.group == "normal_shift" and s.place.stratum == "disagree")
    normal, anomalous = parts["normal_shift"], of_kind(parts, "disagree")
    generator, slow = torch.Generator().manual_seed(5), []
    for _ in range(2000):
        a, n = (
            own[torch.randint(len(own), (len(own),), generator=generator)]
            for own in (anomalous, normal)
        )
        slow.append(((a[:, None] > n).double() + (a[:, None] == n).double() / 2).mean())
    bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(torch.stack(slow), bounds).tolist()
    assert (one.low, one.high) == (pytest.approx(low, abs=0.012), pytest.approx(high, abs=0.012))
    assert low < one.auroc < high


def test_draws_do_not_depend_on_what_else_was_scored():
    alone = separations(Results((subject({"s": drawn(0)}),)), draws=50)
    other = subject({"s": drawn(1)}, seed=4)
    beside = separations(Results((other, subject({"a": drawn(2), "s": drawn(0)}))), draws=50)
    assert set(alone) < set(beside)
    assert alone != separations(Results((subject({"s": drawn(0)}),)), draws=50, seed=1)
    with pytest.raises(ValueError, match="draws=-1"):
        separations(Results((subject({"s": drawn(0)}),)), draws=-1)


def test_a_perfect_score_has_no_interval_beyond_one():
    found = separations(Results((subject({"s": drawn(0, anomaly=100.0)}),)), draws=20)
    assert {(one.auroc, one.low, one.high) for one in found} == {(1.0, 1.0, 1.0)}


def test_random_circuits_get_no_intervals():
    parts = {Scorer("s", FOUND): drawn(0), Scorer("s", "random0"): drawn(1)}
    for one in separations(Results((subject(parts),)), draws=9):
        assert (one.low is None) == (one.scorer.circuit == "random0")


def test_a_task_without_anomalies_has_no_places():
    strata = {group: names for group, names in STRATA.items() if group != "anomaly"}
    parts = {part: values for part, values in drawn(0).items() if part != "anomaly"}
    assert separations(Results((subject({"s": parts}, strata=strata),))) == ()
