"""Discovery: algorithms that find which edges matter.  `METHODS` names them.

Each takes its configuration and a `Objective`, and returns a `Found`.
"""

from circuits.discovery.acdc import ACDC, acdc
from circuits.discovery.attribution import EAP, EAPIG, eap, eap_ig
from circuits.discovery.found import Found

METHODS = {"acdc": (ACDC, acdc), "eap": (EAP, eap), "eap_ig": (EAPIG, eap_ig)}

__all__ = ["ACDC", "EAP", "EAPIG", "METHODS", "Found", "acdc", "eap", "eap_ig"]
