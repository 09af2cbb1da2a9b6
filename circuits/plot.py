"""Pictures of circuits: the graph itself, and faithfulness against the number of edges kept.

    draw_circuit([("input->a0.h3", 0.8), ("a0.h3->a1.h2<q>", -0.2), ("a1.h2->logits", 0.5)], Path("out"))
    # -> out/circuit.svg, out/circuit.png, out/circuit.pdf

Rows are layers (inputs at the bottom, logits on top), node colour is kind, edge colour is sign, edge width and
opacity are |score|. Every edge runs upwards, so there are no arrow heads; where a head reads, a small `q`, `k` or `v`
stands at the reading end.

    strength(e) = sqrt(min(1, |score(e)| / top)),   top = min(largest |score|, 10 * median |score|)

The root keeps an edge of 1 % of `top` visible; the median bounds `top`, so one huge edge cannot fade all the others
(scores at or above `top` share the widest line, and the legend then says ">=").

Graphviz `dot` with forced ranks (Gansner, Koutsofios, North, Vo 1993, "A technique for drawing directed graphs") places
nodes and routes edges, once; matplotlib then draws SVG, PNG and PDF from those coordinates. It brings its own fonts,
so a machine without any gives the same picture. Same input, same bytes, whatever the order of the edges.

Coordinates are points (1/72 inch), y upwards.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]

# Okabe and Ito's colours (2008, "Color universal design"), told apart with every common colour blindness.
POSITIVE, NEGATIVE, UNSCORED = "#0072B2", "#D5402B", "#8A8A8A"
KIND_COLOURS = {"input": "#F3D06B", "head": "#D6E9F5", "mlp": "#CDE8DC", "logits": "#EBCFE0"}
KIND_NAMES = {"input": "input", "head": "attention head", "mlp": "MLP", "logits": "logits"}
INK, FAINT_INK, RULE = "#1A1A1A", "#5F5F5F", "#ECECEC"
SERIES_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7A6A00")

NODE_HEIGHT = 29.0
NODE_WIDTH = {"input": 62.0, "head": 46.0, "mlp": 46.0, "logits": 62.0}
PORT_OFFSET = {"q": -14.0, "k": 0.0, "v": 14.0}  # where a head reads, from the middle of its lower side
FAN_STEP, BUNDLE_STEP = 4.0, 2.5  # between edges that meet at a side of a node; between parallel edges on their way


# --- what the names say -----------------------------------------------------------------------------------------

_WRITER = re.compile(r"input(?:\.token|\.position)?|a(?P<a>\d+)\.h(?P<head>\d+)|m(?P<m>\d+)")
_READER = re.compile(
    r"(?P<node>logits|m(?P<m>\d+)|a(?P<a>\d+)\.h\d+(?=<)|a(?P<g>\d+)\.kv(?P<group>\d+)(?=<[kv]>))(?:<(?P<port>[qkv])>)?"
)
LOGITS_DEPTH = 10**9


@dataclass(frozen=True)
class DrawnEdge:
    """One edge as the picture needs it: `a0.h3->a1.h2<q>` joins node `a0.h3` to node `a1.h2` at port `q`."""

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
            raise ValueError(f"edge {name!r} is not of the form writer->reader, such as a0.h3->a1.h2<q> or m0->logits")
        if (match["node"] == "logits") and match["port"]:
            raise ValueError(f"edge {name!r} gives logits a port; write {writer}->logits")
        if depth(writer) >= depth(match["node"]):
            raise ValueError(f"edge {name!r} does not run to a later layer; a writer must come before its reader")
        if name in drawn:
            raise ValueError(f"edge {name!r} is given twice; merge its scores first")
        if not math.isfinite(score):
            raise ValueError(f"edge {name!r} has score {score}, which cannot be drawn; scores must be finite")
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


# --- layout: dot ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where everything stands, in points, y upwards, the lowest left corner at (0, 0).

    `edges` holds one cubic Bezier chain of 3n + 1 points per edge, from writer to reader; `links` join a key-value
    head to its query heads.
    """

    nodes: Mapping[str, Point]
    edges: Mapping[str, tuple[Point, ...]]
    links: Mapping[tuple[str, str], tuple[Point, ...]]
    rows: Mapping[str, float]
    width: float
    height: float


def lay_out(edges: Sequence[DrawnEdge], *, kv_group: int = 1) -> Layout:
    """Return dot's layout of a circuit, with input and logits even where no edge touches them.

    Edges from one writer to the q, k and v of one head are routed once, run side by side and fan out to their ports.
    Strong edges weigh more, so they come out short and straight. `kv_group` is the number of query heads per
    key-value head.

    Raises:
        ValueError: a key-value reader although `kv_group` is 1.
    """
    import pygraphviz

    nodes = _nodes(edges)
    links = _links(nodes, kv_group)
    rows = sorted({depth(node) for node in nodes})
    graph: Any = pygraphviz.AGraph(strict=False, directed=True, rankdir="BT", nodesep=0.03, ranksep=0.55)
    # Fixed sizes and empty labels: dot never measures text, so fonts cannot change the layout.
    graph.node_attr.update(shape="box", fixedsize="true", label="", height=NODE_HEIGHT / 72)
    graph.edge_attr.update(dir="none", tailport="n", headport="s")
    for node in nodes:
        graph.add_node(node, width=(NODE_WIDTH[kind(node)] + 12) / 72)  # 12: edges keep clear of nodes
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
        node: _points(graph.get_node(node).attr["pos"])[0] for node in [*nodes, *(f"row {row}" for row in rows)]
    }
    curves = _fan_out(edges, routes)
    xs = [x for points in curves.values() for x, _ in points]
    left = min([positions[node][0] - NODE_WIDTH[kind(node)] / 2 for node in nodes] + xs)
    right = max([positions[node][0] + NODE_WIDTH[kind(node)] / 2 for node in nodes] + xs)
    return Layout(
        nodes={node: (positions[node][0] - left, positions[node][1]) for node in nodes},
        edges={name: tuple((x - left, y) for x, y in points) for name, points in curves.items()},
        links={pair: tuple((x - left, y) for x, y in _points(graph.get_edge(*pair).attr["pos"])) for pair in links},
        rows={row_label(row): positions[f"row {row}"][1] for row in rows},
        width=right - left,
        height=float(graph.graph_attr["bb"].split(",")[3]),
    )


def _nodes(edges: Sequence[DrawnEdge]) -> list[str]:
    nodes = {"logits"} | {edge.writer for edge in edges} | {edge.node for edge in edges}
    if not any(kind(node) == "input" for node in nodes):
        nodes.add("input")
    return sorted(nodes, key=lambda node: (depth(node), [int(number) for number in re.findall(r"\d+", node)], node))


def _links(nodes: Sequence[str], kv_group: int) -> list[tuple[str, str]]:
    """Return (key-value head, query head) for every drawn query head whose keys and values come from a drawn node."""
    links = []
    for node in nodes:
        if ".kv" not in node:
            continue
        if kv_group < 2:
            raise ValueError(
                f"{node} is a key-value head, but kv_group={kv_group}; pass the model's query heads per key-value head"
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

    In crowded pictures dot lets some overshoot by hundreds of points, which shows as a spike. Directions stay, so the
    curve stays smooth.
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
    """Return one curve per edge: its route, spread at both ends and moved a little from its parallels in between."""
    at_tail = _fan({pair: (pair[0], route[min(3, len(route) - 1)][0]) for pair, route in routes.items()})
    at_head = _fan({pair: (pair[1], route[-min(4, len(route))][0]) for pair, route in routes.items()})
    curves = {}
    for edge in edges:
        pair = (edge.writer, edge.node)
        between = BUNDLE_STEP * PORT_OFFSET.get(edge.port, 0.0) / PORT_OFFSET["v"]
        head = PORT_OFFSET[edge.port] if edge.port else at_head[pair]
        curves[edge.name] = _bent(routes[pair], at_tail[pair] + between, between, head)
    return curves


def _fan(ends: Mapping[tuple[str, str], tuple[str, float]]) -> dict[tuple[str, str], float]:
    """Return each route's offset at a node, given that node and the x that the route comes from: no two cross."""
    offsets = {}
    for node in {node for node, _ in ends.values()}:
        routes = sorted((x, pair) for pair, (owner, x) in ends.items() if owner == node)
        span = (NODE_WIDTH[kind(node)] - 16) / 2 if kind(node) in ("input", "logits", "mlp") else 9.0
        step = min(FAN_STEP, 2 * span / max(1, len(routes) - 1))
        offsets |= {pair: step * (index - (len(routes) - 1) / 2) for index, (_, pair) in enumerate(routes)}
    return offsets


def _bent(points: tuple[Point, ...], tail: float, between: float, head: float) -> tuple[Point, ...]:
    """Return the curve moved sideways by `tail` where it starts, `head` where it ends, and `between` in between."""
    bottom, top = points[0][1], points[-1][1]
    reach = min(40.0, (top - bottom) / 2)

    def smooth(distance: float) -> float:
        part = min(1.0, max(0.0, distance / reach))
        return part * part * (3 - 2 * part)

    def offset(y: float) -> float:
        return between + (tail - between) * (1 - smooth(y - bottom)) + (head - between) * (1 - smooth(top - y))

    return tuple((round(x + offset(y), 3), y) for x, y in points)


# --- drawing: matplotlib ----------------------------------------------------------------------------------------


def strengths(scores: Sequence[float]) -> tuple[list[float], float]:
    """Return each score's strength in [0, 1] (module docstring) and `top`, the |score| from which it is 1.

    Scores without any contrast, all zero or all equal in size as for a bare mask, get strength .5 each.
    """
    sizes = [abs(score) for score in scores]
    largest = max(sizes, default=0.0)
    if largest == min(sizes, default=0.0):
        return [0.5] * len(sizes), largest
    top = min(largest, 10 * median(size for size in sizes if size > 0))
    return [math.sqrt(min(1.0, size / top)) for size in sizes], top


def edge_style(score: float, strength: float) -> dict[str, Any]:
    """Return the line style of an edge: colour by sign, width (points) and opacity by strength."""
    colour = POSITIVE if score > 0 else NEGATIVE if score < 0 else UNSCORED
    return {"color": colour, "linewidth": 0.5 + 3.0 * strength, "alpha": 0.22 + 0.68 * strength}


def draw_circuit(
    edges: Sequence[tuple[str, float]],
    folder: Path,
    stem: str = "circuit",
    *,
    formats: Sequence[str] = ("svg", "png", "pdf"),
    title: str = "",
    caption: str = "",
    maximum_edges: int = 800,
    kv_group: int = 1,
) -> list[Path]:
    """Return the files drawn, `folder/stem.format` for every format: one layout, so all show the same picture.

    `edges` are (name, score) pairs such as ("a0.h3->a1.h2<q>", 0.12); `caption` says what the circuit is worth
    ("12 of 110 edges, faithfulness 0.93, KL, counterfactual ablation"); `kv_group` is the number of query heads per
    key-value head. In the SVG, elements carry ids: `edge:NAME`, `node:NAME`, `label:NAME`, `port:NAME<q>`,
    `link:KV->HEAD`. An empty circuit gives input, logits and a note.

    Raises:
        ValueError: more than `maximum_edges` edges (dot takes .3 s for 500, a minute for 2000), a name that is no
            edge, an edge given twice, a score that is not finite, a key-value head with `kv_group` 1, or a format
            that is none of svg, png, pdf.
    """
    if len(edges) > maximum_edges:
        raise ValueError(
            f"the circuit has {len(edges)} edges, but a picture holds at most maximum_edges={maximum_edges}; "
            "raise the threshold or lower top_n to keep fewer"
        )
    drawn = parse_edges(edges)
    layout = lay_out(drawn, kv_group=kv_group)
    paths = [Path(folder) / f"{stem}.{suffix}" for suffix in formats]
    with plot_style():
        save_figure(circuit_figure(drawn, layout, title=title, caption=caption), paths)
    return paths


LEFT, RIGHT, LEGEND_WIDTH, MARGIN = 58.0, 26.0, 112.0, 14.0
LEGEND_LINE, LEGEND_GAP = 14.0, 8.0


def circuit_figure(drawn: Sequence[DrawnEdge], layout: Layout, *, title: str = "", caption: str = "") -> Figure:
    """Return the figure of a laid-out circuit: row labels | graph | legend, title above, caption below."""
    from matplotlib.figure import Figure

    legend = _legend(drawn, layout.nodes)
    legend_height = sum(height for height, _ in legend)
    graph_width, graph_height = max(layout.width, 120.0), max(layout.height, legend_height)
    width = LEFT + graph_width + RIGHT + LEGEND_WIDTH + MARGIN
    title_text, title_height = _wrapped(title, 12, 0.88 * width - 2 * MARGIN)
    caption_text, caption_height = _wrapped(caption, 9, width - 2 * MARGIN)
    height = 2 * MARGIN + graph_height + title_height + caption_height

    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))  # data units are points
    axes.set_axis_off()
    x = LEFT + (graph_width - layout.width) / 2
    y = MARGIN + caption_height + (graph_height - layout.height) / 2
    _draw_rows(axes, layout, y, right=LEFT + graph_width + 6)
    _draw_links_and_edges(axes, drawn, layout, x, y)
    _draw_nodes(axes, drawn, layout, x, y)
    if not drawn:
        axes.text(
            x + layout.width / 2, y + layout.height / 2, "no edges kept", ha="center", va="center", color=FAINT_INK
        )
    legend_top = MARGIN + caption_height + graph_height
    for line_height, draw in legend:
        draw(axes, LEFT + graph_width + RIGHT, legend_top - line_height / 2)
        legend_top -= line_height
    axes.text(MARGIN, height - MARGIN, title_text, va="top", size=12, weight="bold", gid="title")
    axes.text(MARGIN, MARGIN, caption_text, va="bottom", size=9, color=FAINT_INK, gid="caption")
    return figure


def _draw_rows(axes: Axes, layout: Layout, y: float, *, right: float) -> None:
    for label, row in layout.rows.items():
        axes.plot([LEFT - 6, right], [y + row, y + row], color=RULE, linewidth=0.8, zorder=0)
        axes.text(
            LEFT - 12, y + row, label, ha="right", va="center_baseline", size=8.5, color=FAINT_INK, gid=f"row:{label}"
        )


def _draw_links_and_edges(axes: Axes, drawn: Sequence[DrawnEdge], layout: Layout, x: float, y: float) -> None:
    for (group, head), points in layout.links.items():
        style: dict[str, Any] = {"color": "#B5B5B5", "linewidth": 1.0, "linestyle": (0, (1, 1.5)), "zorder": 1}
        axes.add_patch(_curve(points, x, y, gid=f"link:{group}->{head}", **style))
    strength, _ = strengths([edge.score for edge in drawn])
    # The strongest last, so that it lies on top.
    for rank, (size, edge) in enumerate(sorted(zip(strength, drawn, strict=True), key=lambda pair: pair[0])):
        style = edge_style(edge.score, size) | {"zorder": 2 + rank / (len(drawn) + 1)}
        axes.add_patch(_curve(layout.edges[edge.name], x, y, gid=f"edge:{edge.name}", **style))


def _curve(points: Sequence[Point], x: float, y: float, *, color: str, **style):
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    codes = [Curve.MOVETO] + [Curve.CURVE4] * (len(points) - 1)
    curve = Curve([(x + a, y + b) for a, b in points], codes)
    return PathPatch(curve, facecolor="none", edgecolor=color, capstyle="butt", clip_on=False, **style)


def _draw_nodes(axes: Axes, drawn: Sequence[DrawnEdge], layout: Layout, x: float, y: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    ports = sorted({(edge.node, edge.port) for edge in drawn if edge.port})
    for node, (node_x, node_y) in layout.nodes.items():
        width = NODE_WIDTH[kind(node)]
        corner = (x + node_x - width / 2, y + node_y - NODE_HEIGHT / 2)
        style = {"boxstyle": "round,pad=0,rounding_size=5", "clip_on": False, "zorder": 4, "gid": f"node:{node}"}
        colours = {"facecolor": KIND_COLOURS[kind(node)], "edgecolor": "#4A4A4A", "linewidth": 0.8}
        axes.add_patch(FancyBboxPatch(corner, width, NODE_HEIGHT, **style, **colours))
        raised = 4.5 if any(owner == node for owner, _ in ports) else 0.0
        label = node.removeprefix("input.") if kind(node) == "input" else node
        text = {"ha": "center", "va": "center_baseline", "zorder": 5}
        axes.text(x + node_x, y + node_y + raised, label, size=9.5, gid=f"label:{node}", **text)
    for node, port in ports:
        node_x, node_y = layout.nodes[node]
        at = (x + node_x + PORT_OFFSET[port], y + node_y - NODE_HEIGHT / 2 + 6)
        style = {"ha": "center", "va": "center_baseline", "zorder": 5, "color": FAINT_INK}
        axes.text(*at, port, size=8, gid=f"port:{node}<{port}>", **style)


LegendLine = tuple[float, Callable[["Axes", float, float], None]]  # its height, and how to draw it around (x, y)


def _legend(drawn: Sequence[DrawnEdge], nodes: Iterable[str]) -> list[LegendLine]:
    """Return the legend's lines from top to bottom: node kinds, signs, and what score a line width stands for."""
    present_kinds = {kind(node) for node in nodes}
    lines = [(LEGEND_LINE, _kind_line(each)) for each in KIND_NAMES if each in present_kinds]
    if any(".kv" in node for node in nodes):
        lines += [
            (LEGEND_LINE, _stroke_line("serves", {"color": "#B5B5B5", "linewidth": 1, "linestyle": (0, (1, 1.5))}))
        ]
    scores = [edge.score for edge in drawn]
    _, top = strengths(scores)
    signs = ((1, "score > 0"), (-1, "score < 0"), (0, "score = 0"))
    present = [(sign, text) for sign, text in signs if any((s > 0) - (s < 0) == sign for s in scores)]
    lines += [(LEGEND_GAP, lambda *_: None)] if present else []
    lines += [(LEGEND_LINE, _stroke_line(text, edge_style(sign, 0.6))) for sign, text in present]
    if top > 0 and len(set(map(abs, scores))) > 1:
        lines += [(LEGEND_GAP, lambda *_: None), (LEGEND_LINE, _heading_line("|score|"))]
        for fraction in (1.0, 0.25, 0.01):
            bound = "\N{GREATER-THAN OR EQUAL TO} " if fraction == 1 and top < max(map(abs, scores)) else ""
            style = edge_style(0, math.sqrt(fraction)) | {"color": "#333333"}
            lines += [(LEGEND_LINE, _stroke_line(f"{bound}{fraction * top:.2g}", style))]
    return lines


def _kind_line(each: str) -> Callable[[Axes, float, float], None]:
    def draw(axes: Axes, x: float, y: float) -> None:
        from matplotlib.patches import FancyBboxPatch

        style = {"facecolor": KIND_COLOURS[each], "edgecolor": "#4A4A4A", "linewidth": 0.7, "clip_on": False}
        axes.add_patch(FancyBboxPatch((x + 3, y - 4), 16, 8, boxstyle="round,pad=0,rounding_size=2", **style))
        axes.text(x + 28, y, KIND_NAMES[each], va="center_baseline", size=8.5)

    return draw


def _stroke_line(text: str, style: Mapping[str, Any]) -> Callable[[Axes, float, float], None]:
    def draw(axes: Axes, x: float, y: float) -> None:
        axes.plot([x, x + 22], [y, y], solid_capstyle="butt", clip_on=False, **style)
        axes.text(x + 28, y, text, va="center_baseline", size=8.5)

    return draw


def _heading_line(text: str) -> Callable[[Axes, float, float], None]:
    return lambda axes, x, y: axes.text(x, y, text, va="center_baseline", size=8.5, color=FAINT_INK) and None


def _wrapped(text: str, size: float, width: float) -> tuple[str, float]:
    """Return the text broken to a width in points, and the height it then takes, with a gap to what is next to it."""
    if not text:
        return "", 0.0
    lines = textwrap.wrap(text, max(20, int(width / (0.54 * size))))  # .54 em: DejaVu Sans' mean advance, and some
    return "\n".join(lines), len(lines) * 1.3 * size + 12


# --- the faithfulness curve -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FaithfulnessCurve:
    """One line of `draw_faithfulness_curve`: `faithfulness[i]` is what `edges[i]` kept edges reach."""

    name: str
    edges: Sequence[int]
    faithfulness: Sequence[float]


@dataclass(frozen=True)
class RandomBand:
    """The range that random circuits of `edges[i]` edges reach, such as their 5th to 95th percentile."""

    edges: Sequence[int]
    low: Sequence[float]
    high: Sequence[float]
    name: str = "random circuits"


def draw_faithfulness_curve(
    curves: Sequence[FaithfulnessCurve],
    path: Path,
    *,
    random_band: RandomBand | None = None,
    edges_total: int | None = None,
    title: str = "",
    caption: str = "",
) -> Path:
    """Return the file drawn: faithfulness against the number of edges kept (log axis), one line per curve.

    Dotted rules mark 1 (the full model) and 0 (everything ablated), a grey band random circuits of the same size,
    and a line at `edges_total` the whole graph. Points at 0 edges have no place on a log axis and are left out:
    faithfulness is 0 there by definition.

    Raises:
        ValueError: no curves, lengths that differ, a negative number of edges, or a value that is not finite.
    """
    if not curves:
        raise ValueError("there are 0 curves to draw; pass at least one")
    for curve in curves:
        _check_series(curve.name, curve.edges, curve.faithfulness)
    if random_band is not None:
        _check_series(random_band.name, random_band.edges, random_band.low)
        _check_series(random_band.name, random_band.edges, random_band.high)
    from matplotlib.figure import Figure

    with plot_style():
        figure = Figure(figsize=(6.6, 3.8), layout="constrained")
        axes = figure.add_subplot(xscale="log", xlabel="edges kept", ylabel="faithfulness")
        for level in (0.0, 1.0):
            axes.axhline(level, color="#9A9A9A", linewidth=0.8, linestyle=":", zorder=1)
        if random_band is not None:
            rows = sorted(zip(random_band.edges, random_band.low, random_band.high, strict=True))
            edges, low, high = zip(*(row for row in rows if row[0] > 0), strict=True)
            axes.fill_between(edges, low, high, color="#D9D9D9", linewidth=0, label=random_band.name, gid="random band")
        for colour, curve in zip(_cycle(SERIES_COLOURS, len(curves)), curves, strict=True):
            points = sorted(point for point in zip(curve.edges, curve.faithfulness, strict=True) if point[0] > 0)
            xs, ys = zip(*points, strict=True) if points else ((), ())
            axes.plot(xs, ys, color=colour, marker="o", markersize=3.5, label=curve.name, gid=f"curve:{curve.name}")
        if edges_total is not None:
            axes.axvline(edges_total, color="#9A9A9A", linewidth=0.8, zorder=1)
            label = {"xytext": (-3, 4), "textcoords": "offset points", "ha": "right", "va": "bottom", "rotation": 90}
            axes.annotate("all edges", (edges_total, 0), size=8, color=FAINT_INK, **label)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        figure.legend(loc="outside right upper", fontsize=8.5)
        annotate_figure(figure, title, caption)
        save_figure(figure, [Path(path)])
    return Path(path)


def _check_series(name: str, edges: Sequence[int], values: Sequence[float]) -> None:
    if len(edges) != len(values):
        raise ValueError(f"{name!r} has {len(edges)} edge counts but {len(values)} values; give one value per count")
    for count, value in zip(edges, values, strict=True):
        if count < 0 or not math.isfinite(value):
            raise ValueError(f"{name!r} has value {value} at {count} edges; counts must be >= 0 and values finite")


# --- shared by every figure of madcap ---------------------------------------------------------------------------


def plot_style() -> AbstractContextManager[None]:
    """Return a context in which matplotlib draws madcap's way, whatever the caller's own settings are.

    Restores the caller's settings on leaving. Salted ids and glyphs drawn as paths make an SVG the same on
    every machine; PDF text stays text (TrueType).
    """
    import matplotlib

    # The back end is the caller's business, and no part of a style.
    defaults: dict[Any, Any] = {
        key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")
    }
    ours = {
        "svg.hashsalt": "madcap",
        "svg.fonttype": "path",
        "pdf.fonttype": 42,
        "savefig.dpi": 160,
        "font.size": 9,
        "text.color": INK,
        "axes.edgecolor": "#4A4A4A",
        "axes.labelcolor": INK,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 1.6,
        "legend.frameon": False,
        "xtick.color": "#4A4A4A",
        "ytick.color": "#4A4A4A",
    }
    defaults.update(ours)
    return matplotlib.rc_context(defaults)


def save_figure(figure: Figure, paths: Sequence[Path]) -> None:
    """Write the figure to every path, the format by its suffix, without dates: same figure, same bytes.

    Raises:
        ValueError: a suffix other than .svg, .png, .pdf.
    """
    undated = {".svg": {"Date": None}, ".png": {}, ".pdf": {"CreationDate": None}}
    for path in paths:
        if path.suffix not in undated:
            raise ValueError(f"cannot draw {path.name}: the format {path.suffix!r} is none of {', '.join(undated)}")
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata=undated[path.suffix], facecolor="white")


def annotate_figure(figure: Figure, title: str, caption: str) -> None:
    """Put a bold title at the top left and a grey caption at the bottom left of a constrained figure."""
    width = figure.get_figwidth() * 72 - 12
    if title:
        figure.suptitle(_wrapped(title, 11, width)[0], x=0.01, ha="left", size=11, weight="bold")
    if caption:
        figure.supxlabel(_wrapped(caption, 8.5, width)[0], x=0.01, ha="left", size=8.5, color=FAINT_INK)


def _cycle(colours: Sequence[str], count: int) -> list[str]:
    return [colours[index % len(colours)] for index in range(count)]
