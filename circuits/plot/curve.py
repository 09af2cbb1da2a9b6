"""Faithfulness against the number of edges kept.

    draw_faithfulness_curve([FaithfulnessCurve("EAP-IG", [1, 10, 110], [0.2, 0.9, 1.0])], path)

The format is the path's suffix: .svg, .png or .pdf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from circuits.plot.style import FAINT_INK, SERIES_COLOURS, Style, saved_figure, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEGEND_TEXT = 175.0  # points: the longest line of a name in the legend beside the curves
RULE = "#9A9A9A"


@dataclass(frozen=True)
class FaithfulnessCurve:
    """One line of `draw_faithfulness_curve`: `edges[i]` kept edges reach `faithfulness[i]`."""

    name: str
    edges: Sequence[int]
    faithfulness: Sequence[float]
    errors: Sequence[float] | None = None  # standard errors, drawn as bars
    chosen: tuple[int, float] | None = None  # edges and faithfulness of the circuit itself


@dataclass(frozen=True)
class RandomBand:
    """What random circuits of `edges[i]` edges reach, such as their 5th to 95th percentile."""

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
    noun: str = "edges",
) -> Path:
    """Return the file drawn: faithfulness against edges or units kept (log axis), a line per curve.

    Dotted rules mark 1 (the full model) and 0 (everything ablated), a grey band random circuits of
    the same size, and a line at `edges_total` the whole graph. Points at 0 edges have no place on a
    log axis and are left out: faithfulness is 0 there by definition.

    Raises:
        ValueError: no curves, lengths that differ, a negative number of edges, or a value that is
            not finite.
    """
    _check(curves, random_band)
    with saved_figure(path, (6.6, _height(curves, random_band)), title, caption) as figure:
        axes = figure.add_subplot(xscale="log", xlabel=f"{noun} kept", ylabel="faithfulness")
        _draw_bounds(axes, random_band)
        for index, curve in enumerate(curves):
            _draw_curve(axes, curve, SERIES_COLOURS[index % len(SERIES_COLOURS)])
        if edges_total is not None:
            _draw_whole_graph(axes, edges_total, noun)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        figure.legend(loc="outside right upper", fontsize=8.5)
    return Path(path)


def _draw_bounds(axes: Axes, band: RandomBand | None) -> None:
    """Draw what curves are read against: nothing kept, everything kept, random circuits."""
    for level in (0.0, 1.0):
        axes.axhline(level, color=RULE, linewidth=0.8, linestyle=":", zorder=1)
    if band is not None:
        edges, low, high = _rising(band.edges, band.low, band.high)
        style: Style = {"color": "#D9D9D9", "linewidth": 0, "gid": "random band"}
        axes.fill_between(edges, low, high, label=_legend_name(band.name), **style)


def _draw_whole_graph(axes: Axes, edges_total: int, noun: str) -> None:
    axes.axvline(edges_total, color=RULE, linewidth=0.8, zorder=1)
    place = {"xytext": (-3, 4), "textcoords": "offset points", "ha": "right", "va": "bottom"}
    axes.annotate(f"all {noun}", (edges_total, 0), size=8, color=FAINT_INK, rotation=90, **place)


def _draw_curve(axes: Axes, curve: FaithfulnessCurve, colour: str) -> None:
    edges, faithfulness = _rising(curve.edges, curve.faithfulness)
    style = {"color": colour, "marker": "o", "markersize": 3.5, "gid": f"curve:{curve.name}"}
    axes.plot(edges, faithfulness, label=_legend_name(curve.name), **style)
    if curve.chosen is not None and curve.chosen[0] > 0:
        ring: Style = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "color": colour}
        axes.plot(*curve.chosen, **ring, gid=f"chosen:{curve.name}")
    if curve.errors is not None:
        _, errors = _rising(curve.edges, curve.errors)
        bars: Style = {"fmt": "none", "ecolor": colour, "elinewidth": 0.8, "alpha": 0.6}
        axes.errorbar(edges, faithfulness, errors, **bars)


def _rising(edges: Sequence[int], *values: Sequence[float]) -> list[tuple[float, ...]]:
    """Return edge counts and values by rising count, those above 0."""
    rows = sorted(row for row in zip(edges, *values, strict=True) if row[0] > 0)
    return list(zip(*rows, strict=True)) or [()] * (1 + len(values))


def _legend_name(name: str) -> str:
    return wrapped(name, 8.5, LEGEND_TEXT)[0]


def _height(curves: Sequence[FaithfulnessCurve], band: RandomBand | None) -> float:
    """Return the figure's height in inches: many or long names make it higher, none is cut."""
    names = [curve.name for curve in curves] + [band.name if band is not None else ""]
    lines = sum(1 + _legend_name(name).count("\n") for name in names)
    return max(3.8, (14 * lines + 12) / 72)


def _check(curves: Sequence[FaithfulnessCurve], band: RandomBand | None) -> None:
    if not curves:
        raise ValueError("there are 0 curves to draw; pass at least one")
    for curve in curves:
        _check_series(curve.name, curve.edges, curve.faithfulness)
        if curve.errors is not None:
            _check_series(curve.name, curve.edges, curve.errors)
    if band is not None:
        _check_series(band.name, band.edges, band.low)
        _check_series(band.name, band.edges, band.high)


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
