"""Where everything in a circuit's picture stands: names become nodes and rows, `dot` places them.

    layout = lay_out(parse_edges([("input->a0.h3<v>", 0.8), ("a0.h3->logits", 0.5)]))
    layout.nodes["a0.h3"]  # (x, y)

Rows are layers (inputs at the bottom, logits on top), so every edge runs upwards. An edge's
strength decides here how short and straight it comes out, and in `circuits.plot.circuit` its width
and opacity:

    strength(e) = sqrt(min(1, |score(e)| / top)),   top = min(largest |score|, 10 * median |score|)

The root keeps an edge of 1 % of `top` visible; the median bounds `top`, so one huge edge cannot
fade all the others.

A tall circuit, of more than `TALL` rows, is drawn compactly: neighbouring rows that no edge joins
share one, `mlp 4 - mlp 7`, and rows stand closer. Rows in which nothing is kept are never there.

Graphviz `dot` with forced ranks (Gansner, Koutsofios, North, Vo 1993, "A technique for drawing
directed graphs") places nodes and routes edges. It never sees a font, and the order of the edges
does not matter. Coordinates are points (1/72 inch), y upwards.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, pairwise, product
from statistics import median
from typing import Any

from circuits.names import INPUT, LOGITS, head_name, parse_edge, parse_node

Point = tuple[float, float]
Curve = tuple[Point, ...]  # a chain of cubic Beziers: 3n + 1 points, from writer to reader
Pair = tuple[str, str]  # two nodes that are joined

NODE_HEIGHT = 29.0
NODE_WIDTH = {"input": 62.0, "head": 46.0, "mlp": 46.0, "logits": 62.0}
PORT_OFFSET = {"q": -14.0, "k": 0.0, "v": 14.0}  # of a head, from the middle of its lower side
FAN_STEP, BUNDLE_STEP = 4.0, 2.5  # between edges that meet at a node, between parallel edges
LOGITS_ROW = 10**9
TALL, WIDEST_BAND = 20, 12  # rows above which some are shared, and by how many nodes at most


# ---- what the names say --------------------------------------------------------------------------


@dataclass(frozen=True)
class DrawnEdge:
    """One edge as the picture needs it: `a0.h3->a1.h2<q>` joins `a0.h3` to `a1.h2` at port `q`."""

    name: str
    writer: str
    node: str  # the reader's node: several readers, such as a head's q, k and v, share one
    port: str  # "q", "k", "v", or "" where a node reads once
    score: float


def parse_edges(edges: Iterable[tuple[str, float]]) -> tuple[DrawnEdge, ...]:
    """Return the edges with their names taken apart, sorted by name.

    Raises:
        ValueError: no name of an edge to a later layer, one twice, or a score not finite.
    """
    drawn: dict[str, DrawnEdge] = {}
    for name, score in edges:
        if name in drawn:
            raise ValueError(f"edge {name!r} is given twice; merge its scores first")
        drawn[name] = _drawn(name, score)
    return tuple(drawn[name] for name in sorted(drawn))


def _drawn(name: str, score: float) -> DrawnEdge:
    edge = parse_edge(name)
    if edge.position is not None:
        raise ValueError(
            f"edge {name!r} is of one position, but a picture has none; sum scores over positions "
            "(Circuit.edges_over_positions)"
        )
    if row_of(edge.writer) >= row_of(edge.node):
        raise ValueError(
            f"edge {name!r} does not run to a later layer; a writer must come before its reader"
        )
    if not math.isfinite(score):
        raise ValueError(
            f"edge {name!r} has score {score}, which cannot be drawn; scores must be finite"
        )
    return DrawnEdge(name, edge.writer, edge.node, edge.port, float(score))


def kind(node: str) -> str:
    """Return the kind that colours a node: "input", "head", "mlp" or "logits"."""
    return "head" if is_key_value(node) else parse_node(node).kind


def is_key_value(node: str) -> bool:
    """Return whether the node is the keys and values of a group of query heads."""
    return parse_node(node).kind == "kv"


def row_of(name: str) -> int:
    """Return the row of a node, counted upwards; rows without nodes are not drawn.

    Key-value heads of grouped-query attention stand one row below the query heads that they serve.
    """
    node = parse_node(name)
    if node.kind in ("input", "logits"):
        return -1 if node.kind == "input" else LOGITS_ROW
    return 3 * node.layer + ("kv", "head", "mlp").index(node.kind)


def row_label(row: int) -> str:
    """Return the axis label of a row: "embed", "k v 1", "attn 1", "mlp 1" or "logits"."""
    if row in (-1, LOGITS_ROW):
        return "embed" if row == -1 else "logits"
    return f"{('k v', 'attn', 'mlp')[row % 3]} {row // 3}"


def band_label(nodes: Sequence[str]) -> str:
    """Return the axis label of nodes that stand side by side: of their rows, from lowest to last.

    >>> band_label(["m4", "a5.h1"]), band_label(["m4"])
    ('mlp 4 - attn 5', 'mlp 4')
    """
    rows = sorted({row_of(node) for node in nodes})
    return " - ".join(row_label(row) for row in dict.fromkeys((rows[0], rows[-1])))


# ---- how strong an edge is -----------------------------------------------------------------------


def strengths(scores: Sequence[float]) -> tuple[list[float], float]:
    """Return each score's strength in [0, 1], and `top`, the |score| from which it is 1.

    Scores without any contrast, all zero or all equal in size as for a bare mask, get .5 each.
    """
    sizes = [abs(score) for score in scores]
    largest = max(sizes, default=0.0)
    if largest == min(sizes, default=0.0):
        return [0.5] * len(sizes), largest
    top = min(largest, 10 * median(size for size in sizes if size > 0))
    return [math.sqrt(min(1.0, size / top)) for size in sizes], top


# ---- layout: dot ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where everything stands, in points, y upwards, the lowest left corner at (0, 0)."""

    nodes: Mapping[str, Point]
    edges: Mapping[str, Curve]  # by the edge's name
    links: Mapping[Pair, Curve]  # from a key-value head to a query head that it serves
    rows: Mapping[str, float]  # by the row's label
    width: float
    height: float


def lay_out(edges: Sequence[DrawnEdge], *, kv_group: int = 1) -> Layout:
    """Return dot's layout of a circuit, with input and logits even where no edge touches them.

    Edges from one writer to the q, k and v of one head are routed once, run side by side and fan
    out to their ports. Strong edges weigh more, so they come out short and straight. `kv_group`,
    the number of query heads per key-value head, may be 1 only where there are none of those.
    """
    nodes, weights = _nodes(edges), _weights(edges)
    links = _links(nodes, kv_group)
    bands = _bands(nodes, {*weights, *links})
    graph = _dot_graph(bands, weights, links)
    graph.layout(prog="dot")

    centres = {node: _points(graph.get_node(node))[0] for node in nodes}
    routes = {pair: _without_spikes(_points(graph.get_edge(*pair))) for pair in weights}
    curves = _fan_out(edges, routes)
    xs = [x for points in curves.values() for x, _ in points]
    for node, (x, _) in centres.items():
        xs += [x - NODE_WIDTH[kind(node)] / 2, x + NODE_WIDTH[kind(node)] / 2]
    left = min(xs)

    def shifted(points: Curve) -> Curve:
        return tuple((x - left, y) for x, y in points)

    return Layout(
        nodes={node: (x - left, y) for node, (x, y) in centres.items()},
        edges={name: shifted(points) for name, points in curves.items()},
        links={pair: shifted(_points(graph.get_edge(*pair))) for pair in links},
        rows={band_label(band): centres[band[0]][1] for band in bands},
        width=max(xs) - left,
        height=float(graph.graph_attr["bb"].split(",")[3]),
    )


def _bands(nodes: Sequence[str], joined: Collection[Pair]) -> list[list[str]]:
    """Return the nodes of each row, upwards; of a tall circuit with rows that may share one.

    Taking as many rows as fit gives the fewest, as any part of rows that fit together fits.
    """
    rows = [list(beside) for _, beside in groupby(nodes, key=row_of)]
    if len(rows) <= TALL:
        return rows
    bands = [rows[0], rows[1]]  # inputs and logits stay by themselves
    for row in rows[2:-1]:
        free = bands[-1] is not rows[0] and not any(
            pair in joined for pair in product(bands[-1], row)
        )
        if free and len(bands[-1]) + len(row) <= WIDEST_BAND:
            bands[-1] = bands[-1] + row
        else:
            bands.append(row)
    return [*bands, rows[-1]]


def _dot_graph(
    bands: Sequence[Sequence[str]], weights: Mapping[Pair, float], links: Sequence[Pair]
) -> Any:
    """Return the graph that dot lays out."""
    import pygraphviz

    spacing = {"rankdir": "BT", "nodesep": 0.03, "ranksep": 0.55 if len(bands) <= TALL else 0.4}
    graph: Any = pygraphviz.AGraph(strict=False, directed=True, **spacing)
    # Fixed sizes and empty labels: dot never measures text, so fonts cannot change the layout.
    graph.node_attr.update(shape="box", fixedsize="true", label="", height=NODE_HEIGHT / 72)
    graph.edge_attr.update(dir="none", tailport="n", headport="s")
    for node in chain(*bands):  # 12 points wider than drawn, so that edges keep clear
        graph.add_node(node, width=(NODE_WIDTH[kind(node)] + 12) / 72)
    _force_ranks(graph, bands)
    for pair, strength in sorted(weights.items()):
        graph.add_edge(*pair, weight=1 + round(4 * strength))
    for pair in links:
        graph.add_edge(*pair, weight=8)
    return graph


def _force_ranks(graph: Any, bands: Sequence[Sequence[str]]) -> None:
    """Put each row on a rank of its own, by a chain of invisible anchors."""
    rows = {f"row {row_of(band[0])}": band for band in bands}
    for below, above in pairwise(rows):
        graph.add_edge(below, above, style="invis", weight=0)
    for anchor, beside in rows.items():
        graph.get_node(anchor).attr.update(style="invis", width=0.01, height=0.01)
        graph.add_subgraph([anchor, *beside], rank="same")


def _nodes(edges: Sequence[DrawnEdge]) -> list[str]:
    """Return the nodes from row to row, from left to right as dot begins."""
    nodes = {LOGITS} | {edge.writer for edge in edges} | {edge.node for edge in edges}
    if all(kind(node) != "input" for node in nodes):
        nodes.add(INPUT)
    return sorted(nodes, key=lambda node: (row_of(node), parse_node(node).head, node))


def _weights(edges: Sequence[DrawnEdge]) -> dict[Pair, float]:
    """Return the largest strength of the edges between two nodes."""
    weights: dict[Pair, float] = {}
    strength, _ = strengths([edge.score for edge in edges])
    for edge, size in zip(edges, strength, strict=True):
        pair = edge.writer, edge.node
        weights[pair] = max(size, weights.get(pair, 0.0))
    return weights


def _links(nodes: Sequence[str], kv_group: int) -> list[Pair]:
    """Return (key-value head, query head) wherever both are drawn and one serves the other."""
    links = []
    for node in filter(is_key_value, nodes):
        if kv_group < 2:
            raise ValueError(
                f"{node} is a key-value head, but kv_group={kv_group}; pass the model's query "
                "heads per key-value head"
            )
        layer, first = parse_node(node).layer, parse_node(node).head * kv_group
        heads = (head_name(layer, head) for head in range(first, first + kv_group))
        links += [(node, head) for head in heads if head in nodes]
    return links


def _points(drawn: Any) -> Curve:
    """Return where dot put a node, or an edge's control points."""
    points = (pair.split(",") for pair in drawn.attr["pos"].split())
    return tuple((round(float(x), 3), round(float(y), 3)) for x, y in points)


def _without_spikes(points: Curve) -> Curve:
    """Return the curve with no control point farther from its joint than .8 of the cubic's chord.

    In crowded pictures dot lets some overshoot by hundreds of points, which shows as a spike.
    Directions stay, so the curve stays smooth.
    """

    def nearer(joint: Point, control: Point, chord: float) -> Point:
        part = min(1.0, 0.8 * chord / (math.dist(joint, control) or 1.0))
        return joint[0] + part * (control[0] - joint[0]), joint[1] + part * (control[1] - joint[1])

    kept = [points[0]]
    for start in range(0, len(points) - 1, 3):
        first, one, two, last = points[start : start + 4]
        chord = math.dist(first, last)
        kept += [nearer(first, one, chord), nearer(last, two, chord), last]
    return tuple(kept)


# ---- edges that share a way or an end ------------------------------------------------------------


def _fan_out(edges: Sequence[DrawnEdge], routes: Mapping[Pair, Curve]) -> dict[str, Curve]:
    """Return one curve per edge: its route, spread at both ends and beside its parallels."""
    at_tail = _fan({pair: (pair[0], route[3][0]) for pair, route in routes.items()})
    at_head = _fan({pair: (pair[1], route[-4][0]) for pair, route in routes.items()})
    curves = {}
    for edge in edges:
        pair = (edge.writer, edge.node)
        between = BUNDLE_STEP * PORT_OFFSET.get(edge.port, 0.0) / PORT_OFFSET["v"]
        head = PORT_OFFSET[edge.port] if edge.port else at_head[pair]
        curves[edge.name] = _bent(routes[pair], at_tail[pair] + between, between, head)
    return curves


def _fan(ends: Mapping[Pair, tuple[str, float]]) -> dict[Pair, float]:
    """Return each route's offset at a node (`ends`: it, and the x it comes from); none cross."""
    offsets = {}
    for node in {node for node, _ in ends.values()}:
        routes = sorted((x, pair) for pair, (owner, x) in ends.items() if owner == node)
        span = 9.0 if kind(node) == "head" else (NODE_WIDTH[kind(node)] - 16) / 2
        step = min(FAN_STEP, 2 * span / max(1, len(routes) - 1))
        for index, (_, pair) in enumerate(routes):
            offsets[pair] = step * (index - (len(routes) - 1) / 2)
    return offsets


def _bent(points: Curve, tail: float, between: float, head: float) -> Curve:
    """Return the curve moved sideways: `tail` at its start, `head` at its end, else `between`."""
    bottom, top = points[0][1], points[-1][1]
    reach = min(40.0, (top - bottom) / 2)

    def near(distance: float) -> float:
        """1 at an end of the curve, falling smoothly to 0 at `reach` from it."""
        part = min(1.0, max(0.0, distance / reach))
        return 1 - part * part * (3 - 2 * part)

    def offset(y: float) -> float:
        return between + (tail - between) * near(y - bottom) + (head - between) * near(top - y)

    return tuple((round(x + offset(y), 3), y) for x, y in points)
