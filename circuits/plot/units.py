"""The picture of a circuit of units: rows are layers, boxes are kept units, strongest first.

    draw_units([("m1.n37", 0.8), ("a0.h3", -0.2)], Path("out"))  # -> out/circuit.svg, ...

Box colour is kind, the frame's colour is sign, opacity of both is strength, as defined in
`circuits.plot.layout`.  Inputs are at the bottom.  A row holds so many boxes and then says how many
more there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuits.names import UnitName, parse_unit
from circuits.plot.circuit import KIND_COLOURS, RULE, UNSCORED
from circuits.plot.layout import strengths
from circuits.plot.style import (
    FAINT_INK,
    INK,
    NEGATIVE,
    POSITIVE,
    plot_style,
    save_figure,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PER_ROW = 12

COLOURS = {
    **{kind: KIND_COLOURS[kind] for kind in ("input", "head", "mlp")},
    "neuron": "#7FC8A9",
    "feature": "#C9B6E4",
    "error": "#D9D9D9",
}
KINDS = {
    "input": "input",
    "head": "attention head",
    "mlp": "MLP",
    "neuron": "neuron",
    "feature": "feature",
    "error": "dictionary error",
}
# Rows of a block, from below: what stands before it, its heads, its MLP.
ROWS = {"r": ("resid", 0), "a": ("attn", 1), "m": ("mlp", 2)}

WIDTH, HEIGHT, GAP, STEP = 50.0, 27.0, 6.0, 40.0  # points
LEFT, LEGEND, MARGIN = 62.0, 118.0, 14.0


@dataclass(frozen=True)
class DrawnUnit:
    """One unit as the picture needs it."""

    name: UnitName
    score: float

    @property
    def row(self) -> int:
        """Counted upwards; rows without units are not drawn."""
        return -1 if self.name.kind == "input" else 3 * self.name.layer + ROWS[self.name.site[0]][1]

    @property
    def row_label(self) -> str:
        if self.name.kind == "input":
            return "embed"
        return f"{ROWS[self.name.site[0]][0]} {self.name.layer}"

    @property
    def label(self) -> str:
        """What stands in the box: the row says the rest."""
        return self.name.name.rpartition(".")[2]


def draw_units(
    units: Sequence[tuple[str, float]],
    folder: Path,
    stem: str = "circuit",
    *,
    formats: Sequence[str] = ("svg", "png", "pdf"),
    title: str = "",
    caption: str = "",
    per_row: int = PER_ROW,
) -> list[Path]:
    """Return the files drawn, `folder/stem.format` for every format.

    `units` are (name, score) pairs such as ("m1.n37", 0.12), without positions.  In the SVG boxes
    carry ids, `unit:NAME`.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     [path.name for path in draw_units([("m1.n37", 0.8)], Path(folder), formats=["svg"])]
    ['circuit.svg']

    Raises:
        ValueError: a name that is no unit, or of one position; a unit given twice; a score that is
            not finite; `per_row` below 1; or a format that is none of svg, png, pdf.
    """
    if per_row < 1:
        raise ValueError(f"per_row={per_row}, but a row needs at least 1 unit")
    drawn = _drawn(units)
    paths = [Path(folder) / f"{stem}.{suffix}" for suffix in formats]
    with plot_style():
        save_figure(units_figure(drawn, per_row, title=title, caption=caption), paths)
    return paths


def _drawn(units: Sequence[tuple[str, float]]) -> list[DrawnUnit]:
    seen = set()
    for name, score in units:
        if name in seen:
            raise ValueError(f"unit {name!r} is given twice; merge its scores first")
        if not math.isfinite(score):
            raise ValueError(
                f"unit {name!r} has score {score}, which cannot be drawn; scores must be finite"
            )
        if parse_unit(name).position is not None:
            raise ValueError(
                f"unit {name!r} is of one position, but a picture has none; sum scores over "
                "positions (UnitCircuit.over_positions)"
            )
        seen.add(name)
    return [DrawnUnit(parse_unit(name), score) for name, score in units]


def rows_of(units: Sequence[DrawnUnit]) -> dict[int, list[DrawnUnit]]:
    """The units of each row, the strongest first; rows from below."""
    rows: dict[int, list[DrawnUnit]] = {}
    for unit in sorted(units, key=lambda one: (one.row, -abs(one.score), one.name.number)):
        rows.setdefault(unit.row, []).append(unit)
    return rows


def units_figure(
    units: Sequence[DrawnUnit], per_row: int, *, title: str = "", caption: str = ""
) -> Figure:
    """Return the figure: row labels | boxes | legend, title above, caption below."""
    from matplotlib.figure import Figure

    rows = rows_of(units)
    widest = max((min(len(row), per_row) for row in rows.values()), default=1)
    more = any(len(row) > per_row for row in rows.values())
    boxes = max(widest, 4) * (WIDTH + GAP) + (40 if more else 0)
    legend = _legend_lines(units)
    width = LEFT + boxes + LEGEND + 2 * MARGIN
    title_text, title_height = wrapped(title, 12, 0.88 * width - 2 * MARGIN)
    caption_text, caption_height = wrapped(caption, 9, width - 2 * MARGIN)
    body = max(len(rows) * STEP, 14.0 * len(legend), STEP)
    height = 2 * MARGIN + body + title_height + caption_height

    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))  # data units are points
    axes.set_axis_off()
    bottom = MARGIN + caption_height
    strength = dict(zip(map(id, units), strengths([unit.score for unit in units])[0], strict=True))
    for number, row in enumerate(rows.values()):
        _draw_row(axes, row, per_row, strength, bottom + (number + 0.5) * STEP, LEFT + boxes)
    if not units:
        axes.text(LEFT, bottom + body / 2, "no units kept", va="center", color=FAINT_INK)
    _draw_legend(axes, legend, LEFT + boxes + MARGIN, bottom + body)
    axes.text(MARGIN, height - MARGIN, title_text, va="top", size=12, weight="bold", gid="title")
    axes.text(MARGIN, MARGIN, caption_text, va="bottom", size=9, color=FAINT_INK, gid="caption")
    return figure


def _draw_row(
    axes: Axes,
    row: Sequence[DrawnUnit],
    per_row: int,
    strength: Mapping[int, float],
    y: float,
    right: float,
) -> None:
    axes.plot([LEFT - 6, right], [y, y], color=RULE, linewidth=0.8, zorder=0)
    faint: dict[str, Any] = {"va": "center_baseline", "color": FAINT_INK}
    label = row[0].row_label
    axes.text(LEFT - 12, y, label, ha="right", size=8.5, gid=f"row:{label}", **faint)
    for place, unit in enumerate(row[:per_row]):
        _draw_unit(axes, unit, strength[id(unit)], LEFT + place * (WIDTH + GAP), y)
    if len(row) > per_row:
        x = LEFT + per_row * (WIDTH + GAP)
        axes.text(
            x,
            y,
            f"+ {len(row) - per_row}",
            size=8.5,
            gid=f"more:{label}",
            backgroundcolor="white",
            **faint,
        )


def _draw_unit(axes: Axes, unit: DrawnUnit, strength: float, x: float, y: float) -> None:
    from matplotlib.colors import to_rgba
    from matplotlib.patches import FancyBboxPatch

    opacity = 0.22 + 0.78 * strength
    box = FancyBboxPatch(
        (x, y - HEIGHT / 2),
        WIDTH,
        HEIGHT,
        boxstyle="round,pad=0,rounding_size=4",
        facecolor=to_rgba(COLOURS[unit.name.kind], opacity),
        edgecolor=to_rgba(_sign_colour(unit.score), opacity),
        linewidth=0.8 + 1.8 * strength,
        clip_on=False,
        zorder=3,
        gid=f"unit:{unit.name.name}",
    )
    axes.add_patch(_backed(axes, box))
    middle: dict[str, Any] = {"ha": "center", "va": "center_baseline", "zorder": 4}
    axes.text(x + WIDTH / 2, y + 4.5, unit.label, size=8.5, color=INK, **middle)
    score = f"{unit.score:+.2g}".replace("-", "\N{MINUS SIGN}")
    axes.text(x + WIDTH / 2, y - 7, score, size=6.5, color=FAINT_INK, **middle)


def _backed(axes: Axes, box):
    """The box, with white behind it: a row's rule does not shine through."""
    from matplotlib.patches import Rectangle

    corner, size = (box.get_x(), box.get_y()), (box.get_width(), box.get_height())
    axes.add_patch(Rectangle(corner, *size, facecolor="white", linewidth=0, zorder=2))
    return box


def _sign_colour(score: float) -> str:
    return POSITIVE if score > 0 else NEGATIVE if score < 0 else UNSCORED


def _legend_lines(units: Sequence[DrawnUnit]) -> list[tuple[str, str, str]]:
    """Text, face colour and frame colour of each line."""
    present = {unit.name.kind for unit in units}
    lines = [(name, COLOURS[kind], UNSCORED) for kind, name in KINDS.items() if kind in present]
    signs = ((1, "score > 0"), (-1, "score < 0"), (0, "score = 0"))
    scores = [unit.score for unit in units]
    lines += [
        (text, "white", _sign_colour(sign))
        for sign, text in signs
        if any((score > 0) - (score < 0) == sign for score in scores)
    ]
    return [*lines, ("opacity: |score|", "", "")] if units else []


def _draw_legend(axes: Axes, lines: Sequence[tuple[str, str, str]], x: float, top: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=2"
    for number, (text, face, frame) in enumerate(lines):
        y = top - 14.0 * (number + 0.5)
        if frame:
            colours = {"facecolor": face, "edgecolor": frame, "linewidth": 1.4}
            axes.add_patch(FancyBboxPatch((x, y - 4), 16, 8, boxstyle=style, **colours))
        at, colour = (x + 24, INK) if frame else (x, FAINT_INK)
        axes.text(at, y, text, size=8.5, va="center_baseline", color=colour)
