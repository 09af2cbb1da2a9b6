"""The picture of methods put to the test: a cell for each program and method, in each variant.

Colour and number are the edge AUC; a tick says that the circuit was found exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from abstraction.ground_truth.scoreboard import Result
from circuits.plot.style import INK, POSITIVE, annotate_figure, plot_style, save_figure

CELL = 0.42  # inches


def draw_truth(
    results: Sequence[Result], path: Path, *, title: str = "", caption: str = ""
) -> Path:
    """Return the file drawn, its format by its suffix.

    Raises:
        ValueError: there are no results.
    """
    if not results:
        raise ValueError("there are 0 results to draw; run at least one method on one program")
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    variants, programs, methods = (
        list(dict.fromkeys(getattr(result, field) for result in results))
        for field in ("variant", "program", "method")
    )
    cells = {(result.variant, result.program, result.method): result for result in results}
    colours = LinearSegmentedColormap.from_list("auc", ["#FFFFFF", POSITIVE])
    width = 2.0 + 1.6 * CELL * len(methods) * len(variants)
    with plot_style():
        figure = Figure(figsize=(width, 1.6 + CELL * len(programs)), layout="constrained")
        panels = figure.subplots(1, len(variants), sharey=True, squeeze=False)[0]
        shown = None
        for axes, variant in zip(panels, variants, strict=True):
            found = [
                [cells.get((variant, program, method)) for method in methods]
                for program in programs
            ]
            values = [
                [math.nan if cell is None else cell.edge_auc for cell in row] for row in found
            ]
            shown = axes.imshow(values, cmap=colours, vmin=0.5, vmax=1.25, aspect="auto")
            axes.set_title(variant, size=9, color=INK)
            axes.set_xticks(range(len(methods)), methods, rotation=40, ha="right")
            axes.set_yticks(range(len(programs)), [name.replace("_", " ") for name in programs])
            axes.tick_params(length=0)
            for side in axes.spines.values():
                side.set_visible(False)
            for y, row in enumerate(found):
                for x, cell in enumerate(row):
                    if cell is not None:
                        mark = f"{cell.edge_auc:.2f}" + (" \N{CHECK MARK}" if cell.exact else "")
                        axes.text(x, y, mark, ha="center", va="center", size=8, color=INK)
        assert shown is not None
        annotate_figure(figure, title, caption)
        save_figure(figure, [Path(path)])
    return Path(path)
