"""Calibration: from scores to split-conformal p-values, and the fitting of a calibrated detector.

    p(s) = (1 + #{calibration scores >= s}) / (n + 1)

(Vovk et al. 2005; Papadopoulos et al. 2002): on inputs that are exchangeable with the n calibration
inputs, which neither found nor tuned anything, P(p <= alpha) <= alpha for every alpha, at any n.

Shapes: calibration scores n, inputs B.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.prompts import Prompts
from mad.detector import Context, Detector
from mad.detectors import DETECTORS


@dataclass(frozen=True)
class Calibration:
    """Sorted scores of held-out trusted inputs."""

    scores: Float[Tensor, "n"]

    @classmethod
    def of(cls, scores: Float[Tensor, "n"]) -> Calibration:
        """Sorts the scores.

        Raises:
            ValueError: there are none, or some are not finite.
        """
        if not len(scores):
            raise ValueError(
                "0 calibration scores; give at least one trusted input to calibrate on"
            )
        if not torch.isfinite(scores).all():
            raise ValueError(
                "calibration scores are not finite; check the model's logits on the calibration "
                "inputs"
            )
        return cls(scores.double().sort().values)

    def p_values(self, scores: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """The conformal p-value of each score."""
        at_least = len(self.scores) - torch.searchsorted(self.scores, scores.double(), side="left")
        return (1 + at_least).double() / (len(self.scores) + 1)

    def threshold(self, alpha: float) -> float:
        """The largest calibration score that is not flagged at `alpha`: scores above it are."""
        most = math.floor(alpha * (len(self.scores) + 1) + 1e-9) - 1  # calibration scores >= s
        return self.scores[len(self.scores) - 1 - most].item()

    def problem(self, alpha: float) -> str | None:
        """Why `alpha` cannot be used, in one line; None when it can.

        Raises:
            ValueError: alpha is not between 0 and 1.
        """
        check_alpha(alpha)
        needed = math.ceil(1 / alpha - 1 - 1e-9)
        if len(self.scores) >= needed:
            return None
        return (
            f"alpha={alpha:g} needs at least {needed} calibration inputs, but there are "
            f"{len(self.scores)}: the smallest possible p-value is "
            f"{1 / (len(self.scores) + 1):.3g}; calibrate on more trusted inputs or raise alpha"
        )


def check_alpha(alpha: float) -> None:
    """Raises ValueError when alpha is no false-alarm rate."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha}, but it must be above 0 and under 1")


@dataclass(frozen=True)
class Calibrated:
    """A detector with its calibration; `about` names the trusted prompts of both."""

    detector: Detector
    calibration: Calibration
    about: Mapping[str, Any]

    def score(self, prompts: Prompts, *, memory: str = "2GB") -> Float[Tensor, "B"]:
        """How anomalous each prompt is; high = anomalous."""
        return self.detector.score(prompts, memory=memory)

    def p_values(self, prompts: Prompts, *, memory: str = "2GB") -> Float[Tensor, "B"]:
        """The conformal p-value of each prompt; low = anomalous."""
        return self.calibration.p_values(self.score(prompts, memory=memory))


def fit(
    config: Any,
    context: Context,
    trusted: Prompts,
    calibration: Prompts,
    *,
    used: Mapping[str, Prompts | Sequence[str]] | None = None,
    memory: str = "2GB",
) -> Calibrated:
    """Fits a detector on trusted prompts and calibrates it on others.

    >>> from circuits import Engine, load_model
    >>> from circuits.tasks import recall
    >>> from mad import MaxProbability
    >>> model = load_model("pkg://mad/models/recall_redirect")
    >>> prompts = model.prompts(recall.generate(recall.Recall(), 60, seed=0))
    >>> parts = prompts.split({"fit": 30, "calibration": 20, "new": 10}, seed=0)
    >>> context = Context(Engine(model))
    >>> fitted = fit(MaxProbability(), context, parts["fit"], parts["calibration"])
    >>> len(fitted.p_values(parts["new"]))
    10

    Args:
        config: the configuration of a detector, such as `Fast()`; its `name` picks it from
            `DETECTORS`.
        context: the model, and the circuit where the detector needs one.
        trusted: prompts to fit on.
        calibration: prompts to calibrate on, exchangeable with the normal inputs to come.
        used: the prompts that found or measured the circuit (or their `sequence_hashes`), by what
            they were used for; {} where no prompts were.  Needed when there is a circuit.
        memory: working memory beside the model's own weights, such as 500MB.

    Raises:
        ValueError: the sets overlap each other or those that the circuit was found or evaluated
            on, or it is not said which these were.
    """
    if shared := trusted.overlap(calibration):
        raise ValueError(
            f"{shared} prompts are in both the fit and the calibration split; they must be disjoint"
        )
    parts = {"fit": trusted, "calibration": calibration}
    if used is None and context.circuit is not None:
        raise ValueError(
            "used=None, but prompts that found or measured the circuit may not calibrate it: give "
            'used={"discovery": PROMPTS, "evaluation": PROMPTS}, or used={} if there were none'
        )
    _check_unused(parts, used or {})
    detector = DETECTORS[config.name].fit(config, context, trusted, memory=memory)
    scores = detector.score(calibration, memory=memory)
    about = {
        name: {"prompts": len(prompts), "hash": prompts.hash()} for name, prompts in parts.items()
    }
    return Calibrated(detector, Calibration.of(scores), about)


def _check_unused(
    parts: Mapping[str, Prompts], used: Mapping[str, Prompts | Sequence[str]]
) -> None:
    for name, prompts in parts.items():
        own = set(sequence_hashes(prompts))
        for split, others in used.items():
            hashes = sequence_hashes(others) if isinstance(others, Prompts) else others
            if shared := len(own.intersection(hashes)):
                raise ValueError(
                    f"{shared} prompts of the {name} split are in the circuit's {split} split; "
                    "they must be disjoint, or false alarms would not be bounded: give other "
                    "trusted prompts"
                )


def sequence_hashes(prompts: Prompts) -> list[str]:
    """A short hash of each clean token sequence: they find overlaps without keeping prompts."""
    return sorted(
        hashlib.sha256(" ".join(map(str, sequence)).encode()).hexdigest()[:16]
        for sequence in prompts.sequences()
    )
