"""Is this input handled by the trusted mechanism?

The names below are imported on first use, so that the command line answers before torch is loaded.
"""

from __future__ import annotations

from circuits.lazy import lazy

_WHERE = {
    "Calibrated": "mad.calibration",
    "Calibration": "mad.calibration",
    "Context": "mad.detector",
    "AttributionMahalanobis": "mad.detectors",
    "DETECTORS": "mad.detectors",
    "Detector": "mad.detector",
    "Deviation": "mad.detectors",
    "Effects": "mad.detectors",
    "Fast": "mad.detectors",
    "FineTuned": "mad.detectors",
    "Mahalanobis": "mad.detectors",
    "MaxProbability": "mad.detectors",
    "Nodes": "mad.detectors",
    "Routing": "mad.detectors",
    "RunConfig": "mad.pipeline",
    "Scoring": "mad.scoring",
    "Strict": "mad.detectors",
    "TokenCount": "mad.detectors",
    "compare": "mad.benchmark.compare",
    "fit": "mad.calibration",
    "make_run": "mad.pipeline",
    "open_run": "mad.pipeline",
    "score": "mad.scoring",
}

__all__ = list(_WHERE)  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__ = lazy(__name__, _WHERE)
