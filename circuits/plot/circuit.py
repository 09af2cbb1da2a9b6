"""The picture of a circuit: its graph, laid out by `circuits.plot.layout`, with a legend.

    edges = [("input->a0.h3<v>", 0.8), ("a0.h3->a1.h2<q>", -0.2), ("a1.h2->logits", 0.5)]
    draw_circuit(edges, Path("out"))  # -> out/circuit.svg, out/circuit.png, out/circuit.pdf

Rows are layers, node colour is kind, edge colour is sign, edge width and opacity are strength
(where outliers share the widest line, the legend says ">="). Every edge runs upwards, so there are
no arrow heads; a small `q`, `k` or `v` stands where a head reads. Same input, same bytes, whatever
the order of the edges and the fonts of the machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuits.names import reader_name
from circuits.plot.layout import (
    NODE_HEIGHT,
    NODE_WIDTH,
    PORT_OFFSET,
    DrawnEdge,
    Layout,
    Point,
    is_key_value,
    kind,
    lay_out,
    parse_edges,
    strengths,
)
from circuits.plot.style import (
    FAINT_INK,
    INK,
    NEGATIVE,
    POSITIVE,
    Style,
    plot_style,
    save_figure,
    svg_text,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAXIMUM_EDGES = 800  # dot takes .3 s for 500, a minute for 2000

UNSCORED, RULE, OUTLINE = "#8A8A8A", "#ECECEC", "#4A4A4A"
KIND_COLOURS = {"input": "#F3D06B", "head": "#D6E9F5", "mlp": "#CDE8DC", "logits": "#EBCFE0"}
KIND_NAMES = {"input": "input", "head": "attention head", "mlp": "MLP", "logits": "logits"}
# Lighter shades of `SERIES_COLOURS`, on which a label can be read.
GROUP_COLOURS = tuple("#F0A04B #F5CFA0 #6FB7E6 #B9A3E3 #E58FB8 #BDBDBD #E9E15A".split())
LINK: Style = {"color": "#B5B5B5", "linewidth": 1.0, "linestyle": (0, (1, 1.5))}
CENTRED: Style = {"ha": "center", "va": "center_baseline"}

LEFT, RIGHT, LEGEND_WIDTH, MARGIN = 58.0, 26.0, 112.0, 14.0  # points
LABEL_ADVANCE = 4.8  # of a row's label per character, in points
PAGE = 800.0  # points of height that are seen at once, each with a legend


def edge_style(score: float, strength: float) -> Style:
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
    maximum_edges: int = MAXIMUM_EDGES,
    kv_group: int = 1,
    groups: Mapping[str, str] | None = None,
) -> list[Path]:
    """Return the files drawn, `folder/stem.format` for every format, all of one layout.

    `edges` are (name, score) pairs such as ("a0.h3->a1.h2<q>", 0.12); `caption` says what the
    circuit is worth ("12 of 110 edges, faithfulness 0.93, KL, counterfactual ablation"); `kv_group`
    is the number of query heads per key-value head; `groups` gives nodes the name of a group, such
    as the role of a head, whose colour they then have, as the legend tells. In the SVG, elements
    carry ids: `edge:NAME`, `node:NAME`, `label:NAME`, `port:NAME<q>`, `link:KV->HEAD`. An empty
    circuit gives input, logits and a note.

    >>> from tempfile import TemporaryDirectory
    >>> edges = [("input->a0.h3<v>", 0.8), ("a0.h3->logits", 0.5)]
    >>> with TemporaryDirectory() as folder:
    ...     [path.name for path in draw_circuit(edges, Path(folder), formats=["svg"])]
    ['circuit.svg']

    Raises:
        ValueError: more than `maximum_edges` edges, a name that is no edge, an edge given twice, a
            score that is not finite, a key-value head with `kv_group` 1, a format that is none of
            svg, png, pdf, or more groups than there are colours.
    """
    paths = [Path(folder) / f"{stem}.{suffix}" for suffix in formats]
    drawn, layout = _laid_out(edges, maximum_edges, kv_group)
    with plot_style():
        figure = circuit_figure(drawn, layout, title=title, caption=caption, groups=groups)
        save_figure(figure, paths)
    return paths


def circuit_svg(edges: Sequence[tuple[str, float]], *, caption: str = "", kv_group: int = 1) -> str:
    """Return the picture as an `<svg>` element for a page; ValueError as `draw_circuit`."""
    drawn, layout = _laid_out(edges, MAXIMUM_EDGES, kv_group)
    with plot_style():
        return svg_text(circuit_figure(drawn, layout, caption=caption))


def _laid_out(
    edges: Sequence[tuple[str, float]], maximum_edges: int, kv_group: int
) -> tuple[tuple[DrawnEdge, ...], Layout]:
    if len(edges) > maximum_edges:
        raise ValueError(
            f"the circuit has {len(edges)} edges, but a picture holds at most "
            f"maximum_edges={maximum_edges}; draw its strongest (`madcap plot circuit=DIR "
            "edges=300`, Circuit.draw(FILE, edges=300)), or raise maximum_edges"
        )
    drawn = parse_edges(edges)
    return drawn, lay_out(drawn, kv_group=kv_group)


def circuit_figure(
    drawn: Sequence[DrawnEdge],
    layout: Layout,
    *,
    title: str = "",
    caption: str = "",
    groups: Mapping[str, str] | None = None,
) -> Figure:
    """Return the figure: row labels | graph | legend, title above, caption below."""
    from matplotlib.figure import Figure

    groups = {node: name for node, name in (groups or {}).items() if node in layout.nodes}
    colours = _group_colours(groups)
    legend = _legend(drawn, layout.nodes, colours)
    legend_height = sum(line.height for line in legend)
    graph_width, graph_height = max(layout.width, 120.0), max(layout.height, legend_height)
    left = max(LEFT, 20 + LABEL_ADVANCE * max(map(len, layout.rows)))
    width = left + graph_width + RIGHT + LEGEND_WIDTH + MARGIN
    title_text, title_height = wrapped(title, 12, 0.88 * width - 2 * MARGIN)
    caption_text, caption_height = wrapped(caption, 9, width - 2 * MARGIN)
    height = 2 * MARGIN + graph_height + title_height + caption_height

    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))  # data units are points
    axes.set_axis_off()
    x = left + (graph_width - layout.width) / 2
    y = MARGIN + caption_height + (graph_height - layout.height) / 2
    _draw_rows(axes, layout, y, left=left, right=left + graph_width + 6)
    _draw_links_and_edges(axes, drawn, layout, x, y)
    own = {node: KIND_COLOURS[kind(node)] for node in layout.nodes}
    own |= {node: colours[name] for node, name in groups.items()}
    _draw_nodes(axes, drawn, layout, x, y, own)
    if not drawn:
        middle = x + layout.width / 2, y + layout.height / 2
        axes.text(*middle, "no edges kept", ha="center", va="center", color=FAINT_INK)
    for above in _legend_places(graph_height, legend_height):
        top = MARGIN + caption_height + above
        _draw_legend(axes, legend, left + graph_width + RIGHT, top)
    axes.text(MARGIN, height - MARGIN, title_text, va="top", size=12, weight="bold", gid="title")
    axes.text(MARGIN, MARGIN, caption_text, va="bottom", size=9, color=FAINT_INK, gid="caption")
    return figure


def _legend_places(graph_height: float, legend_height: float) -> list[float]:
    """Return how far above the graph's lower end legends begin: one to each page of a tall one."""
    count = max(1, round(graph_height / PAGE))
    step = (graph_height - legend_height) / max(1, count - 1)
    return [graph_height - index * step for index in range(count)]


def _draw_rows(axes: Axes, layout: Layout, y: float, *, left: float, right: float) -> None:
    text = {"ha": "right", "va": "center_baseline", "size": 8.5, "color": FAINT_INK}
    for label, row in layout.rows.items():
        axes.plot([left - 6, right], [y + row, y + row], color=RULE, linewidth=0.8, zorder=0)
        axes.text(left - 12, y + row, label, gid=f"row:{label}", **text)


def _draw_links_and_edges(
    axes: Axes, drawn: Sequence[DrawnEdge], layout: Layout, x: float, y: float
) -> None:
    for (group, head), points in layout.links.items():
        axes.add_patch(_curve(points, x, y, gid=f"link:{group}->{head}", zorder=1, **LINK))
    strength, _ = strengths([edge.score for edge in drawn])
    weak_to_strong = sorted(zip(strength, drawn, strict=True), key=lambda pair: pair[0])
    for rank, (size, edge) in enumerate(weak_to_strong):  # the strongest lies on top
        style = edge_style(edge.score, size) | {"gid": f"edge:{edge.name}"}
        zorder = 2 + rank / (len(drawn) + 1)
        axes.add_patch(_curve(layout.edges[edge.name], x, y, zorder=zorder, **style))


def _curve(points: Sequence[Point], x: float, y: float, *, color: str, **style):
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    codes = [Curve.MOVETO] + [Curve.CURVE4] * (len(points) - 1)
    curve = Curve([(x + a, y + b) for a, b in points], codes)
    lines = {"facecolor": "none", "edgecolor": color, "capstyle": "butt", "clip_on": False}
    return PathPatch(curve, **lines, **style)


def _group_colours(groups: Mapping[str, str]) -> dict[str, str]:
    """Return the colour of each group, in the order in which they are first named."""
    names = list(dict.fromkeys(groups.values()))
    if len(names) > len(GROUP_COLOURS):
        raise ValueError(
            f"{len(names)} groups, but there are {len(GROUP_COLOURS)} colours to tell them apart; "
            "give fewer"
        )
    return dict(zip(names, GROUP_COLOURS))


def _draw_nodes(
    axes: Axes,
    drawn: Sequence[DrawnEdge],
    layout: Layout,
    x: float,
    y: float,
    colours: Mapping[str, str],
) -> None:
    ports = sorted({(edge.node, edge.port) for edge in drawn if edge.port})
    with_ports = {node for node, _ in ports}
    for node, (node_x, node_y) in layout.nodes.items():
        width = NODE_WIDTH[kind(node)]
        corner = (x + node_x - width / 2, y + node_y - NODE_HEIGHT / 2)
        style = {"linewidth": 0.8, "zorder": 4, "gid": f"node:{node}"}
        axes.add_patch(_box(corner, width, NODE_HEIGHT, colours[node], rounding=5, **style))
        raised = 4.5 if node in with_ports else 0.0
        label = node.removeprefix("input.")
        at = (x + node_x, y + node_y + raised)
        axes.text(*at, label, size=9.5, zorder=5, gid=f"label:{node}", **CENTRED)
    for node, port in ports:
        node_x, node_y = layout.nodes[node]
        at = (x + node_x + PORT_OFFSET[port], y + node_y - NODE_HEIGHT / 2 + 6)
        gid = f"port:{reader_name(node, port)}"
        axes.text(*at, port, size=8, color=FAINT_INK, zorder=5, gid=gid, **CENTRED)


def _box(corner: Point, width: float, height: float, colour: str, *, rounding: int, **style):
    from matplotlib.patches import FancyBboxPatch

    shape = f"round,pad=0,rounding_size={rounding}"
    colours = {"facecolor": colour, "edgecolor": OUTLINE}
    return FancyBboxPatch(corner, width, height, boxstyle=shape, clip_on=False, **colours, **style)


# ---- legend --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LegendLine:
    """A text after a box or a stroke, at the left if it has neither."""

    text: str = ""
    colour: str = ""  # of the box
    stroke: Mapping[str, Any] | None = None
    height: float = 14.0  # points


GAP = LegendLine(height=8.0)


def _draw_legend(axes: Axes, lines: Sequence[LegendLine], x: float, top: float) -> None:
    for line in lines:
        y = top - line.height / 2
        top -= line.height
        marked = line.colour or line.stroke
        if line.colour:
            axes.add_patch(_box((x + 3, y - 4), 16, 8, line.colour, rounding=2, linewidth=0.7))
        if line.stroke:
            axes.plot([x, x + 22], [y, y], solid_capstyle="butt", clip_on=False, **line.stroke)
        if line.text:
            style = {"size": 8.5, "va": "center_baseline", "color": INK if marked else FAINT_INK}
            axes.text(x + 28 if marked else x, y, line.text, **style)


def _legend(
    drawn: Sequence[DrawnEdge], nodes: Iterable[str], groups: Mapping[str, str]
) -> list[LegendLine]:
    """Return the legend, from the top: kinds and groups of nodes, signs, what a width means."""
    present = {kind(node) for node in nodes}
    kinds = {name: KIND_COLOURS[each] for each, name in KIND_NAMES.items() if each in present}
    lines = [LegendLine(name, colour) for name, colour in (kinds | dict(groups)).items()]
    if any(map(is_key_value, nodes)):
        lines.append(LegendLine("serves", stroke=LINK))
    scores = [edge.score for edge in drawn]
    return lines + _sign_lines(scores) + _width_lines(scores)


def _sign_lines(scores: Sequence[float]) -> list[LegendLine]:
    lines = [GAP]
    for sign, text in ((1, "score > 0"), (-1, "score < 0"), (0, "score = 0")):
        if any((score > 0) - (score < 0) == sign for score in scores):
            lines.append(LegendLine(text, stroke=edge_style(sign, 0.6)))
    return lines if scores else []


def _width_lines(scores: Sequence[float]) -> list[LegendLine]:
    sizes = {abs(score) for score in scores}
    if len(sizes) < 2:
        return []
    _, top = strengths(scores)
    lines = [GAP, LegendLine("|score|")]
    for fraction in (1.0, 0.25, 0.01):
        shared = fraction == 1 and top < max(sizes)  # by all larger scores
        bound = "\N{GREATER-THAN OR EQUAL TO} " if shared else ""
        style = edge_style(0, math.sqrt(fraction)) | {"color": "#333333"}
        lines.append(LegendLine(f"{bound}{fraction * top:.2g}", stroke=style))
    return lines
