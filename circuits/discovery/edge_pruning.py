"""Edge Pruning: a mask over what readers read and what writers write (Bhaskar et al. 2024, arXiv
2406.16778).

Each edge has a gate of its own and each writer one for all of its outgoing edges; an edge keeps the
product of the two.  Gates are hard concrete variables, and a Lagrangian steers the number of edges.
"""

from __future__ import annotations

from dataclasses import dataclass

from circuits.discovery.masks.settings import MaskTraining
from circuits.discovery.masks.training import train
from circuits.discovery.method import Found
from circuits.objective import Objective


@dataclass
class EdgePruning(MaskTraining):
    """Edge Pruning: gates of edges and of writers, steered to a size (Bhaskar et al. 2024)."""

    name: str = "edge_pruning"
    initial: float = 2.0  # theta of every gate: an edge has two, open with probability .88 each


def edge_pruning(config: EdgePruning, objective: Objective) -> Found:
    """Returns the ranking of a mask over edges and writers; ValueError as `train`."""
    return train(config, objective, "edges_and_nodes", "hard_concrete")
