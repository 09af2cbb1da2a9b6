"""The mask as it passed each size, and the one ranking of edges (or units) that follows.

A mask shrinks while it is trained, and its last state ranks the edges that are long gone badly.  So
the circuit is kept each time the expected number of edges passes a size of a ladder: as many edges
as that, the most probable ones.  An edge's score is higher the smaller the circuit is that it was
last part of; edges that were last part of the same one go by their probability in it.  Scores are
evenly spaced, from 1 for the best down to 0 for edges that were in none.

Shapes: `*E` the axes of a mask, [R, W, *S] of edges and [U, *S] of units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.discovery.masks.state import State
from circuits.mask_distribution import MaskDistribution
from circuits.selection import sizes
from circuits.space import Space

RUNGS = 49  # of the ladder


@dataclass(frozen=True)
class Snapshot:
    """A mask when it had so many edges."""

    edges: int
    mask: MaskDistribution

    def kept(self) -> Bool[Tensor, "*E"]:
        """Its most probable edges, ties in edge order; dead ends included."""
        return most_probable(self.mask.probabilities(), self.mask.space, self.edges)

    def connected(self) -> Bool[Tensor, "*E"]:
        """The same without dead ends."""
        return self.mask.space.without_dead_ends(self.kept())


def ladder(space: Space) -> tuple[int, ...]:
    """The sizes at which a mask is kept, from large to small; without that of all parts."""
    return tuple(size for size in sizes(space, RUNGS) if size < space.n_parts)[::-1]


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
    probabilities: Float[Tensor, "*E"], space: Space, count: int
) -> Bool[Tensor, "*E"]:
    """The edges of the highest probability, ties in edge order."""
    exists = space.exists
    best = probabilities[exists].sort(descending=True, stable=True).indices[:count]
    among = torch.zeros(space.n_parts, dtype=torch.bool)
    among[best] = True
    kept = torch.zeros_like(exists)
    kept[exists] = among
    return kept


def nested_scores(space: Space, snapshots: Sequence[Snapshot]) -> Float[Tensor, "*E"]:
    """The scores of edges by the smallest circuit that they are part of."""
    scores = torch.zeros(space.exists.shape)
    ranked = 0
    for snapshot in sorted(snapshots, key=lambda one: one.edges):
        new = snapshot.kept() & (scores == 0)
        order = snapshot.mask.probabilities()[new].argsort(descending=True, stable=True)
        values = torch.empty(len(order))
        values[order] = 1 - torch.arange(ranked, ranked + len(order)) / space.n_parts
        scores[new] = values
        ranked += len(order)
    return scores
