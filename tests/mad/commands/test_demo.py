"""The demonstration's table is what the benchmark says of its scores."""

from __future__ import annotations

import pytest
import torch

from mad.benchmark.auroc import auroc
from mad.benchmark.results import Scorer, Scores
from mad.commands.demo import table_rows


def test_rows_by_hand():
    groups = {
        "normal_iid": torch.tensor([1.0, 2.0, 30.0]),
        "normal_shift": torch.tensor([3.0, 19.5]),
        "anomaly": torch.tensor([20.0, 25.0, 0.0, 19.5]),
    }
    parts = {"calibration": torch.arange(1.0, 20.0), **groups}
    strata = {group: [group] * len(groups[group]) for group in ("normal_iid", "normal_shift")}
    strata["anomaly"] = ["agree", "disagree", "agree", "agree"]
    subject = Scores("made_up", 0, strata, {}, {Scorer("b"): parts, Scorer("a"): parts})
    first, second = table_rows(subject, alpha=0.05)
    assert (first["detector"], second["detector"]) == ("b", "a")
    assert first["auroc"] == {
        group: auroc(groups[group], groups["anomaly"]) for group in ("normal_iid", "normal_shift")
    }
    assert first["auroc"]["normal_shift"] == 5.5 / 8
    assert first["flagged"] == pytest.approx(
        {
            "normal_iid": 1 / 3,
            "normal_shift": 0.5,
            "anomaly": 0.75,
            "agree": 2 / 3,
            "disagree": 1.0,
        }
    )
    with pytest.raises(ValueError, match="alpha=0.01 needs at least 99"):
        table_rows(subject, alpha=0.01)
