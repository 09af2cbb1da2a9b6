"""The picture of a circuit: its graph, laid out by `circuits.plot.layout`, with a legend.

    draw_circuit([("input->a0.h3<v>", 0.8), ("a0.h3->a1.h2<q>", -0.2), ("a1.h2->logits", 0.5)],
    Path("out")) # -> out/circuit.svg, out/circuit.png, out/circuit.pdf

Rows are layers, node colour is kind, edge colour is sign, edge width and opacity are strength
(`circuits.plot.layout`; where outliers share the widest line, the legend says ">="). Every edge
runs upwards, so there are no arrow heads; where a head reads, a small `q`, `k` or `v` stands at the
reading end.

The layout is made once; matplotlib then draws SVG, PNG and PDF from its coordinates. It brings its
own fonts, so a machine without any gives the same picture. Same input, same bytes, whatever the
order of the edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuits.plot.layout import (
    NODE_HEIGHT,
    NODE_WIDTH,
    PORT_OFFSET,
    DrawnEdge,
    Layout,
    Point,
    kind,
    lay_out,
    parse_edges,
    strengths,
)
from circuits.plot.style import FAINT_INK, NEGATIVE, POSITIVE, plot_style, save_figure, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNSCORED, RULE = "#8A8A8A", "#ECECEC"
KIND_COLOURS = {"input": "#F3D06B", "head": "#D6E9F5", "mlp": "#CDE8DC", "logits": "#EBCFE0"}
KIND_NAMES = {"input": "input", "head": "attention head", "mlp": "MLP", "logits": "logits"}


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
    """Return the files drawn, `folder/stem.format` for every format: one layout, so all show the
    same picture.

    `edges` are (name, score) pairs such as ("a0.h3->a1.h2<q>", 0.12); `caption` says what the
    circuit is worth ("12 of 110 edges, faithfulness 0.93, KL, counterfactual ablation"); `kv_group`
    is the number of query heads per key-value head. In the SVG, elements carry ids: `edge:NAME`,
    `node:NAME`, `label:NAME`, `port:NAME<q>`, `link:KV->HEAD`. An empty circuit gives input, logits
    and a note.

    Raises: ValueError: more than `maximum_edges` edges (dot takes .3 s for 500, a minute for 2000),
        a name that is no
            edge, an edge given twice, a score that is not finite, a key-value head with `kv_group`
            1, or a format that is none of svg, png, pdf.
    """
    if len(edges) > maximum_edges:
        raise ValueError(
            f"the circuit has {len(edges)} edges, but a picture holds at most "
            f"maximum_edges={maximum_edges}; "
            "keep fewer edges (selection.edges when extracting), or raise maximum_edges"
        )
    drawn = parse_edges(edges)
    layout = lay_out(drawn, kv_group=kv_group)
    paths = [Path(folder) / f"{stem}.{suffix}" for suffix in formats]
    with plot_style():
        save_figure(circuit_figure(drawn, layout, title=title, caption=caption), paths)
    return paths


LEFT, RIGHT, LEGEND_WIDTH, MARGIN = 58.0, 26.0, 112.0, 14.0
LEGEND_LINE, LEGEND_GAP = 14.0, 8.0


def circuit_figure(
    drawn: Sequence[DrawnEdge], layout: Layout, *, title: str = "", caption: str = ""
) -> Figure:
    """Return the figure of a laid-out circuit: row labels | graph | legend, title above, caption
    below.
    """
    from matplotlib.figure import Figure

    legend = _legend(drawn, layout.nodes)
    legend_height = sum(height for height, _ in legend)
    graph_width, graph_height = max(layout.width, 120.0), max(layout.height, legend_height)
    width = LEFT + graph_width + RIGHT + LEGEND_WIDTH + MARGIN
    title_text, title_height = wrapped(title, 12, 0.88 * width - 2 * MARGIN)
    caption_text, caption_height = wrapped(caption, 9, width - 2 * MARGIN)
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
            x + layout.width / 2,
            y + layout.height / 2,
            "no edges kept",
            ha="center",
            va="center",
            color=FAINT_INK,
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
            LEFT - 12,
            y + row,
            label,
            ha="right",
            va="center_baseline",
            size=8.5,
            color=FAINT_INK,
            gid=f"row:{label}",
        )


def _draw_links_and_edges(
    axes: Axes, drawn: Sequence[DrawnEdge], layout: Layout, x: float, y: float
) -> None:
    for (group, head), points in layout.links.items():
        style: dict[str, Any] = {
            "color": "#B5B5B5",
            "linewidth": 1.0,
            "linestyle": (0, (1, 1.5)),
            "zorder": 1,
        }
        axes.add_patch(_curve(points, x, y, gid=f"link:{group}->{head}", **style))
    strength, _ = strengths([edge.score for edge in drawn])
    # The strongest last, so that it lies on top.
    for rank, (size, edge) in enumerate(
        sorted(zip(strength, drawn, strict=True), key=lambda pair: pair[0])
    ):
        style = edge_style(edge.score, size) | {"zorder": 2 + rank / (len(drawn) + 1)}
        axes.add_patch(_curve(layout.edges[edge.name], x, y, gid=f"edge:{edge.name}", **style))


def _curve(points: Sequence[Point], x: float, y: float, *, color: str, **style):
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    codes = [Curve.MOVETO] + [Curve.CURVE4] * (len(points) - 1)
    curve = Curve([(x + a, y + b) for a, b in points], codes)
    return PathPatch(
        curve, facecolor="none", edgecolor=color, capstyle="butt", clip_on=False, **style
    )


def _draw_nodes(axes: Axes, drawn: Sequence[DrawnEdge], layout: Layout, x: float, y: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    ports = sorted({(edge.node, edge.port) for edge in drawn if edge.port})
    for node, (node_x, node_y) in layout.nodes.items():
        width = NODE_WIDTH[kind(node)]
        corner = (x + node_x - width / 2, y + node_y - NODE_HEIGHT / 2)
        style = {
            "boxstyle": "round,pad=0,rounding_size=5",
            "clip_on": False,
            "zorder": 4,
            "gid": f"node:{node}",
        }
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


LegendLine = tuple[
    float, Callable[["Axes", float, float], None]
]  # its height, and how to draw it around (x, y)


def _legend(drawn: Sequence[DrawnEdge], nodes: Iterable[str]) -> list[LegendLine]:
    """Return the legend's lines from top to bottom: node kinds, signs, and what score a line width
    stands for.
    """
    present_kinds = {kind(node) for node in nodes}
    lines = [(LEGEND_LINE, _kind_line(each)) for each in KIND_NAMES if each in present_kinds]
    if any(".kv" in node for node in nodes):
        lines += [
            (
                LEGEND_LINE,
                _stroke_line(
                    "serves", {"color": "#B5B5B5", "linewidth": 1, "linestyle": (0, (1, 1.5))}
                ),
            )
        ]
    scores = [edge.score for edge in drawn]
    _, top = strengths(scores)
    signs = ((1, "score > 0"), (-1, "score < 0"), (0, "score = 0"))
    present = [
        (sign, text) for sign, text in signs if any((s > 0) - (s < 0) == sign for s in scores)
    ]
    lines += [(LEGEND_GAP, lambda *_: None)] if present else []
    lines += [(LEGEND_LINE, _stroke_line(text, edge_style(sign, 0.6))) for sign, text in present]
    if top > 0 and len(set(map(abs, scores))) > 1:
        lines += [(LEGEND_GAP, lambda *_: None), (LEGEND_LINE, _heading_line("|score|"))]
        for fraction in (1.0, 0.25, 0.01):
            bound = (
                "\N{GREATER-THAN OR EQUAL TO} "
                if fraction == 1 and top < max(map(abs, scores))
                else ""
            )
            style = edge_style(0, math.sqrt(fraction)) | {"color": "#333333"}
            lines += [(LEGEND_LINE, _stroke_line(f"{bound}{fraction * top:.2g}", style))]
    return lines


def _kind_line(each: str) -> Callable[[Axes, float, float], None]:
    def draw(axes: Axes, x: float, y: float) -> None:
        from matplotlib.patches import FancyBboxPatch

        style = {
            "facecolor": KIND_COLOURS[each],
            "edgecolor": "#4A4A4A",
            "linewidth": 0.7,
            "clip_on": False,
        }
        axes.add_patch(
            FancyBboxPatch((x + 3, y - 4), 16, 8, boxstyle="round,pad=0,rounding_size=2", **style)
        )
        axes.text(x + 28, y, KIND_NAMES[each], va="center_baseline", size=8.5)

    return draw


def _stroke_line(text: str, style: Mapping[str, Any]) -> Callable[[Axes, float, float], None]:
    def draw(axes: Axes, x: float, y: float) -> None:
        axes.plot([x, x + 22], [y, y], solid_capstyle="butt", clip_on=False, **style)
        axes.text(x + 28, y, text, va="center_baseline", size=8.5)

    return draw


def _heading_line(text: str) -> Callable[[Axes, float, float], None]:
    return lambda axes, x, y: (
        axes.text(x, y, text, va="center_baseline", size=8.5, color=FAINT_INK) and None
    )
