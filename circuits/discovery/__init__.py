"""Discovery: algorithms that find which edges matter.  `METHODS` names them."""

from circuits.discovery.acdc import ACDC, acdc
from circuits.discovery.attribution import EAP, EAPIG, eap, eap_ig
from circuits.discovery.method import Found, Method

METHODS = {
    "acdc": Method(ACDC, acdc, decides=True),
    "eap": Method(EAP, eap, needs_slope=True),
    "eap_ig": Method(EAPIG, eap_ig),
}

__all__ = ["ACDC", "EAP", "EAPIG", "METHODS", "Found", "Method", "acdc", "eap", "eap_ig"]
