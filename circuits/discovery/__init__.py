"""Discovery: algorithms that find which edges matter.  `METHODS` names them."""

from typing import Any

from circuits.discovery.acdc import ACDC, acdc
from circuits.discovery.attribution import EAP, EAPIG, eap, eap_ig
from circuits.discovery.edge_pruning import EdgePruning, edge_pruning
from circuits.discovery.method import Found, Method
from circuits.discovery.over_units import acdc_units, eap_ig_units, eap_units, exact_units
from circuits.discovery.subnetwork_probing import (
    SubnetworkProbing,
    subnetwork_probing,
    subnetwork_probing_units,
)
from circuits.discovery.ugs import UGS, ugs, ugs_units

METHODS = {
    "acdc": Method(ACDC, acdc, decides=True, over_units=acdc_units),
    "eap": Method(EAP, eap, needs_slope=True, over_units=eap_units),
    "eap_ig": Method(EAPIG, eap_ig, over_units=eap_ig_units),
    "edge_pruning": Method(EdgePruning, edge_pruning),
    "subnetwork_probing": Method(
        SubnetworkProbing, subnetwork_probing, over_units=subnetwork_probing_units
    ),
    "ugs": Method(UGS, ugs, over_units=ugs_units),
}


def default_metric(method: str) -> str:
    """The metric that a method goes by where none is named: KL, or logit_diff if it needs a slope.

    >>> default_metric("acdc"), default_metric("eap")
    ('kl', 'logit_diff')
    """
    return "logit_diff" if METHODS[method].needs_slope else "kl"


def decides(config: Any) -> bool:
    """Whether a method, as configured, decides itself which edges to keep.

    >>> decides(ACDC()), decides(UGS()), decides(UGS(edges=40))
    (True, False, True)
    """
    return METHODS[config.name].decides or getattr(config, "decides", False)


__all__ = [
    "ACDC",
    "EAP",
    "EAPIG",
    "METHODS",
    "UGS",
    "EdgePruning",
    "Found",
    "Method",
    "SubnetworkProbing",
    "acdc",
    "acdc_units",
    "decides",
    "default_metric",
    "eap",
    "eap_ig",
    "eap_ig_units",
    "eap_units",
    "edge_pruning",
    "exact_units",
    "subnetwork_probing",
    "subnetwork_probing_units",
    "ugs",
    "ugs_units",
]
