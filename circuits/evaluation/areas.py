"""Faithfulness at MIB's ten sizes, and the areas over them.

    CPR = integral of f(p) dp           edges ranked by score: what supports the behaviour first
    CMD = integral of |1 - f(p)| dp     edges ranked by |score|

by the trapezoidal rule over shares p of all edges from .001 to 1, where f(1) = 1 (Mueller et al.
2025, arXiv 2504.13151).  A perfect CPR is .999 and a perfect CMD 0.  Half of either comes from
p > .5, which no circuit has; over log p, divided by log 1000, each decade weighs the same, and
perfect is 1 and 0.

Where a metric cannot get better than at the model (kl), signs of scores carry nothing: both go by
|score| then, and say so.

Shapes: sizes Z, draws of prompts D.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.circuit import Circuit
from circuits.files import restored
from circuits.metrics import metric_named
from circuits.parts.circuit import UnitCircuit
from circuits.selection import Ranking, Selection, ranking
from circuits.space import Space

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Rankings:
    """The orders in which circuits of other sizes take their edges: by score and by |score|."""

    signed: Ranking
    absolute: Ranking
    own: Ranking  # whichever of the two the circuit was selected by


def rankings_of(circuit: Circuit | UnitCircuit) -> Rankings:
    """Returns both orders of a circuit's edges; without signs that mean something, both by |score|.

    Raises:
        ValueError: the circuit's word on its metric or selection makes no sense.
    """
    graph, scores, about = circuit.space, circuit.scores, circuit.about
    told = restored(Selection, about.get("selection") or {}, "selection of the circuit")
    how = "greedy" if told.how == "threshold" else told.how
    decided = "method" in about and about.get("selection") is None
    flat = "metric" in about and metric_named(circuit.says("metric")).flat_at_model
    by_size = ranking(graph, scores, how=how, absolute=True)
    if flat and not decided and told.absolute:
        return Rankings(by_size, by_size, by_size)
    by_sign = ranking(graph, scores, how=how)
    own = by_size if told.absolute else by_sign
    return Rankings(by_size if flat and not decided else by_sign, by_size, own)


def edges_at(graph: Space) -> list[int]:
    """How many edges (or units) MIB's ten sizes are, rounded down.

    >>> from circuits.graph import Graph
    >>> edges_at(Graph(n_layers=2, n_heads=4))
    [0, 0, 0, 1, 2, 5, 11, 22, 55, 110]
    """
    return [int(share * graph.n_parts + 1e-9) for share in SHARES]


def area(values: Float[Tensor, "Z *D"], *, log: bool = False) -> Float[Tensor, "*D"]:
    """Returns the area under values at the ten sizes, over p or over log p.

    >>> round(area(torch.ones(10)).item(), 6), round(area(torch.ones(10), log=True).item(), 6)
    (0.999, 1.0)
    """
    shares = torch.tensor(SHARES, dtype=torch.float64)
    at = shares.log() / math.log(SHARES[-1] / SHARES[0]) if log else shares
    return torch.trapezoid(values.double(), at, dim=0)


def areas(
    signed: Float[Tensor, "Z *D"], absolute: Float[Tensor, "Z *D"]
) -> dict[str, Float[Tensor, "*D"]]:
    """Returns CPR by the signed ranking, CMD by the absolute one; linear and log."""
    apart = (1 - absolute).abs()
    return {
        "cpr": area(signed),
        "cmd": area(apart),
        "cpr_log": area(signed, log=True),
        "cmd_log": area(apart, log=True),
    }
