"""Detectors by name: (configuration, fit, restore).  See `mad.detector` for the protocol."""

from __future__ import annotations

from collections.abc import Callable

from mad.detector import Detector
from mad.detectors.baselines import (
    Mahalanobis,
    MaxProbability,
    fit_mahalanobis,
    fit_max_probability,
    restore_mahalanobis,
    restore_max_probability,
)
from mad.detectors.circuit import Deviation, fit_deviation, restore_deviation
from mad.detectors.transplant import Fast, Strict, fit_transplant, restore_transplant

DETECTORS: dict[str, tuple[type, Callable[..., Detector], Callable[..., Detector]]] = {
    "fast": (Fast, fit_transplant, restore_transplant),
    "strict": (Strict, fit_transplant, restore_transplant),
    "deviation": (Deviation, fit_deviation, restore_deviation),
    "max_probability": (MaxProbability, fit_max_probability, restore_max_probability),
    "mahalanobis": (Mahalanobis, fit_mahalanobis, restore_mahalanobis),
}
