"""Detectors by name.  See `mad.detector` for what one is."""

from __future__ import annotations

from mad.detector import DetectorKind
from mad.detectors.attribution import ATTRIBUTION_MAHALANOBIS, AttributionMahalanobis
from mad.detectors.edge_effects import EFFECTS, Effects
from mad.detectors.fine_tuned import FineTuned, fit_fine_tuned, restore_fine_tuned
from mad.detectors.mahalanobis import Mahalanobis, fit_mahalanobis, restore_mahalanobis
from mad.detectors.max_probability import MAX_PROBABILITY, MaxProbability
from mad.detectors.node_deviation import NODES, Nodes
from mad.detectors.output_deviation import Deviation, fit_deviation, restore_deviation
from mad.detectors.routing import ROUTING, Routing
from mad.detectors.token_count import TOKEN_COUNT, TokenCount
from mad.detectors.transplant import Fast, Strict, fit_transplant, restore_transplant

DETECTORS: dict[str, DetectorKind] = {
    "fast": DetectorKind(Fast, fit_transplant, restore_transplant),
    "strict": DetectorKind(Strict, fit_transplant, restore_transplant),
    "deviation": DetectorKind(Deviation, fit_deviation, restore_deviation),
    "nodes": NODES,
    "routing": ROUTING,
    "effects": EFFECTS,
    "mahalanobis": DetectorKind(Mahalanobis, fit_mahalanobis, restore_mahalanobis),
    "attribution_mahalanobis": ATTRIBUTION_MAHALANOBIS,
    "fine_tuned_kl": DetectorKind(FineTuned, fit_fine_tuned, restore_fine_tuned),
    "max_probability": MAX_PROBABILITY,
    "token_count": TOKEN_COUNT,
}

__all__ = [
    "DETECTORS",
    "AttributionMahalanobis",
    "Deviation",
    "Effects",
    "Fast",
    "FineTuned",
    "Mahalanobis",
    "MaxProbability",
    "Nodes",
    "Routing",
    "Strict",
    "TokenCount",
]
