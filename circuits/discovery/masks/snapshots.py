"""The mask as it passed each size, and the one ranking of edges that follows.

A mask shrinks while it is trained, and its last state ranks the edges that are long gone badly.  So
the circuit is kept each time the expected number of edges passes a size of a ladder: as many edges
as that, the most probable ones.  An edge's score is higher the smaller the circuit is that it was
last part of; edges that were last part of the same one go by their probability in it.  Scores are
evenly spaced, from 1 for the best down to 0 for edges that were in none.

Shapes: writers W, readers R; `*S` positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.discovery.masks.state import State
from circuits.graph import Graph
from circuits.mask_distribution import MaskDistribution
from circuits.selection import sizes

RUNGS = 49  # of the ladder


@dataclass(frozen=True)
class Snapshot:
    """A mask when it had so many edges."""

    edges: int
    mask: MaskDistribution

    def kept(self) -> Bool[Tensor, "R W *S"]:
        """Its most probable edges, ties in edge order; dead ends included."""
        return most_probable(self.mask.probabilities(), self.mask.graph, self.edges)

    def connected(self) -> Bool[Tensor, "R W *S"]:
        """The same without dead ends."""
        return self.mask.graph.without_dead_ends(self.kept())


def ladder(graph: Graph) -> tuple[int, ...]:
    """The sizes at which a mask is kept, from large to small; without the whole graph."""
    return tuple(size for size in sizes(graph, RUNGS) if size < graph.n_edges)[::-1]


def pass_rungs(state: State, rungs: Sequence[int], edges: float) -> None:
    """Keeps the mask, which is expected to have so many edges, for each size that it has passed."""
    passed = [rung for rung in rungs if rung >= edges and rung not in state.rungs]
    if passed:
        state.rungs |= dict.fromkeys(passed, state.held())


def trained(snapshots: Sequence[Snapshot]) -> Callable[[int], MaskDistribution]:
    """The mask from which a circuit of so many edges was taken: the smallest that had as many."""
    rising = sorted(snapshots, key=lambda one: one.edges)

    def of(edges: int) -> MaskDistribution:
        return next((one.mask for one in rising if one.edges >= edges), rising[-1].mask)

    return of


def most_probable(
    probabilities: Float[Tensor, "R W *S"], graph: Graph, count: int
) -> Bool[Tensor, "R W *S"]:
    """The edges of the highest probability, ties in edge order."""
    exists = graph.exists
    best = probabilities[exists].sort(descending=True, stable=True).indices[:count]
    among = torch.zeros(graph.n_edges, dtype=torch.bool)
    among[best] = True
    kept = torch.zeros_like(exists)
    kept[exists] = among
    return kept


def nested_scores(graph: Graph, snapshots: Sequence[Snapshot]) -> Float[Tensor, "R W *S"]:
    """The scores of edges by the smallest circuit that they are part of."""
    scores = torch.zeros(graph.exists.shape)
    ranked = 0
    for snapshot in sorted(snapshots, key=lambda one: one.edges):
        new = snapshot.kept() & (scores == 0)
        order = snapshot.mask.probabilities()[new].argsort(descending=True, stable=True)
        values = torch.empty(len(order))
        values[order] = 1 - torch.arange(ranked, ranked + len(order)) / graph.n_edges
        scores[new] = values
        ranked += len(order)
    return scores
