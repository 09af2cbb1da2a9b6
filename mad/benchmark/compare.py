"""Compares calibrated detectors on groups of inputs: AUROC of anomalies against each group of
normals, and who is flagged.

Two groups of normals are told apart: `normal_iid`, which are like the trusted prompts, and
`normal_shift`, which are new too and must not be flagged.

Shapes: inputs B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Bool, Float
from torch import Tensor

from circuits.prompts import Prompts
from mad.benchmark.auroc import auroc, roc_curve
from mad.benchmark.flags import flagged, share
from mad.benchmark.results import ANOMALY, TITLES
from mad.benchmark.roc import RocCurve
from mad.calibration import Calibrated, Calibration


@dataclass(frozen=True)
class Comparison:
    """One detector's result on `normal_iid`, `normal_shift` (or one of them) and `anomaly`."""

    name: str
    scores: Mapping[str, Float[Tensor, "B"]]  # by group
    calibration: Calibration
    alpha: float

    @cached_property
    def auroc(self) -> dict[str, float]:
        """AUROC of all anomalies, by group of normals."""
        return {
            group: auroc(self.scores[group], self.scores[ANOMALY])
            for group in TITLES
            if group in self.scores
        }

    @cached_property
    def hits(self) -> dict[str, Bool[Tensor, "B"]]:
        """Which inputs of each group are flagged at alpha."""
        return {
            group: flagged(self.calibration, scores, self.alpha)
            for group, scores in self.scores.items()
        }

    @cached_property
    def flagged(self) -> dict[str, float]:
        """The share of each group that is flagged."""
        return {group: share(hits) for group, hits in self.hits.items()}

    @property
    def roc_curves(self) -> list[RocCurve]:
        """The ROC curve against each group of normals."""
        return [
            roc_curve(self.name, TITLES[group], self.scores[group], self.scores[ANOMALY])
            for group in self.auroc
        ]


def compare(
    name: str,
    calibrated: Calibrated,
    groups: Mapping[str, Prompts],
    alpha: float,
    *,
    memory: str = "2GB",
) -> Comparison:
    """Scores groups of inputs by a detector.

    Raises:
        ValueError: no anomalies, or alpha is too small for the calibration.
    """
    if ANOMALY not in groups:
        raise ValueError(f"no group {ANOMALY!r} among {', '.join(groups)}")
    if problem := calibrated.calibration.problem(alpha):
        raise ValueError(problem)
    scores = {group: calibrated.score(prompts, memory=memory) for group, prompts in groups.items()}
    return Comparison(name, scores, calibrated.calibration, alpha)
