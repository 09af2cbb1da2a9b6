"""The rule of ACDC, judging several edges from one batch of runs (`circuits.discovery.acdc`).

A *window* is the next few edges of the sweep.  Each has a candidate: the present circuit without
this edge, and without those before it in the window that are expected to be removed.  Where all
expectations before an edge hold, its candidate is what the sequential rule would have run, so that
its verdict is that rule's.  The first verdict against expectation ends what the window decides;
candidates behind it are wasted, but what they say is what their edges are next expected to do.

An edge is expected to be removed until something speaks against it.

Shapes: readers R, writers W; `*S` positions, where edges are told apart by them; edges E of a
window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float

from circuits.engine.candidates import Edge
from circuits.graph import Graph

FIRST = 8  # edges of the first window
MEMORY = 0.8  # by which what is known of surprises fades from window to window


def sweep_order(graph: Graph, seed: int | None) -> list[Edge]:
    """Returns all edges from the output to the input; with a seed shuffled within each reader."""
    order = graph.sweep_order()
    if seed is None:
        return order
    generator = np.random.default_rng(seed)
    readers = np.array([edge[0] for edge in order])
    starts = np.flatnonzero(np.diff(readers, prepend=-1))
    shuffled = []
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        edges = order[start:end]
        generator.shuffle(edges)
        shuffled += edges
    return shuffled


@dataclass
class Window:
    """Edges that are judged from one batch of runs."""

    edges: list[Edge] = field(default_factory=list)
    expected: list[bool] = field(default_factory=list)  # to be removed
    ends: list[int] = field(default_factory=list)  # how far the sweep is behind each edge
    # (before which edge, readers, what the logits depend on of their incoming edges)
    unread: list[tuple[int, slice, Bool[np.ndarray, "r 1 *S"]]] = field(default_factory=list)

    @property
    def removed(self) -> Bool[np.ndarray, "E E"]:
        """What each edge's candidate lacks of the window's edges."""
        before = np.tril(np.ones((len(self.edges),) * 2, bool), -1)
        return (before & np.array(self.expected)) | np.eye(len(self.edges), dtype=bool)


class Sweep:
    """How far a sweep is: the kept edges, and the delta at which each was judged."""

    def __init__(
        self,
        graph: Graph,
        order: Sequence[Edge],
        tau: float,
        cost: float,
        forecast: Float[np.ndarray, "R W *S"] | None = None,
    ) -> None:
        """Starts with all edges; `cost` is theirs.  `forecast` are deltas that are expected."""
        self.graph, self.order, self.tau, self.cost = graph, order, tau, cost
        self.kept = graph.exists.numpy().copy()
        self.deltas = np.zeros(self.kept.shape)
        self.was_judged = np.zeros(self.kept.shape, bool)
        self.forecast = np.full(self.kept.shape, -np.inf) if forecast is None else forecast.copy()
        self.at = 0  # in `order`
        self.judged = self.windows = self.candidates = 0
        self.closest = float("inf")
        self.known, self.surprises = FIRST * 2.0, 1.0  # of recent windows

    def ahead(self, most: int) -> Window:
        """The next edges, at most so many; none where the sweep is at its end.

        Half as many as are judged from one surprise to the next, as of late.
        """
        most = max(1, min(most, round(self.known / self.surprises / 2)))
        window, kept, readers = Window(), self.kept.copy(), range(0)
        for number in range(self.at, len(self.order)):
            edge = self.order[number]
            if edge[0] not in readers:
                readers = self._together(edge[0])
                rows = slice(readers.start, readers.stop)
                read = self.graph.read(torch.from_numpy(kept)[None])[1][0, rows].numpy()
                read = read if self.graph.n_positions is None else read[:, None]
                window.unread.append((len(window.edges), rows, read))
                kept[rows] &= read
            if not kept[edge]:
                continue
            if len(window.edges) == most:
                break
            window.edges.append(edge)
            window.expected.append(bool(self.forecast[edge] < self.tau))
            window.ends.append(number + 1)
            kept[edge] = not window.expected[-1]
        if not window.edges:
            self._drop(window, 0)
        return window

    def judge(self, window: Window, costs: Sequence[float]) -> int | None:
        """Takes the candidates' costs; returns whose circuit is now the present one, if any is."""
        self.windows += 1
        self.candidates += len(costs)
        accepted, surprised = None, False
        now = assumed = self.cost
        for number, (edge, cost) in enumerate(zip(window.edges, costs, strict=True)):
            expected = window.expected[number]
            if surprised:
                self.forecast[edge] = cost - assumed
            else:
                self._drop(window, number)
                removed = self._judge(edge, cost - now)
                accepted, now = (number, cost) if removed else (accepted, now)
                self.at, surprised = window.ends[number], removed != expected
            assumed = cost if expected else assumed
        self.cost = now
        judged = sum(end <= self.at for end in window.ends)
        self.known = MEMORY * self.known + judged
        self.surprises = MEMORY * self.surprises + surprised
        return accepted

    @property
    def judgements(self) -> Float[np.ndarray, "R W *S"]:
        """Each judged edge's delta, or what it was last expected to be."""
        return np.where(self.was_judged, self.deltas, self.forecast)

    def _judge(self, edge: Edge, delta: float) -> bool:
        """Whether an edge is removed for good."""
        self.judged += 1
        self.deltas[edge], self.was_judged[edge] = delta, True
        self.closest = min(self.closest, abs(delta - self.tau))
        self.kept[edge] = not delta < self.tau
        return delta < self.tau

    def _drop(self, window: Window, number: int) -> None:
        """Takes the edges away that unread nodes have, found unread before an edge is judged."""
        for before, rows, read in window.unread:
            if before == number:
                self.kept[rows] &= read

    def _together(self, reader: int) -> range:
        """The readers on one level with a reader: no edge into one decides if another is read."""
        layer, place = divmod(reader, self.graph.readers_per_block)
        first, after = (self.graph.first_reader(each) for each in (layer, layer + 1))
        if layer == self.graph.n_layers:
            return range(reader, reader + 1)
        if not self.graph.attention_only and reader == after - 1:
            return range(reader, after)
        return range(first, after - (not self.graph.attention_only))
