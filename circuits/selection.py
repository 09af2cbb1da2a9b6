"""From edge scores to kept edges: threshold, top-n, greedy; then dead ends are dropped.

`greedy` (Hanna et al. 2024, arXiv 2403.17806) grows the circuit from `logits`: of all edges into
nodes that are already included, the best-scoring one comes next.  Ties are broken by edge order,
forward first.

Shapes: writers W, readers R; `*S` positions, where the graph tells edges apart by position.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.graph import Graph

HOW = ("greedy", "top_n", "threshold")


@dataclass
class Selection:
    """Which scored edges a circuit keeps; methods that decide themselves (ACDC) ignore it."""

    # greedy: grow from the logits; top_n: best scores anywhere; threshold: scores above a value
    how: str = "greedy"
    edges: int | None = None  # greedy, top_n: how many edges
    share: float | None = None  # greedy, top_n: how many edges, as a share of all
    faithfulness: float | None = (
        # greedy, top_n: the first of 25 sizes, on a log scale, that reaches this; if no size is
        # given
        0.9
    )
    threshold: float | None = None  # threshold: the smallest score kept
    absolute: bool = False  # rank by |score|; else by score, strongest supporters first

    def given(self) -> list[str]:
        """Which of edges, share and threshold are set; at most one may be."""
        return [name for name in ("edges", "share", "threshold") if getattr(self, name) is not None]


def sizes(graph: Graph, points: int = 25) -> list[int]:
    """Numbers of edges on a logarithmic ladder from 2 to all of them."""
    ladder = np.geomspace(min(2, graph.n_edges), graph.n_edges, points).round().astype(int)
    return sorted(set(ladder.tolist()))


def select(
    graph: Graph,
    scores: Float[Tensor, "R W *S"],
    *,
    how: str = "greedy",
    edges: int | None = None,
    threshold: float | None = None,
    absolute: bool = False,
) -> Bool[Tensor, "R W *S"]:
    """Returns the kept edges, without dead ends.

    Raises: ValueError: unknown `how`, a number of edges that the graph does not have, scores that
        are not finite.
    """
    if how not in HOW:
        raise ValueError(f"how={how!r}, but the selections are {', '.join(HOW)}")
    if not torch.isfinite(scores).all():
        raise ValueError("edge scores are not finite; check the model's logits and the metric")
    rank = (scores.abs() if absolute else scores).double()
    if how == "threshold":
        if threshold is None or math.isnan(threshold):
            raise ValueError("how=threshold needs threshold=VALUE")
        return graph.without_dead_ends(graph.exists & (rank >= threshold))
    if edges is None or not 0 <= edges <= graph.n_edges:
        raise ValueError(
            f"edges={edges}, but the graph has {graph.n_edges} edges; choose 0 to {graph.n_edges}"
        )
    kept = _greedy(graph, rank, edges) if how == "greedy" else _top(graph, rank, edges)
    return graph.without_dead_ends(kept)


def _top(graph: Graph, rank: Tensor, edges: int) -> Tensor:
    order = sorted(
        graph.edges(), key=lambda edge: -rank[edge].item()
    )  # sorted() is stable: ties in edge order
    kept = torch.zeros_like(graph.exists)
    for edge in order[:edges]:
        kept[edge] = True
    return kept


def _greedy(graph: Graph, rank: Tensor, edges: int) -> Tensor:
    by_position = rank if graph.n_positions is not None else rank[..., None]
    values, n_positions = by_position.numpy(), by_position.shape[-1]
    readers_of: dict[str, list[int]] = {}
    for reader in range(len(graph.readers)):
        for node in graph.reader_nodes(reader):
            readers_of.setdefault(node, []).append(reader)
    kept = torch.zeros_like(by_position, dtype=torch.bool)
    heap: list[tuple[float, int, int, int]] = []
    opened: set[tuple[int, int]] = set()

    def open_node(node: str, position: int) -> None:
        """Offers the edges into what a node's output at a position depends on."""
        for reader in readers_of.get(node, ()):
            for place in graph.reads_from(reader, position, n_positions):
                if (reader, place) in opened:
                    continue
                opened.add((reader, place))
                for writer in range(graph.upstream[reader]):
                    heapq.heappush(heap, (-values[reader, writer, place], reader, writer, place))

    for position in range(n_positions):
        open_node("logits", position)
    for _ in range(edges):
        if not heap:
            break
        _, reader, writer, position = heapq.heappop(heap)
        kept[reader, writer, position] = True
        open_node(graph.writers[writer], position)
    return kept.view(graph.exists.shape)


def random_circuits(
    graph: Graph, edges: int, count: int, seed: int
) -> list[Bool[Tensor, "R W *S"]]:
    """Returns connected circuits of (about) the same size: greedy selection on uniformly random
    scores.

    Edges drawn one by one would hardly ever connect input and logits, which makes too weak a
    control.  Dropping dead ends shrinks a draw, so that each is grown until it has at least `edges`
    edges left, then accepted.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(count):
        scores = torch.rand(graph.exists.shape, generator=generator)
        wanted = edges
        kept = select(graph, scores, edges=wanted)
        while int(kept.sum()) < edges and wanted < graph.n_edges:
            wanted = min(graph.n_edges, wanted + max(1, edges - int(kept.sum())))
            kept = select(graph, scores, edges=wanted)
        drawn.append(kept)
    return drawn
