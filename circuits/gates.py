"""What a mask may act on: the gates of which an edge's share is made.

A *gate* is a number in [0, 1], shared by some edges; what an edge keeps is the product of its
gates.  A kind of gate is a tensor of them that broadcasts over the edges [R, W, *S]:

    edge      [R, W, *S]   one for each edge: what a reader takes from a writer
    writer    [1, W, *S]   one for each writer, shared by all of its outgoing edges

A mask over *edges* has the first kind, one over *nodes* the second, and Edge Pruning (Bhaskar et
al. 2024, arXiv 2406.16778) both: what readers read and what writers write.

Shapes: writers W, readers R; `*S` positions, where the graph tells edges apart by position; `*B`
any leading axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from jaxtyping import Float
from torch import Tensor

from circuits.graph import Graph

Gates = Mapping[str, Tensor]  # values of gates by their kind

KINDS: Mapping[str, Callable[[Graph], tuple[int, ...]]] = {
    "edge": lambda graph: tuple(graph.exists.shape),
    "writer": lambda graph: (1, *graph.exists.shape[1:]),
}
OVER: Mapping[str, tuple[str, ...]] = {
    "edges": ("edge",),
    "nodes": ("writer",),
    "edges_and_nodes": ("edge", "writer"),
}


def gate_shapes(graph: Graph, over: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the gates that a mask over some units has.

    >>> gate_shapes(Graph(n_layers=1, n_heads=1), "edges_and_nodes")
    {'edge': (5, 3), 'writer': (1, 3)}

    Raises:
        ValueError: there are no such units.
    """
    if over not in OVER:
        raise ValueError(f"over={over!r}, but a mask is over {', '.join(OVER)}")
    return {kind: KINDS[kind](graph) for kind in OVER[over]}


def edge_shares(gates: Gates, graph: Graph) -> Float[Tensor, "*B R W *S"]:
    """What each edge keeps: the product of its gates, 0 for edges that cannot exist."""
    first = next(iter(gates.values()))
    return math.prod(gates.values(), start=graph.exists.to(first))
