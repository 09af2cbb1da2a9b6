"""Uniform gradient sampling: a mask over edges or units whose gates have a gradient as often as is
useful (Li and Janson 2024, arXiv 2409.09951).

A gate is strictly between 0 and 1, where it has a gradient, with probability p (1 - p): most often
where it is least decided.  The paper's ablation is the optimal one (ablation=optimal), whose
constants are trained along with the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

from circuits.discovery.masks.settings import MaskTraining
from circuits.discovery.masks.training import train
from circuits.discovery.method import Found
from circuits.objective import Objective


@dataclass
class UGS(MaskTraining):
    """Uniform gradient sampling: one gate for each edge, or unit (Li and Janson 2024)."""

    name: str = "ugs"


def ugs(config: UGS, objective: Objective) -> Found:
    """Returns the ranking of a mask over edges; ValueError as `train`."""
    return train(config, objective, "edges", "window")


def ugs_units(config: UGS, objective: Objective) -> Found:
    """Returns the ranking of a mask over units; ValueError as `train`."""
    return train(config, objective, "units", "window")
