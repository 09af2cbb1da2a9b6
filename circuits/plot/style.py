"""What every figure of madcap shares, its colours, matplotlib style and saving, and faithfulness
against edges kept.

    with plot_style():
        figure = Figure(layout="constrained")
        annotate_figure(figure, "Induction", "9 of 110 edges")
        save_figure(figure, [Path("out/figure.svg")])

    draw_faithfulness_curve([FaithfulnessCurve("EAP-IG", [1, 10, 110], [0.2, 0.9, 1.0])],
    Path("out/curve.svg"))

The format is the path's suffix: .svg, .png or .pdf. Files carry no dates: same input, same bytes.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours (2008, "Color universal design"), told apart with every common colour
# blindness.
POSITIVE, NEGATIVE = "#0072B2", "#D5402B"
SERIES_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#000000",
    "#7A6A00",
)
INK, FAINT_INK = "#1A1A1A", "#5F5F5F"

LEGEND_TEXT = 175.0  # points: the longest name in the legend beside a faithfulness curve


def plot_style() -> AbstractContextManager[None]:
    """Return a context in which matplotlib draws madcap's way, whatever the caller's own settings
    are.

    Restores the caller's settings on leaving. Salted ids and glyphs drawn as paths make an SVG the
    same on every machine; PDF text stays text (TrueType).
    """
    import matplotlib

    # The back end is the caller's business, and no part of a style.
    defaults: dict[Any, Any] = {
        key: value
        for key, value in matplotlib.rcParamsDefault.items()
        if not key.startswith("backend")
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
    """Write the figure to every path, the format by its suffix, without dates: same figure, same
    bytes.

    Raises:
        ValueError: a suffix other than .svg, .png, .pdf.
    """
    undated = {".svg": {"Date": None}, ".png": {}, ".pdf": {"CreationDate": None}}
    for path in paths:
        if path.suffix not in undated:
            raise ValueError(
                f"cannot draw {path.name}: the format {path.suffix!r} is none of "
                f"{', '.join(undated)}"
            )
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata=undated[path.suffix], facecolor="white")


def annotate_figure(figure: Figure, title: str, caption: str) -> None:
    """Put a bold title at the top left and a grey caption at the bottom left of a constrained
    figure.
    """
    width = figure.get_figwidth() * 72 - 12
    if title:
        figure.suptitle(wrapped(title, 11, width)[0], x=0.01, ha="left", size=11, weight="bold")
    if caption:
        figure.supxlabel(
            wrapped(caption, 8.5, width)[0], x=0.01, ha="left", size=8.5, color=FAINT_INK
        )


def wrapped(text: str, size: float, width: float) -> tuple[str, float]:
    """Return the text broken to a width in points, and the height it then takes, with a gap to what
    is next to it.
    """
    if not text:
        return "", 0.0
    lines = textwrap.wrap(
        text, max(20, int(width / (0.54 * size)))
    )  # .54 em: DejaVu Sans' mean advance, and some
    return "\n".join(lines), len(lines) * 1.3 * size + 12


# --- the faithfulness curve
# -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FaithfulnessCurve:
    """One line of `draw_faithfulness_curve`: `faithfulness[i]` is what `edges[i]` kept edges reach."""

    name: str
    edges: Sequence[int]
    faithfulness: Sequence[float]


@dataclass(frozen=True)
class RandomBand:
    """The range that random circuits of `edges[i]` edges reach, such as their 5th to 95th
    percentile.
    """

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
    """Return the file drawn: faithfulness against the number of edges kept (log axis), one line per
    curve.

    Dotted rules mark 1 (the full model) and 0 (everything ablated), a grey band random circuits of
    the same size, and a line at `edges_total` the whole graph. Points at 0 edges have no place on a
    log axis and are left out: faithfulness is 0 there by definition.

    Raises: ValueError: no curves, lengths that differ, a negative number of edges, or a value that
        is not finite.
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
        # Long names break and many names make the figure higher, so that the legend is never cut.
        names = [wrapped(curve.name, 8.5, LEGEND_TEXT)[0] for curve in curves]
        band_name = (
            wrapped(random_band.name, 8.5, LEGEND_TEXT)[0] if random_band is not None else ""
        )
        legend_lines = sum(1 + name.count("\n") for name in (*names, band_name))
        figure = Figure(
            figsize=(6.6, max(3.8, (14 * legend_lines + 12) / 72)), layout="constrained"
        )
        axes = figure.add_subplot(xscale="log", xlabel="edges kept", ylabel="faithfulness")
        for level in (0.0, 1.0):
            axes.axhline(level, color="#9A9A9A", linewidth=0.8, linestyle=":", zorder=1)
        if random_band is not None:
            rows = sorted(zip(random_band.edges, random_band.low, random_band.high, strict=True))
            edges, low, high = zip(*(row for row in rows if row[0] > 0), strict=True)
            axes.fill_between(
                edges, low, high, color="#D9D9D9", linewidth=0, label=band_name, gid="random band"
            )
        for index, (curve, name) in enumerate(zip(curves, names, strict=True)):
            colour = SERIES_COLOURS[index % len(SERIES_COLOURS)]
            points = sorted(
                point for point in zip(curve.edges, curve.faithfulness, strict=True) if point[0] > 0
            )
            xs, ys = zip(*points, strict=True) if points else ((), ())
            axes.plot(
                xs,
                ys,
                color=colour,
                marker="o",
                markersize=3.5,
                label=name,
                gid=f"curve:{curve.name}",
            )
        if edges_total is not None:
            axes.axvline(edges_total, color="#9A9A9A", linewidth=0.8, zorder=1)
            label = {
                "xytext": (-3, 4),
                "textcoords": "offset points",
                "ha": "right",
                "va": "bottom",
                "rotation": 90,
            }
            axes.annotate("all edges", (edges_total, 0), size=8, color=FAINT_INK, **label)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        figure.legend(loc="outside right upper", fontsize=8.5)
        annotate_figure(figure, title, caption)
        save_figure(figure, [Path(path)])
    return Path(path)


def _check_series(name: str, edges: Sequence[int], values: Sequence[float]) -> None:
    if len(edges) != len(values):
        raise ValueError(
            f"{name!r} has {len(edges)} edge counts but {len(values)} values; give one value per "
            "count"
        )
    for count, value in zip(edges, values, strict=True):
        if count < 0 or not math.isfinite(value):
            raise ValueError(
                f"{name!r} has value {value} at {count} edges; counts must be >= 0 and values "
                "finite"
            )
