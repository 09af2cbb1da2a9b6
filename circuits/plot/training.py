"""How a learned mask was trained: its loss, its faithfulness and its size, step by step.

    draw_training([TrainingPoint(0, 1.9, 0.4, 850.0), TrainingPoint(1, 1.7, 0.5, 700.0)], path)

The format is the path's suffix: .svg, .png or .pdf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from circuits.plot.style import SERIES_COLOURS, saved_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RULE = "#9A9A9A"


@dataclass(frozen=True)
class TrainingPoint:
    """What one step came to."""

    step: int
    loss: float  # with the penalty
    faithfulness: float  # of the batch, under masks that were drawn
    edges: float  # expected, or units


def draw_training(
    points: Sequence[TrainingPoint],
    path: Path,
    *,
    edges_kept: int | None = None,
    noun: str = "edges",
    title: str = "",
    caption: str = "",
) -> Path:
    """Return the file drawn: loss, faithfulness and expected size (log axis) by step.

    A dotted rule marks the size of the circuit that was kept; `noun` is what it is made of.

    Raises:
        ValueError: fewer than two points, or a value that is not finite, or no edges.
    """
    _check(points)
    steps = [point.step for point in points]
    with saved_figure(path, (6.6, 5.2), title, caption) as figure:
        axes = figure.subplots(3, 1, sharex=True)
        panels = ("loss", "faithfulness", "edges")
        for place, name, colour in zip(axes, panels, SERIES_COLOURS, strict=False):
            values = [getattr(point, name) for point in points]
            place.plot(steps, values, color=colour, linewidth=1.1, gid=f"training:{name}")
            place.set_ylabel(name if name != "edges" else f"{noun} expected")
        axes[2].set_xlabel("step")
        _draw_sizes(axes[2], edges_kept)
    return Path(path)


def _draw_sizes(axes: Axes, edges_kept: int | None) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if edges_kept:
        axes.axhline(edges_kept, color=RULE, linewidth=0.8, linestyle=":", gid="edges kept")


def _check(points: Sequence[TrainingPoint]) -> None:
    if len(points) < 2:
        raise ValueError(f"{len(points)} steps of training make no curve; train for 2 or more")
    for point in points:
        if not all(map(math.isfinite, astuple(point))) or point.edges <= 0:
            raise ValueError(
                f"{point} of the training cannot be drawn: values must be finite, edges above 0"
            )
