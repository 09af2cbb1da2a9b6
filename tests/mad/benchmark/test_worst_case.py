"""Worst cases, their differences, oracles and random circuits are what their definitions say."""

from __future__ import annotations

import pytest
import torch

from mad.benchmark.auroc import separations
from mad.benchmark.results import ORACLE, Place, Results, Scorer
from mad.benchmark.worst_case import (
    best_baseline,
    controls,
    difference,
    oracle,
    worst_cases,
    worst_controls,
)
from tests.mad.benchmark.made_up import STRATA, drawn, found, subject

GOOD, STEADY, FICKLE = found("good"), Scorer("steady"), Scorer("fickle")


@pytest.fixture(scope="module")
def made() -> tuple:
    randoms = [Scorer("good", f"random{number}") for number in range(3)]
    first = {
        GOOD: drawn(0, 3.0),
        STEADY: drawn(1, 1.5),
        FICKLE: drawn(2, 4.0),
        Scorer("rare"): drawn(3, 5.0),
        Scorer("d, layer 0"): drawn(4, 5.0),
        Scorer("d, layer 1"): drawn(5, 0.0),
        **{scorer: drawn(10 + k, float(k)) for k, scorer in enumerate(randoms)},
    }
    second = {
        GOOD: drawn(6, 3.0),
        STEADY: drawn(7, 1.5),
        FICKLE: drawn(8, 4.0, shift=6.0),
        Scorer("d, layer 0"): drawn(9, 0.0),
        Scorer("d, layer 1"): drawn(10, 5.0),
        **{scorer: drawn(20 + k, float(k)) for k, scorer in enumerate(randoms)},
    }
    return separations(Results((subject(first), subject(second, seed=4))), draws=0)


def test_worst_cases(made):
    worst = worst_cases(made)
    assert (worst[FICKLE].place.seed, worst[FICKLE].place.group) == (4, "normal_shift")
    for scorer in (GOOD, STEADY, FICKLE):
        assert worst[scorer].auroc == min(one.auroc for one in made if one.scorer == scorer)


def test_the_best_baseline_was_computed_everywhere(made):
    # `rare` is missing on one model, and a single layer is no baseline.
    assert best_baseline(made) == STEADY
    assert best_baseline([one for one in made if one.place.seed == 3]) == Scorer("rare")
    left = [one for one in made if one.scorer.detector in ("good", "rare")]
    assert best_baseline(left) is None


def test_an_oracle_picks_the_layer_in_each_place(made):
    best, worst = oracle(made), worst_cases(made)
    assert {one.scorer for one in best} == {Scorer("d, best layer", ORACLE)} and len(best) == 8
    for one in best:
        layers = [
            other.auroc for other in made if other.place == one.place and other.scorer.family == "d"
        ]
        assert one.auroc == max(layers) and len(layers) == 2
    assert worst_cases(best)[Scorer("d, best layer", ORACLE)].auroc > 0.98
    assert max(worst[Scorer(f"d, layer {n}")].auroc for n in (0, 1)) < 0.6


def test_random_circuits_are_told_by_mean_and_range(made):
    place = Place("recall_redirect", 3, "normal_iid", "agree")
    randoms = [one.auroc for one in made if one.place == place and one.scorer.random]
    control = controls(made)[GOOD, place]
    assert control.mean == pytest.approx(sum(randoms) / 3)
    assert (control.low, control.high, control.circuits) == (min(randoms), max(randoms), 3)
    worst = worst_cases(made)
    own = [worst[Scorer("good", f"random{number}")].auroc for number in range(3)]
    assert worst_controls(made)[GOOD].mean == pytest.approx(sum(own) / 3)


def two_models(ours: float, theirs: float) -> Results:
    return Results(
        tuple(
            subject({"ours": drawn(seed, ours), "theirs": drawn(seed + 9, theirs)}, seed=seed)
            for seed in (3, 4)
        )
    )


def test_difference_of_worst_cases():
    ours, theirs = Scorer("ours"), Scorer("theirs")
    better = difference(two_models(3.0, 0.5), ours, theirs)
    assert better.difference == better.ours.auroc - better.theirs.auroc
    assert 0 < better.low < better.difference < better.high and better.above == 1.0
    worse = difference(two_models(3.0, 0.5), theirs, ours)
    assert (worse.low, worse.high) == (pytest.approx(-better.high), pytest.approx(-better.low))
    same = difference(two_models(1.0, 1.0), ours, ours)  # the same prompts for both
    assert (same.difference, same.low, same.high, same.above) == (0.0, 0.0, 0.0, 0.0)
    assert difference(two_models(3.0, 0.5), ours, theirs) == better


def test_difference_is_that_of_a_slow_bootstrap():
    parts = {"ours": drawn(0, 1.2, shift=0.3), "theirs": drawn(1, 0.8)}
    made = difference(Results((subject(parts),)), Scorer("ours"), Scorer("theirs"), draws=2000)
    generator, slow = torch.Generator().manual_seed(3), []
    kind = torch.tensor([name == "agree" for name in STRATA["anomaly"]])
    groups = [torch.arange(40), torch.arange(50), kind.nonzero()[:, 0], (~kind).nonzero()[:, 0]]
    for _ in range(2000):
        iid, shift, *strata = [
            own[torch.randint(len(own), (len(own),), generator=generator)] for own in groups
        ]
        worst = []
        for own in (parts["ours"], parts["theirs"]):
            normals = (own["normal_iid"][iid], own["normal_shift"][shift])
            anomalies = [own["anomaly"][rows][:, None] for rows in strata]
            worst.append(min((a > n).double().mean() for a in anomalies for n in normals))
        slow.append(worst[0] - worst[1])
    bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(torch.stack(slow), bounds).tolist()
    assert made.low == pytest.approx(low, abs=0.015) and made.high == pytest.approx(high, abs=0.015)


def test_comparisons_are_refused():
    first, second = subject({"a": drawn(0), "b": drawn(1)}), subject({"a": drawn(2)}, seed=4)
    with pytest.raises(ValueError, match="b has no scores on recall_redirect-4"):
        difference(Results((first, second)), Scorer("a"), Scorer("b"))
    with pytest.raises(ValueError, match="draws=1"):
        difference(Results((first,)), Scorer("a"), Scorer("b"), draws=1)
    with pytest.raises(ValueError, match="0 subjects with anomalies"):
        difference(Results(()), Scorer("a"), Scorer("b"))
