"""Subnetwork probing: a mask over edges, nodes or units (Cao et al. 2021, arXiv 2104.03514).

The paper masks weights and probes what is left; over the edges, nodes or units of a circuit it is
the simplest learned mask: hard concrete gates, and a price of what is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from circuits.discovery.masks.settings import MaskTraining
from circuits.discovery.masks.training import train
from circuits.discovery.method import Found
from circuits.objective import Objective

OVER = ("edges", "nodes")


@dataclass
class SubnetworkProbing(MaskTraining):
    """Subnetwork probing: one gate for each edge, or for each node (Cao et al. 2021)."""

    name: str = "subnetwork_probing"
    over: str = "edges"  # edges, or nodes: a node keeps all of its outgoing edges or none


def subnetwork_probing_units(config: SubnetworkProbing, objective: Objective) -> Found:
    """Returns the ranking of a mask over units; ValueError as `train`, or for over=nodes."""
    if config.over != "edges":
        raise ValueError(
            f"method.over={config.over!r} is for circuits of edges; leave it out, and say "
            "units=nodes"
        )
    return train(config, objective, "units", "hard_concrete")


def subnetwork_probing(config: SubnetworkProbing, objective: Objective) -> Found:
    """Returns the ranking of a mask over edges or nodes; ValueError as `train`."""
    if config.over not in OVER:
        raise ValueError(f"method.over={config.over!r}, but it must be {' or '.join(OVER)}")
    return train(config, objective, config.over, "hard_concrete")
