"""Who is flagged, by hand."""

from __future__ import annotations

import pytest
import torch

from mad.benchmark.flags import flags, worst_false_alarms
from mad.benchmark.results import FOUND, Results, Scorer
from tests.mad.benchmark.made_up import SIZES, drawn, subject


def test_flags_by_hand():
    strata = {
        "normal_iid": ("all",) * 4,
        "normal_shift": ("keys", "keys", "days", "days"),
        "anomaly": ("agree",) * 2,
    }
    parts = {
        "calibration": torch.arange(1.0, 100.0),  # 99 scores, 1 to 99: p(s) = (1 + #{>= s}) / 100
        "normal_iid": torch.tensor([0.0, 50.0, 99.0, 99.5]),  # p = 1, .51, .02, .01
        "normal_shift": torch.tensor([99.5, 99.5, 96.0, 95.0]),  # p = .01, .01, .05, .06
        "anomaly": torch.tensor([100.0, 3.0]),
    }
    found = flags(Results((subject({"s": parts}, strata=strata),)))
    shares = {(flag.place.group, flag.place.stratum, flag.alpha): flag.share for flag in found}
    assert shares == {
        ("normal_iid", "all", 0.01): 0.25,
        ("normal_iid", "all", 0.05): 0.5,
        ("normal_shift", "keys", 0.01): 1.0,
        ("normal_shift", "keys", 0.05): 1.0,
        ("normal_shift", "days", 0.01): 0.0,
        ("normal_shift", "days", 0.05): 0.5,
        ("anomaly", "agree", 0.01): 0.5,
        ("anomaly", "agree", 0.05): 0.5,
    }
    worst = worst_false_alarms(found, 0.01)[Scorer("s")]
    assert (worst.place.stratum, worst.share, worst.prompts) == ("keys", 1.0, 2)


def test_a_task_without_anomalies_has_flags():
    strata = {"normal_iid": ("all",) * 40, "normal_shift": ("keys", "slot") * 25}
    parts = {part: values for part, values in drawn(0).items() if part != "anomaly"}
    found = flags(Results((subject({"s": parts}, task="shift_only", strata=strata),)))
    assert {(flag.place.group, flag.place.stratum) for flag in found} == {
        ("normal_iid", "all"),
        ("normal_shift", "keys"),
        ("normal_shift", "slot"),
    }


def test_too_few_to_calibrate_on():
    with pytest.raises(ValueError, match=r"s on recall_redirect-3: alpha=0.01 needs at least 99"):
        flags(Results((subject({"s": drawn(0, groups=SIZES | {"calibration": 98})}),)))


def test_random_circuits_do_not_flag():
    parts = {Scorer("s", FOUND): drawn(0), Scorer("s", "random0"): drawn(1)}
    assert {flag.scorer for flag in flags(Results((subject(parts),)))} == {Scorer("s", FOUND)}
