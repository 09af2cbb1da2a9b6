"""Is this input handled by the trusted mechanism?

    detector = mad.fit(mad.Fast(), mad.Context(engine, circuit), trusted, calibration, used=...)
    detector.p_values(prompts)                      how anomalous each prompt is; low = anomalous
    done = mad.make_run(mad.RunConfig(...))         circuit and detector in a folder
    mad.score(inputs, out, detector, model)         a file of inputs, line by line

Names are imported on first use, so that the command line answers before torch is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from circuits.lazy import lazy

if TYPE_CHECKING:
    from mad.calibration import Calibrated as Calibrated
    from mad.calibration import Calibration as Calibration
    from mad.calibration import fit as fit
    from mad.detector import Context as Context
    from mad.detector import Detector as Detector
    from mad.detectors import DETECTORS as DETECTORS
    from mad.detectors import AttributionMahalanobis as AttributionMahalanobis
    from mad.detectors import Deviation as Deviation
    from mad.detectors import Effects as Effects
    from mad.detectors import Fast as Fast
    from mad.detectors import FineTuned as FineTuned
    from mad.detectors import Mahalanobis as Mahalanobis
    from mad.detectors import MaxProbability as MaxProbability
    from mad.detectors import Nodes as Nodes
    from mad.detectors import Routing as Routing
    from mad.detectors import Strict as Strict
    from mad.detectors import TokenCount as TokenCount
    from mad.folder import open_run as open_run
    from mad.pipeline import RunConfig as RunConfig
    from mad.pipeline import make_run as make_run
    from mad.pipeline import make_unit_run as make_unit_run
    from mad.scoring import Scoring as Scoring
    from mad.scoring import score as score
    from mad.tasks import ANOMALY_TASKS as ANOMALY_TASKS

_WHERE = {
    "ANOMALY_TASKS": "mad.tasks",
    "AttributionMahalanobis": "mad.detectors",
    "Calibrated": "mad.calibration",
    "Calibration": "mad.calibration",
    "Context": "mad.detector",
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
    "fit": "mad.calibration",
    "make_run": "mad.pipeline",
    "make_unit_run": "mad.pipeline",
    "open_run": "mad.folder",
    "score": "mad.scoring",
}

__getattr__, __dir__ = lazy(__name__, _WHERE)
