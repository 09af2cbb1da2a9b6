"""What a mask may act on: the gates of which an edge's share is made, or a unit's.

A *gate* is a number in [0, 1], shared by some edges; what an edge keeps is the product of its
gates.  A kind of gate is a tensor of them that broadcasts over the edges [R, W, *S]:

    edge      [R, W, *S]   one for each edge: what a reader takes from a writer
    writer    [1, W, *S]   one for each writer, shared by all of its outgoing edges
    unit      [U, *S]      one for each unit (`circuits.parts`), where the mask is over units

A mask over *edges* has the first kind, one over *nodes* the second, and Edge Pruning (Bhaskar et
al. 2024, arXiv 2406.16778) both: what readers read and what writers write.  One over *units* has
the last.

Shapes: writers W, readers R, units U; `*S` positions, where parts are told apart by position; `*B`
any leading axes; `*E` the axes of a mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from jaxtyping import Float
from torch import Tensor

from circuits.graph import Graph
from circuits.space import Space

Gates = Mapping[str, Tensor]  # values of gates by their kind

KINDS: Mapping[str, Callable[[Space], tuple[int, ...]]] = {
    "edge": lambda graph: tuple(graph.exists.shape),
    "writer": lambda graph: (1, *graph.exists.shape[1:]),
    "unit": lambda units: tuple(units.exists.shape),
}
OVER: Mapping[str, tuple[str, ...]] = {
    "edges": ("edge",),
    "nodes": ("writer",),
    "edges_and_nodes": ("edge", "writer"),
}
OVER_UNITS: Mapping[str, tuple[str, ...]] = {"units": ("unit",)}


def gate_shapes(space: Space, over: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the gates that a mask has, by what it is over.

    >>> gate_shapes(Graph(n_layers=1, n_heads=1), "edges_and_nodes")
    {'edge': (5, 3), 'writer': (1, 3)}

    Raises:
        ValueError: there is no such mask, or none of this graph or these units.
    """
    known = OVER if isinstance(space, Graph) else OVER_UNITS
    if over not in known:
        raise ValueError(f"over={over!r}, but a mask is over {', '.join(known)}")
    return {kind: KINDS[kind](space) for kind in known[over]}


def part_shares(gates: Gates, space: Space) -> Float[Tensor, "*B *E"]:
    """What each edge (or unit) keeps: the product of its gates, 0 for edges that cannot exist."""
    first = next(iter(gates.values()))
    return math.prod(gates.values(), start=space.exists.to(first))
