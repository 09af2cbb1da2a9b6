"""From edge scores to kept edges: threshold, top-n, greedy; then dead ends are dropped.

`greedy` (Hanna et al. 2024, arXiv 2403.17806) grows the circuit from `logits`: of all edges into
nodes that are already included, the best-scoring one comes next.  Ties are broken by edge order,
forward first.  Edges that score exactly 0, as those of a head that writes nothing do, come after
all others, whatever the sign of theirs.

Units (`circuits.parts`) have no edges to grow along; of them `greedy` takes the best, as `top_n`.

Circuits of different sizes are nested: edges are put in order once, and a circuit is its beginning.

Shapes: writers W, readers R, edges (or units) N; `*S` positions, where they are told apart; `*E`
the axes of a mask, [R, W, *S] of edges and [U, *S] of units.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.graph import Graph
from circuits.space import Space

HOW = ("greedy", "top_n", "threshold")


@dataclass
class Selection:
    """Which scored edges a circuit keeps; methods that decide themselves (ACDC) ignore it.

    >>> Selection(edges=20).given()
    ['edges']
    """

    # greedy: grow from the logits; top_n: best scores anywhere; threshold: scores above a value
    how: str = "greedy"
    edges: int | None = None  # greedy, top_n: how many edges
    units: int | None = None  # top_n: how many units, where a circuit is of units (units=NAME)
    share: float | None = None  # greedy, top_n: how many edges or units, as a share of all
    # greedy, top_n, where no size is given: the smallest circuit to reach this, looked for up a
    # ladder of 25 sizes on a log scale, then by halving
    faithfulness: float | None = 0.9
    threshold: float | None = None  # threshold: the smallest score kept
    # rank by |score|; else by score, strongest supporters first. null: by |score| where gradients
    # of a metric that is best at the model (kl) were taken, whose signs carry nothing
    absolute: bool | None = None

    def given(self) -> list[str]:
        """Which of edges, units, share and threshold are set; at most one may be."""
        names = ("edges", "units", "share", "threshold")
        return [name for name in names if getattr(self, name) is not None]


def sizes(space: Space, points: int = 25) -> list[int]:
    """Numbers of edges (or units) on a logarithmic ladder from 2 to all of them."""
    ladder = np.geomspace(min(2, space.n_parts), space.n_parts, points).round().astype(int)
    return sorted(set(ladder.tolist()))


@dataclass(frozen=True)
class Ranking:
    """Edges in the order in which circuits of growing size take them."""

    graph: Space  # or units
    edges: Int[np.ndarray, "N axes"]  # (reader, writer) or (reader, writer, position); or (unit,)
    supported: int  # how many come before the first that scores 0

    def circuit(self, edges: int | None) -> Bool[Tensor, "*E"]:
        """The first so many edges, without dead ends; ValueError for a number out of range."""
        noun, total = self.graph.noun, self.graph.n_parts
        if edges is None or not 0 <= edges <= total:
            whole = "graph" if noun == "edges" else "model"
            raise ValueError(
                f"{noun}={edges}, but the {whole} has {total} {noun}; choose 0 to {total}"
            )
        kept = torch.zeros_like(self.graph.exists)
        kept[tuple(torch.from_numpy(self.edges[:edges]).T)] = True
        return self.graph.without_dead_ends(kept)

    def within(self, edges: int) -> Bool[Tensor, "*E"]:
        """The largest circuit, of edges that do not score 0, with at most so many edges left."""
        sizes = range(1, self.supported + 1)
        fit = bisect_right(sizes, edges, key=lambda size: int(self.circuit(size).sum()))
        return self.circuit(fit)  # they are nested, so as many sizes fit as edges are taken

    def grown(self, edges: int) -> Bool[Tensor, "*E"]:
        """The first circuit that has at least so many edges left once dead ends are dropped."""
        wanted, kept = edges, self.circuit(edges)
        while (short := edges - int(kept.sum())) > 0 and wanted < self.graph.n_parts:
            wanted = min(self.graph.n_parts, wanted + short)
            kept = self.circuit(wanted)
        return kept


def select(
    graph: Graph,
    scores: Float[Tensor, "R W *S"],
    *,
    how: str = "greedy",
    edges: int | None = None,
    threshold: float | None = None,
    absolute: bool = False,
) -> Bool[Tensor, "R W *S"]:
    """Returns the kept edges, without dead ends; raises ValueError as `ranking` and `above` do."""
    if how == "threshold":
        return above(graph, scores, threshold, absolute=absolute)
    return ranking(graph, scores, how=how, absolute=absolute).circuit(edges)


def ranking(
    graph: Space, scores: Float[Tensor, "*E"], *, how: str = "greedy", absolute: bool = False
) -> Ranking:
    """Returns the order in which `greedy` or `top_n` takes edges, or units.

    Raises:
        ValueError: another `how`, or scores that are not finite.
    """
    rank = _rank(scores, how, absolute)
    if how == "greedy" and isinstance(graph, Graph):
        by_position = rank if graph.n_positions is not None else rank[..., None]
        order = np.array(list(_greedily(graph, by_position.numpy())))
        order = order if graph.n_positions is not None else order[:, :2]
    else:
        edges = graph.exists.nonzero().numpy()  # in edge order, which a stable sort keeps
        order = edges[np.argsort(-rank[graph.exists].numpy(), kind="stable")]
    without = np.isneginf(rank.numpy()[tuple(order.T)])
    return Ranking(graph, order, int(without.argmax()) if without.any() else len(order))


def above(
    graph: Space, scores: Float[Tensor, "*E"], threshold: float | None, *, absolute: bool
) -> Bool[Tensor, "*E"]:
    """The edges with scores, other than 0, of at least a threshold, without dead ends.

    Raises:
        ValueError: no threshold, or scores that are not finite.
    """
    rank = _rank(scores, "threshold", absolute)
    if threshold is None or math.isnan(threshold):
        raise ValueError("how=threshold needs threshold=VALUE")
    return graph.without_dead_ends(graph.exists & (rank >= threshold))


def _rank(scores: Tensor, how: str, absolute: bool) -> Tensor:
    if how not in HOW:
        raise ValueError(f"how={how!r}, but the selections are {', '.join(HOW)}")
    if not torch.isfinite(scores).all():
        raise ValueError("edge scores are not finite; check the model's logits and the metric")
    rank = scores.abs() if absolute else scores
    return rank.double().masked_fill(scores == 0, -math.inf)


def _greedily(graph: Graph, rank: Float[np.ndarray, "R W S"]) -> Iterator[tuple[int, int, int]]:
    """Yields (reader, writer, position), each time the best edge into what is already included."""
    frontier = _Frontier(graph, rank)
    for position in range(rank.shape[-1]):
        frontier.include("logits", position)
    while frontier.heap:
        _, reader, writer, position, nth = heapq.heappop(frontier.heap)
        yield reader, writer, position
        frontier.offer(reader, position, nth + 1)
        frontier.include(graph.writers[writer], position)


class _Frontier:
    """The edges into what a growing circuit includes.

    Of each reader at each position only the best edge that is left is on the heap.
    """

    def __init__(self, graph: Graph, rank: Float[np.ndarray, "R W S"]) -> None:
        self.graph, self.rank = graph, rank
        self.readers_of: dict[str, list[int]] = {}
        for reader in range(len(graph.readers)):
            for node in graph.reader_nodes(reader):
                self.readers_of.setdefault(node, []).append(reader)
        self.best_first = [
            np.argsort(-rank[reader, :count], axis=0, kind="stable")
            for reader, count in enumerate(graph.upstream)
        ]
        # - score, reader, writer, position, and which of the reader's best it is
        self.heap: list[tuple[float, int, int, int, int]] = []
        self.included: set[tuple[str, int]] = set()
        self.offered: set[tuple[int, int]] = set()

    def include(self, node: str, position: int) -> None:
        """Offers the edges into what a node's output at a position depends on."""
        if (node, position) in self.included:
            return
        self.included.add((node, position))
        for reader in self.readers_of.get(node, ()):
            for place in self.graph.reads_from(reader, position, self.rank.shape[-1]):
                if (reader, place) not in self.offered:
                    self.offered.add((reader, place))
                    self.offer(reader, place, 0)

    def offer(self, reader: int, place: int, nth: int) -> None:
        """Puts the nth best edge of a reader at a position on the heap, if there is one."""
        if nth < self.graph.upstream[reader]:
            writer = int(self.best_first[reader][nth, place])
            entry = (-float(self.rank[reader, writer, place]), reader, writer, place, nth)
            heapq.heappush(self.heap, entry)


def random_rankings(graph: Space, count: int, seed: int) -> list[Ranking]:
    """Returns greedy orders by uniformly random scores.

    Circuits of them are connected.  Edges drawn one by one would hardly ever connect input and
    logits, which makes too weak a control.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.rand(graph.exists.shape, generator=generator) for _ in range(count))
    return [ranking(graph, scores) for scores in drawn]


def random_circuits(graph: Space, edges: int, count: int, seed: int) -> list[Tensor]:
    """Returns connected circuits of (about) the same size, each grown until it is as large."""
    return [drawn.grown(edges) for drawn in random_rankings(graph, count, seed)]
