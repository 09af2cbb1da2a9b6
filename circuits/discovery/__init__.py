"""Discovery: algorithms that find which edges matter.  `METHODS` names them."""

from typing import Any

from circuits.discovery.acdc import ACDC, acdc
from circuits.discovery.atp_star import AtPStar, atp_star
from circuits.discovery.attribution import (
    EAP,
    EAPIG,
    CleanCorrupt,
    EAPIGActivations,
    clean_corrupt,
    eap,
    eap_ig,
    eap_ig_activations,
)
from circuits.discovery.edge_pruning import EdgePruning, edge_pruning
from circuits.discovery.exact import Exact, exact
from circuits.discovery.information_flow import InformationFlow, information_flow
from circuits.discovery.method import Found, Method
from circuits.discovery.over_units import acdc_units, attribution_units
from circuits.discovery.subnetwork_probing import (
    SubnetworkProbing,
    subnetwork_probing,
    subnetwork_probing_units,
)
from circuits.discovery.ugs import UGS, ugs, ugs_units

METHODS = {
    "acdc": Method(ACDC, acdc, decides=True, over_units=acdc_units),
    "eap": Method(EAP, eap, needs_slope=True, estimates=True, over_units=attribution_units),
    "clean_corrupt": Method(
        CleanCorrupt, clean_corrupt, estimates=True, over_units=attribution_units
    ),
    "eap_ig": Method(EAPIG, eap_ig, estimates=True, over_units=attribution_units),
    "eap_ig_activations": Method(EAPIGActivations, eap_ig_activations, estimates=True),
    "atp_star": Method(AtPStar, atp_star, needs_slope=True, estimates=True),
    "information_flow": Method(InformationFlow, information_flow, estimates=True),
    "exact": Method(Exact, exact, over_units=exact),
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
    "AtPStar",
    "CleanCorrupt",
    "EAPIGActivations",
    "EdgePruning",
    "Exact",
    "Found",
    "InformationFlow",
    "Method",
    "SubnetworkProbing",
    "acdc",
    "acdc_units",
    "atp_star",
    "attribution_units",
    "clean_corrupt",
    "decides",
    "default_metric",
    "eap",
    "eap_ig",
    "eap_ig_activations",
    "edge_pruning",
    "exact",
    "information_flow",
    "subnetwork_probing",
    "subnetwork_probing_units",
    "ugs",
    "ugs_units",
]
