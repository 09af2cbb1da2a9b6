"""What every figure of madcap shares: colours, matplotlib style, title, caption and saving.

    with saved_figure(Path("out/figure.svg"), (6.4, 4), "Induction", "9 of 110 edges") as figure:
        figure.add_subplot().plot([0, 1], [0, 1])

The format is the path's suffix: .svg, .png or .pdf. Files carry no dates: same input, same bytes.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito (2008, "Color universal design"): told apart with every common colour blindness.
POSITIVE, NEGATIVE = "#0072B2", "#D5402B"
SERIES_COLOURS = tuple("#0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #E69F00 #000000 #7A6A00".split())
INK, FAINT_INK = "#1A1A1A", "#5F5F5F"
PIXELS_PER_INCH, MOST_PIXELS = 160, 6000  # of a .png

Style = dict[str, Any]  # matplotlib's keyword arguments

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "madcap",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
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
# Without dates: same figure, same bytes.
_UNDATED: dict[str, Style] = {".svg": {"Date": None}, ".png": {}, ".pdf": {"CreationDate": None}}


def plot_style() -> AbstractContextManager[None]:
    """Return a context in which matplotlib draws madcap's way, whatever the caller's settings are.

    Restores the caller's settings on leaving. Salted ids and glyphs drawn as paths make an SVG the
    same on every machine; PDF text stays text (TrueType).
    """
    import matplotlib

    # The back end is the caller's business, and no part of a style.
    defaults = matplotlib.rcParamsDefault.items()
    style: dict[Any, Any] = {key: value for key, value in defaults if not key.startswith("backend")}
    return matplotlib.rc_context(style | _STYLE)


@contextmanager
def saved_figure(
    path: Path, size: tuple[float, float], title: str, caption: str, layout: Any = "constrained"
) -> Iterator[Figure]:
    """Give a figure of a size in inches; title, caption and the file (`save_figure`) come last."""
    from matplotlib.figure import Figure

    with plot_style():
        figure = Figure(figsize=size, layout=layout)
        yield figure
        annotate_figure(figure, title, caption)
        save_figure(figure, [Path(path)])


def save_figure(figure: Figure, paths: Sequence[Path]) -> None:
    """Write the figure to .svg, .png or .pdf files: same figure, same bytes; else ValueError.

    A .png has 160 pixels an inch, or fewer where it would be more than 6,000 wide or high.
    """
    for path in paths:
        if path.suffix not in _UNDATED:
            raise ValueError(
                f"cannot draw {path.name}: the format {path.suffix!r} is none of "
                f"{', '.join(_UNDATED)}"
            )
    pixels = min(PIXELS_PER_INCH, MOST_PIXELS / max(figure.get_size_inches()))
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        dpi = pixels if path.suffix == ".png" else "figure"
        figure.savefig(path, dpi=dpi, metadata=_UNDATED[path.suffix], facecolor="white")


def svg_text(figure: Figure) -> str:
    """Return the figure as an `<svg>` element, to stand in a page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=_UNDATED[".svg"], facecolor="white")
    text = file.getvalue()
    return text[text.index("<svg") :]  # without the declarations of a file of its own


def annotate_figure(figure: Figure, title: str, caption: str) -> None:
    """Put a bold title at the top left of a constrained figure, a grey caption at the bottom."""
    width = figure.get_figwidth() * 72 - 12
    left: Style = {"x": 0.01, "ha": "left"}
    if title:
        figure.suptitle(wrapped(title, 11, width)[0], size=11, weight="bold", **left)
    if caption:
        figure.supxlabel(wrapped(caption, 8.5, width)[0], size=8.5, color=FAINT_INK, **left)


def wrapped(text: str, size: float, width: float) -> tuple[str, float]:
    """Return the text broken to a width in points, and its height with a gap to what is next."""
    if not text:
        return "", 0.0
    # .54 em: the mean advance of DejaVu Sans, and some
    lines = textwrap.wrap(text, max(20, int(width / (0.54 * size))))
    return "\n".join(lines), len(lines) * 1.3 * size + 12
