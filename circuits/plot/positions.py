"""The picture of a circuit with edges per position: where in the text each node reads, how much.

Rows are nodes, the output at the top; columns are positions of the text; a cell is the sum of the
scores of the kept edges into the node (queries, keys and values together) at the position, blue
where they support the behaviour and red where they work against it.  Nodes and positions without
kept edges are left blank.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from circuits.circuit import Circuit
from circuits.names import LOGITS, split_reader
from circuits.plot.style import FAINT_INK, NEGATIVE, POSITIVE, saved_figure


def draw_positions(circuit: Circuit, path: Path, *, title: str = "", caption: str = "") -> Path:
    """Return the file drawn, its format by its suffix; ValueError where edges have no position."""
    n_positions = circuit.graph.n_positions
    if n_positions is None:
        raise ValueError(
            "this circuit does not tell edges apart by position; extract it with positions=true"
        )
    from matplotlib.colors import LinearSegmentedColormap, SymLogNorm

    nodes, values = _into_nodes(circuit)
    if not nodes:  # logits alone, reading nothing
        nodes, values = [LOGITS], torch.full((1, n_positions), math.nan)
    largest = max(float(values.nan_to_num().abs().max()), 1e-12)
    colours = LinearSegmentedColormap.from_list("signed", [NEGATIVE, "#F4F4F4", POSITIVE])
    norm = SymLogNorm(linthresh=largest / 100, vmin=-largest, vmax=largest)
    size = (2.2 + 0.32 * n_positions, 1.7 + 0.2 * len(nodes))
    with saved_figure(path, size, title, caption) as figure:
        axes = figure.add_subplot(xlabel="position")
        shown = axes.imshow(values.numpy(), cmap=colours, norm=norm, aspect="auto", origin="lower")
        axes.set_yticks(range(len(nodes)), nodes, fontsize=7.5)
        axes.set_xticks(range(n_positions))
        bar = figure.colorbar(shown, ax=axes, pad=0.02, ticks=[-largest, 0, largest], format="%.2g")
        bar.set_label("sum of scores", color=FAINT_INK, size=8)
    return Path(path)


def _into_nodes(circuit: Circuit) -> tuple[list[str], torch.Tensor]:
    """Nodes that read something, in forward order, and sums of scores into them, NaN for none."""
    kept = circuit.kept.any(1)  # [R, S]
    sums = (circuit.scores * circuit.kept).sum(1)  # [R, S]
    rows: dict[str, list[int]] = {}
    for reader, name in enumerate(circuit.graph.readers):
        rows.setdefault(split_reader(name)[0], []).append(reader)
    reading = {node: readers for node, readers in rows.items() if kept[readers].any()}
    blank = {node: ~kept[readers].any(0) for node, readers in reading.items()}
    values = [sums[reading[node]].sum(0).masked_fill(blank[node], math.nan) for node in reading]
    return list(reading), torch.stack(values) if values else sums[:0]
