"""The picture of methods put to the test: a cell for each program and method, in each variant.

Colour and number are the edge AUC; a tick says that the circuit was found exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from abstraction.ground_truth.scoreboard import Result
from circuits.plot.style import INK, POSITIVE, saved_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CELL = 0.42  # inches


def draw_truth(
    results: Sequence[Result], path: Path, *, title: str = "", caption: str = ""
) -> Path:
    """Returns the file drawn, its format by its suffix; ValueError without results."""
    if not results:
        raise ValueError("there are 0 results to draw; run at least one method on one program")
    variants = _distinct(result.variant for result in results)
    programs = _distinct(result.program for result in results)
    methods = _distinct(result.method for result in results)
    size = (2.0 + 1.6 * CELL * len(methods) * len(variants), 1.6 + CELL * len(programs))
    with saved_figure(path, size, title, caption) as figure:
        panels = figure.subplots(1, len(variants), sharey=True, squeeze=False)[0]
        for axes, variant in zip(panels, variants, strict=True):
            axes.set_title(variant, size=9, color=INK)
            axes.set_xticks(range(len(methods)), methods, rotation=40, ha="right")
            axes.set_yticks(range(len(programs)), [name.replace("_", " ") for name in programs])
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            _draw_cells(axes, [r for r in results if r.variant == variant], programs, methods)
    return Path(path)


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _draw_cells(
    axes: Axes, results: Sequence[Result], programs: Sequence[str], methods: Sequence[str]
) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    values = [[math.nan] * len(methods) for _ in programs]
    for result in results:
        x, y = methods.index(result.method), programs.index(result.program)
        values[y][x] = result.edge_auc
        mark = f"{result.edge_auc:.2f}" + (" \N{CHECK MARK}" if result.exact else "")
        axes.text(x, y, mark, ha="center", va="center", size=8, color=INK)
    colours = LinearSegmentedColormap.from_list("auc", ["#FFFFFF", POSITIVE])
    axes.imshow(values, cmap=colours, vmin=0.5, vmax=1.25, aspect="auto")
