"""A comparison says what the benchmark's own functions say of the scores."""

from __future__ import annotations

import pytest
import torch

from circuits.prompts import Prompts
from mad.benchmark.auroc import auroc
from mad.benchmark.compare import Comparison, compare
from mad.calibration import Calibrated, Calibration

SCORES = {
    "normal_iid": torch.tensor([1.0, 2.0, 30.0]),
    "normal_shift": torch.tensor([3.0, 19.5]),
    "anomaly": torch.tensor([20.0, 25.0, 0.0, 19.5]),
}
CALIBRATION = Calibration.of(torch.arange(1.0, 20.0))


def test_comparison_by_hand():
    made = Comparison("made up", SCORES, CALIBRATION, alpha=0.05)
    assert made.auroc == {
        group: auroc(SCORES[group], SCORES["anomaly"]) for group in ("normal_iid", "normal_shift")
    }
    assert made.auroc["normal_shift"] == 5.5 / 8
    assert made.hits["anomaly"].tolist() == [True, True, False, True]
    assert made.flagged == {"normal_iid": 1 / 3, "normal_shift": 0.5, "anomaly": 0.75}
    assert [curve.group for curve in made.roc_curves] == ["in distribution", "shifted normals"]
    assert [curve.auroc for curve in made.roc_curves] == [*made.auroc.values()]


class FirstToken:
    """A detector by the first token's number."""

    config, circuit, scores_under = None, None, None

    def score(self, prompts: Prompts, *, memory: str = "2GB") -> torch.Tensor:
        return prompts.clean[:, 0].float()

    def state(self) -> dict[str, torch.Tensor]:
        return {}


def test_a_detector_is_compared_by_its_scores():
    """One group of normals may be absent."""
    groups = {
        "normal_shift": Prompts.from_tokens(torch.tensor([[1], [2]])),
        "anomaly": Prompts.from_tokens(torch.tensor([[5]])),
    }
    made = compare("token", Calibrated(FirstToken(), CALIBRATION, {}), groups, alpha=0.05)
    assert made.auroc == {"normal_shift": 1.0}
    assert made.scores["normal_shift"].tolist() == [1.0, 2.0]


def test_comparisons_are_refused():
    prompts = Prompts.from_tokens(torch.tensor([[1]]))
    detector = Calibrated(FirstToken(), CALIBRATION, {})
    with pytest.raises(ValueError, match="no group 'anomaly' among normal_iid"):
        compare("a", detector, {"normal_iid": prompts}, alpha=0.05)
    with pytest.raises(ValueError, match="alpha=0.01 needs at least 99"):
        compare("a", detector, {"anomaly": prompts}, alpha=0.01)
