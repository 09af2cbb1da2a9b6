"""Where everything in a circuit's picture stands: edge names become nodes and rows, `dot` gives
them coordinates.

    lay_out(parse_edges([("input->a0.h3<v>", 0.8), ("a0.h3->logits", 0.5)])).nodes["a0.h3"]  # (x, y)

Rows are layers (inputs at the bottom, logits on top), so every edge runs upwards. An edge's
strength decides here how short and straight it comes out, and in `circuits.plot.circuit` its width
and opacity:

    strength(e) = sqrt(min(1, |score(e)| / top)),   top = min(largest |score|, 10 * median |score|)

The root keeps an edge of 1 % of `top` visible; the median bounds `top`, so one huge edge cannot
fade all the others.

Graphviz `dot` with forced ranks (Gansner, Koutsofios, North, Vo 1993, "A technique for drawing
directed graphs") places nodes and routes edges. It never sees a font, and the order of the edges
does not matter.

Coordinates are points (1/72 inch), y upwards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

Point = tuple[float, float]

NODE_HEIGHT = 29.0
NODE_WIDTH = {"input": 62.0, "head": 46.0, "mlp": 46.0, "logits": 62.0}
PORT_OFFSET = {
    "q": -14.0,
    "k": 0.0,
    "v": 14.0,
}  # where a head reads, from the middle of its lower side
FAN_STEP, BUNDLE_STEP = (
    4.0,
    2.5,
)  # between edges that meet at a side of a node; between parallel edges on their way


# --- what the names say
# -----------------------------------------------------------------------------------------

_WRITER = re.compile(r"input(?:\.token|\.position)?|a(?P<a>\d+)\.h(?P<head>\d+)|m(?P<m>\d+)")
_READER = re.compile(
    r"(?P<node>logits|m(?P<m>\d+)|a(?P<a>\d+)\.h\d+(?=<)|a(?P<g>\d+)\.kv(?P<group>\d+)(?=<[kv]>))(?:<(?P<port>[qkv])>)?"
)
LOGITS_DEPTH = 10**9


@dataclass(frozen=True)
class DrawnEdge:
    """One edge as the picture needs it: `a0.h3->a1.h2<q>` joins node `a0.h3` to node `a1.h2` at
    port `q`.
    """

    name: str
    writer: str
    node: str  # the reader's node: several readers, such as a head's q, k and v, share one
    port: str  # "q", "k", "v", or "" where a node reads once
    score: float


def parse_edges(edges: Iterable[tuple[str, float]]) -> tuple[DrawnEdge, ...]:
    """Return the edges with their names taken apart, sorted by name.

    Raises:
        ValueError: a name that is not `writer->reader`, an edge that does not run to a later layer,
            an edge given twice, or a score that is not finite.
    """
    drawn: dict[str, DrawnEdge] = {}
    for name, score in edges:
        writer, _, reader = name.partition("->")
        match = _READER.fullmatch(reader)
        if _WRITER.fullmatch(writer) is None or match is None or (match["m"] and match["port"]):
            raise ValueError(
                f"edge {name!r} is not of the form writer->reader, such as a0.h3->a1.h2<q> or "
                "m0->logits"
            )
        if (match["node"] == "logits") and match["port"]:
            raise ValueError(f"edge {name!r} gives logits a port; write {writer}->logits")
        if depth(writer) >= depth(match["node"]):
            raise ValueError(
                f"edge {name!r} does not run to a later layer; a writer must come before its reader"
            )
        if name in drawn:
            raise ValueError(f"edge {name!r} is given twice; merge its scores first")
        if not math.isfinite(score):
            raise ValueError(
                f"edge {name!r} has score {score}, which cannot be drawn; scores must be finite"
            )
        drawn[name] = DrawnEdge(name, writer, match["node"], match["port"] or "", float(score))
    return tuple(drawn[name] for name in sorted(drawn))


def kind(node: str) -> str:
    """Return the kind that colours a node: "input", "head", "mlp" or "logits"."""
    return {"i": "input", "a": "head", "m": "mlp", "l": "logits"}[node[0]]


def depth(node: str) -> int:
    """Return the row of a node, counted upwards; rows without nodes are not drawn.

    Key-value heads of grouped-query attention stand one row below the query heads that they serve.
    """
    if node.startswith("input"):
        return -1
    if node == "logits":
        return LOGITS_DEPTH
    layer = int(re.match(r"[am](\d+)", node)[1])  # pyright: ignore[reportOptionalSubscript]
    return 3 * layer + (2 if node[0] == "m" else 0 if ".kv" in node else 1)


def row_label(row: int) -> str:
    """Return the axis label of a row: "embed", "k v 1", "attn 1", "mlp 1" or "logits"."""
    if row in (-1, LOGITS_DEPTH):
        return "embed" if row == -1 else "logits"
    return f"{('k v', 'attn', 'mlp')[row % 3]} {row // 3}"


# --- how strong an edge is
# --------------------------------------------------------------------------------------


def strengths(scores: Sequence[float]) -> tuple[list[float], float]:
    """Return each score's strength in [0, 1] (module docstring) and `top`, the |score| from which
    it is 1.

    Scores without any contrast, all zero or all equal in size as for a bare mask, get strength .5
    each.
    """
    sizes = [abs(score) for score in scores]
    largest = max(sizes, default=0.0)
    if largest == min(sizes, default=0.0):
        return [0.5] * len(sizes), largest
    top = min(largest, 10 * median(size for size in sizes if size > 0))
    return [math.sqrt(min(1.0, size / top)) for size in sizes], top


# --- layout: dot
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where everything stands, in points, y upwards, the lowest left corner at (0, 0).

    `edges` holds one cubic Bezier chain of 3n + 1 points per edge, from writer to reader; `links`
    join a key-value head to its query heads.
    """

    nodes: Mapping[str, Point]
    edges: Mapping[str, tuple[Point, ...]]
    links: Mapping[tuple[str, str], tuple[Point, ...]]
    rows: Mapping[str, float]
    width: float
    height: float


def lay_out(edges: Sequence[DrawnEdge], *, kv_group: int = 1) -> Layout:
    """Return dot's layout of a circuit, with input and logits even where no edge touches them.

    Edges from one writer to the q, k and v of one head are routed once, run side by side and fan
    out to their ports. Strong edges weigh more, so they come out short and straight. `kv_group` is
    the number of query heads per key-value head.

    Raises:
        ValueError: a key-value reader although `kv_group` is 1.
    """
    import pygraphviz

    nodes = _nodes(edges)
    links = _links(nodes, kv_group)
    rows = sorted({depth(node) for node in nodes})
    graph: Any = pygraphviz.AGraph(
        strict=False, directed=True, rankdir="BT", nodesep=0.03, ranksep=0.55
    )
    # Fixed sizes and empty labels: dot never measures text, so fonts cannot change the layout.
    graph.node_attr.update(shape="box", fixedsize="true", label="", height=NODE_HEIGHT / 72)
    graph.edge_attr.update(dir="none", tailport="n", headport="s")
    for node in nodes:
        graph.add_node(
            node, width=(NODE_WIDTH[kind(node)] + 12) / 72
        )  # 12: edges keep clear of nodes
    for below, above in pairwise(rows):  # a chain of invisible anchors forces the ranks
        graph.add_edge(f"row {below}", f"row {above}", style="invis", weight=0)
    for row in rows:
        anchor = f"row {row}"
        graph.get_node(anchor).attr.update(style="invis", width=0.01, height=0.01)
        graph.add_subgraph([anchor, *(node for node in nodes if depth(node) == row)], rank="same")
    strength, _ = strengths([edge.score for edge in edges])
    weight: dict[tuple[str, str], float] = {}
    for edge, size in zip(edges, strength, strict=True):
        weight[edge.writer, edge.node] = max(size, weight.get((edge.writer, edge.node), 0.0))
    for pair, size in sorted(weight.items()):
        graph.add_edge(*pair, weight=1 + round(4 * size))
    for pair in links:
        graph.add_edge(*pair, weight=8)
    graph.layout(prog="dot")

    routes = {pair: _without_spikes(_points(graph.get_edge(*pair).attr["pos"])) for pair in weight}
    positions = {
        node: _points(graph.get_node(node).attr["pos"])[0]
        for node in [*nodes, *(f"row {row}" for row in rows)]
    }
    curves = _fan_out(edges, routes)
    xs = [x for points in curves.values() for x, _ in points]
    left = min([positions[node][0] - NODE_WIDTH[kind(node)] / 2 for node in nodes] + xs)
    right = max([positions[node][0] + NODE_WIDTH[kind(node)] / 2 for node in nodes] + xs)
    return Layout(
        nodes={node: (positions[node][0] - left, positions[node][1]) for node in nodes},
        edges={name: tuple((x - left, y) for x, y in points) for name, points in curves.items()},
        links={
            pair: tuple((x - left, y) for x, y in _points(graph.get_edge(*pair).attr["pos"]))
            for pair in links
        },
        rows={row_label(row): positions[f"row {row}"][1] for row in rows},
        width=right - left,
        height=float(graph.graph_attr["bb"].split(",")[3]),
    )


def _nodes(edges: Sequence[DrawnEdge]) -> list[str]:
    nodes = {"logits"} | {edge.writer for edge in edges} | {edge.node for edge in edges}
    if not any(kind(node) == "input" for node in nodes):
        nodes.add("input")
    return sorted(
        nodes,
        key=lambda node: (depth(node), [int(number) for number in re.findall(r"\d+", node)], node),
    )


def _links(nodes: Sequence[str], kv_group: int) -> list[tuple[str, str]]:
    """Return (key-value head, query head) for every drawn query head whose keys and values come
    from a drawn node.
    """
    links = []
    for node in nodes:
        if ".kv" not in node:
            continue
        if kv_group < 2:
            raise ValueError(
                f"{node} is a key-value head, but kv_group={kv_group}; pass the model's query "
                "heads per key-value head"
            )
        layer, group = map(int, re.findall(r"\d+", node))
        heads = (f"a{layer}.h{head}" for head in range(group * kv_group, (group + 1) * kv_group))
        links += [(node, head) for head in heads if head in nodes]
    return links


def _points(text: str) -> tuple[Point, ...]:
    points = (pair.split(",") for pair in text.split())
    return tuple((round(float(x), 3), round(float(y), 3)) for x, y in points)


def _without_spikes(points: tuple[Point, ...]) -> tuple[Point, ...]:
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


def _fan_out(
    edges: Sequence[DrawnEdge], routes: Mapping[tuple[str, str], tuple[Point, ...]]
) -> dict[str, tuple[Point, ...]]:
    """Return one curve per edge: its route, spread at both ends and moved a little from its
    parallels in between.
    """
    at_tail = _fan(
        {pair: (pair[0], route[min(3, len(route) - 1)][0]) for pair, route in routes.items()}
    )
    at_head = _fan(
        {pair: (pair[1], route[-min(4, len(route))][0]) for pair, route in routes.items()}
    )
    curves = {}
    for edge in edges:
        pair = (edge.writer, edge.node)
        between = BUNDLE_STEP * PORT_OFFSET.get(edge.port, 0.0) / PORT_OFFSET["v"]
        head = PORT_OFFSET[edge.port] if edge.port else at_head[pair]
        curves[edge.name] = _bent(routes[pair], at_tail[pair] + between, between, head)
    return curves


def _fan(ends: Mapping[tuple[str, str], tuple[str, float]]) -> dict[tuple[str, str], float]:
    """Return each route's offset at a node, given that node and the x that the route comes from: no
    two cross.
    """
    offsets = {}
    for node in {node for node, _ in ends.values()}:
        routes = sorted((x, pair) for pair, (owner, x) in ends.items() if owner == node)
        span = (
            (NODE_WIDTH[kind(node)] - 16) / 2 if kind(node) in ("input", "logits", "mlp") else 9.0
        )
        step = min(FAN_STEP, 2 * span / max(1, len(routes) - 1))
        offsets |= {
            pair: step * (index - (len(routes) - 1) / 2) for index, (_, pair) in enumerate(routes)
        }
    return offsets


def _bent(points: tuple[Point, ...], tail: float, between: float, head: float) -> tuple[Point, ...]:
    """Return the curve moved sideways by `tail` where it starts, `head` where it ends, and
    `between` in between.
    """
    bottom, top = points[0][1], points[-1][1]
    reach = min(40.0, (top - bottom) / 2)

    def smooth(distance: float) -> float:
        part = min(1.0, max(0.0, distance / reach))
        return part * part * (3 - 2 * part)

    def offset(y: float) -> float:
        return (
            between
            + (tail - between) * (1 - smooth(y - bottom))
            + (head - between) * (1 - smooth(top - y))
        )

    return tuple((round(x + offset(y), 3), y) for x, y in points)
