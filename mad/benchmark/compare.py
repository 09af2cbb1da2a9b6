"""Compares detectors on groups of inputs: AUROC of anomalies against each group of normals, and who
is flagged.

Two regimes are told apart: *in distribution*, where normals look like the trusted ones, and
*shifted*, where normals are new too and must not be flagged.

Shapes: inputs B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.prompts import Prompts
from mad.calibration import Calibrated
from mad.detector import Detector

REGIMES = {"normal_iid": "in distribution", "normal_shift": "shifted normals"}
ANOMALY = "anomaly"


@dataclass(frozen=True)
class Comparison:
    """One detector's result."""

    name: str
    auroc: Mapping[str, float]  # by group of normals
    flagged: Mapping[str, float] | None  # share of each group at alpha; None: not calibrated
    scores: Mapping[str, Float[Tensor, "B"]]  # by group
    hits: Bool[Tensor, "B"] | None = None  # which anomalies are flagged


def score_groups(
    detector: Detector, groups: Mapping[str, Prompts], *, memory: str = "2GB"
) -> dict[str, Tensor]:
    """A detector's scores on each group."""
    return {name: detector.score(prompts, memory=memory) for name, prompts in groups.items()}


def auroc(normal: Float[Tensor, "B"], anomalous: Float[Tensor, "N"]) -> float:
    """The share of (normal, anomalous) pairs in which the anomalous one scores higher, ties counted
    half.
    """
    from sklearn.metrics import roc_auc_score

    labels = [0] * len(normal) + [1] * len(anomalous)
    return float(roc_auc_score(labels, torch.cat([normal, anomalous]).numpy()))


def compare(
    name: str,
    detector: Calibrated | Detector,
    groups: Mapping[str, Prompts],
    alpha: float,
    *,
    memory: str = "2GB",
) -> Comparison:
    """One detector on groups `normal_iid`, `normal_shift` (either may be absent) and `anomaly`.

    Raises:
        ValueError: no anomalies, or alpha is too small for the calibration.
    """
    if ANOMALY not in groups:
        raise ValueError(f"no group {ANOMALY!r} among {', '.join(groups)}")
    calibration = detector.calibration if isinstance(detector, Calibrated) else None
    if calibration is not None and (problem := calibration.problem(alpha)):
        raise ValueError(problem)
    scores = score_groups(
        detector.detector if isinstance(detector, Calibrated) else detector, groups, memory=memory
    )
    flagged = hits = None
    if calibration is not None:
        by_group = {
            group: calibration.p_values(values) <= alpha for group, values in scores.items()
        }
        flagged, hits = (
            {group: hit.double().mean().item() for group, hit in by_group.items()},
            by_group[ANOMALY],
        )
    separated = {
        group: auroc(scores[group], scores[ANOMALY]) for group in REGIMES if group in scores
    }
    return Comparison(name, separated, flagged, scores, hits)


def roc_curves(comparisons: list[Comparison]) -> list[Any]:
    """The ROC curve of each detector in each regime, for `mad.benchmark.roc.draw_roc`."""
    from sklearn.metrics import roc_curve

    from mad.benchmark.roc import RocCurve

    curves = []
    for comparison in comparisons:
        for group, value in comparison.auroc.items():
            normal, anomalous = comparison.scores[group], comparison.scores[ANOMALY]
            labels = [0] * len(normal) + [1] * len(anomalous)
            false, true, _ = roc_curve(labels, torch.cat([normal, anomalous]).numpy())
            curves.append(
                RocCurve(comparison.name, false.tolist(), true.tolist(), value, REGIMES[group])
            )
    return curves
