"""Circuits that lack some edges of the present one, and which nodes they reach.

A node is reached where any candidate takes an edge from one of its readers, or where one of its
readers keeps an edge to a node that is reached.  With post-norms a layer's heads are reached
together, and also where one of them is no longer read.

Shapes: candidates K, edges removed by any of them E, readers R, writers W; `*S` positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.engine.live_nodes import Needed, needed
from circuits.graph import Graph

Edge = tuple[int, ...]  # reader, writer and, where edges are told apart by it, position


@dataclass(frozen=True)
class Step:
    """Some heads of a block, or its MLP, that are run together."""

    layer: int
    heads: list[int]  # none: the MLP
    everywhere: bool  # at all positions, or only where it is scored
    writers: list[int]


class Present:
    """A circuit, and what its edges leave needed."""

    def __init__(
        self, graph: Graph, kept: Bool[np.ndarray, "R W *S"], normed_together: frozenset[int]
    ) -> None:
        """Takes the kept edges, and the layers whose heads share a post-norm."""
        self.graph, self.kept, self.normed_together = graph, kept, normed_together
        self.by_reader = np.logical_or.reduce(kept.reshape(*kept.shape[:2], -1), 2)  # [R, W]
        self.needed: Needed = needed(graph, self.by_reader, normed_together)
        # which writers are read; only post-norms ask
        self.read = graph.read(torch.from_numpy(kept)[None])[0] if normed_together else None

    def without(self, edges: Sequence[Edge]) -> Present:
        """The circuit without some of its edges."""
        kept = self.kept.copy()
        for edge in edges:
            kept[edge] = False
        return Present(self.graph, kept, self.normed_together)


class Candidates:
    """K circuits: the k-th lacks those of some edges that `removed[k]` names."""

    def __init__(
        self, present: Present, edges: Sequence[Edge], removed: Bool[np.ndarray, "K E"]
    ) -> None:
        self.present, self.edges, self.removed = present, list(edges), removed
        self.into: dict[int, list[int]] = {}  # the numbers of edges by reader
        for number, edge in enumerate(self.edges):
            self.into.setdefault(edge[0], []).append(number)
        self.read = self._read() if present.normed_together else None  # [K, W, s]
        self.steps = self._steps()

    def __len__(self) -> int:
        return len(self.removed)

    def lost_by(self, candidate: int) -> list[Edge]:
        """The edges that a candidate lacks."""
        return [self.edges[number] for number in np.flatnonzero(self.removed[candidate])]

    def lost_into(self, reader: int) -> Bool[np.ndarray, "K W *S"]:
        """Which of a reader's edges each candidate lacks."""
        lost = np.zeros((len(self), *self.present.kept.shape[1:]), bool)
        for number in self.into[reader]:
            lost[(slice(None), *self.edges[number][1:])] = self.removed[:, number]
        return lost

    def _read(self) -> Bool[Tensor, "K W s"]:
        """Which writers the logits depend on under each candidate."""
        kept = self.present.kept
        masks = np.repeat(kept[None], len(self), 0)
        for number in range(len(self)):
            for edge in self.lost_by(number):
                masks[(number, *edge)] = False
        return self.present.graph.read(torch.from_numpy(masks))[0]

    def _unread(self) -> Bool[np.ndarray, "W"]:
        """The writers that not all candidates read as the present circuit does."""
        if self.read is None:
            return np.zeros(len(self.present.graph.writers), bool)
        return (self.read != self.present.read).any(2).any(0).numpy()

    def _steps(self) -> list[Step]:
        """What is run, in forward order; of a block first the heads that are run everywhere."""
        present, graph, unread = self.present, self.present.graph, self._unread()
        n_heads, kept, steps = graph.n_heads, present.by_reader, []
        reached = np.zeros(len(graph.writers), bool)
        hit = np.zeros(len(graph.readers), bool)
        hit[list(self.into)] = True
        for layer in range(graph.n_layers):
            first, reader = graph.first_writer(layer), graph.first_reader(layer)
            after = graph.first_reader(layer + 1)
            living = present.needed.anywhere[first : first + graph.writers_per_block]
            moving = present.needed.everywhere[first : first + graph.writers_per_block]
            sides = hit[reader:after] | (kept[reader:after] & reached).any(1)
            queries, shared = sides[:n_heads], sides[n_heads : n_heads + 2 * graph.kv_heads]
            heads = queries | shared.reshape(2, -1).any(0).repeat(graph.kv_group)
            if layer in present.normed_together:
                changes = (heads & living[:n_heads]).any() or unread[first : first + n_heads].any()
                heads = np.full(n_heads, changes)
            heads = heads & living[:n_heads]
            for everywhere in (True, False):
                some = np.flatnonzero(heads & (moving[:n_heads] == everywhere))
                if len(some):
                    steps.append(Step(layer, some.tolist(), everywhere, (first + some).tolist()))
            reached[first : first + n_heads] = heads
            if graph.attention_only or not living[n_heads]:
                continue
            if hit[after - 1] or (kept[after - 1] & reached).any():
                mlp = first + n_heads
                steps.append(Step(layer, [], bool(moving[n_heads]), [mlp]))
                reached[mlp] = True
        return steps
