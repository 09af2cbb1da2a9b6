"""Is this input handled by the trusted mechanism?

The names below are imported on first use, so that the command line answers before torch is loaded.
"""

from __future__ import annotations

from circuits.lazy import lazy

_WHERE = {
    "Calibration": "mad.detector",
    "Context": "mad.detector",
    "DETECTORS": "mad.detectors",
    "Deviation": "mad.detectors",
    "Fast": "mad.detectors",
    "Mahalanobis": "mad.detectors",
    "MaxProbability": "mad.detectors",
    "RunConfig": "mad.pipeline",
    "Scoring": "mad.scoring",
    "Strict": "mad.detectors",
    "compare": "mad.benchmark.compare",
    "fit": "mad.calibration",
    "make_run": "mad.pipeline",
    "open_run": "mad.pipeline",
    "score": "mad.scoring",
}

__all__ = list(_WHERE)  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__ = lazy(__name__, _WHERE)
