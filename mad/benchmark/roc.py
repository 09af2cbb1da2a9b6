"""Pictures of detectors: ROC curves, and anomaly scores against the threshold that calibration set.

    draw_roc([RocCurve("deviation", fpr, tpr, 0.97, "in distribution")], Path("out/roc.svg"))
    draw_score_distributions({"trusted": [...], "backdoored": [...]}, 3.1, Path("out/scores.png"))

High score = more anomalous. The format is the path's suffix: .svg, .png or .pdf. Style, saving and
the same-bytes guarantee are those of `circuits.plot.style`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from circuits.plot.style import FAINT_INK, NEGATIVE, POSITIVE, SERIES_COLOURS, Style, saved_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FALSE_ALARM_RATE = 0.01  # the operating point that ROC panels mark, unless told otherwise
PANEL, PANEL_GAP = 220.0, 34.0  # points
QUARTERS = (0, 0.25, 0.5, 0.75, 1)
STRIP_LIMIT = 40  # groups of at most so many scores are drawn one mark a score


@dataclass(frozen=True)
class RocCurve:
    """One detector's ROC curve on one group of normal inputs, from (0, 0) to (1, 1)."""

    name: str
    false_positive_rate: Sequence[float]
    true_positive_rate: Sequence[float]
    auroc: float
    group: str = ""  # the panel, such as "in distribution" or "shifted normals"


def detection_rate(curve: RocCurve, false_alarm_rate: float = FALSE_ALARM_RATE) -> float:
    """Return the largest true-positive rate with at most `false_alarm_rate` false alarms."""
    pairs = zip(curve.false_positive_rate, curve.true_positive_rate, strict=True)
    return max((true for false, true in pairs if false <= false_alarm_rate), default=0.0)


def draw_roc(
    curves: Sequence[RocCurve],
    path: Path,
    title: str = "",
    caption: str = "",
    *,
    alpha: float = FALSE_ALARM_RATE,
) -> Path:
    """Return the file drawn: one panel per group, each detector in the same colour everywhere.

    Dots mark where a share `alpha` of normal inputs raises an alarm; each legend gives AUROC and
    the share of anomalies caught there.

    Raises:
        ValueError: no curves, a detector twice in one group, fewer than two points, lengths that
            differ, a rate or AUROC outside [0, 1], or rates that fall.
    """
    _check_roc(curves)
    names = list(dict.fromkeys(curve.name for curve in curves))
    groups: dict[str, list[RocCurve]] = {}
    for curve in curves:
        groups.setdefault(curve.group, []).append(curve)
    below = 52 + 13 * (max(map(len, groups.values())) + 1) + (30 if caption else 0)
    above = 22 + (26 if title else 0)
    width, height = 46 + len(groups) * (PANEL + PANEL_GAP), below + PANEL + above  # points
    with saved_figure(path, (width / 72, height / 72), title, caption, layout=None) as figure:
        for index, (group, drawn) in enumerate(groups.items()):
            left = 46 + index * (PANEL + PANEL_GAP)
            axes = figure.add_axes((left / width, below / height, PANEL / width, PANEL / height))
            _draw_roc_panel(axes, drawn, names, alpha)
            axes.set_title(group, size=9.5, loc="left")
        figure.axes[0].set_ylabel("anomalies caught")
    return Path(path)


def _check_roc(curves: Sequence[RocCurve]) -> None:
    if not curves:
        raise ValueError("there are 0 curves to draw; pass at least one")
    for curve in curves:
        _check_rates(curve)
    if len({(curve.group, curve.name) for curve in curves}) < len(curves):
        raise ValueError(
            "a detector has two curves in one group; give each curve of a group its own name"
        )


def _check_rates(curve: RocCurve) -> None:
    label = f"{curve.name!r} in group {curve.group!r}" if curve.group else repr(curve.name)
    false, true = list(curve.false_positive_rate), list(curve.true_positive_rate)
    if len(false) != len(true) or len(false) < 2:
        raise ValueError(
            f"ROC curve {label} has {len(false)} false-positive and {len(true)} true-positive "
            "rates; pass equally many, at least 2"
        )
    outside = [rate for rate in (*false, *true, curve.auroc) if not 0.0 <= rate <= 1.0]  # or NaN
    if outside:
        raise ValueError(
            f"ROC curve {label} has the rate {outside[0]}; rates and AUROC lie in [0, 1]"
        )
    if false != sorted(false) or true != sorted(true):
        raise ValueError(
            f"ROC curve {label} has rates that fall; sort its points by rising false-positive rate"
        )


def _draw_roc_panel(
    axes: Axes, curves: Sequence[RocCurve], names: Sequence[str], alpha: float
) -> None:
    axes.plot([0, 1], [0, 1], color="#B5B5B5", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.axvline(alpha, color="#B5B5B5", linewidth=0.8, linestyle=":", zorder=1)
    for curve in curves:
        _draw_roc_curve(axes, curve, names.index(curve.name), alpha)
    axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="false alarms", xticks=QUARTERS, yticks=QUARTERS)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    place = {"loc": "upper left", "bbox_to_anchor": (-0.02, -0.16), "borderaxespad": 0.0}
    sizes = {"fontsize": 8, "title_fontsize": 8, "handlelength": 1.6}
    legend = axes.legend(title=f"AUROC, caught at {100 * alpha:g} % false alarms", **sizes, **place)
    legend.set_alignment("left")


def _draw_roc_curve(axes: Axes, curve: RocCurve, index: int, alpha: float) -> None:
    colour = SERIES_COLOURS[index % len(SERIES_COLOURS)]
    dash = ("-", "--", ":")[index // len(SERIES_COLOURS) % 3]
    caught = detection_rate(curve, alpha)
    # Steps: between two thresholds nothing can be reached, so a straight join would flatter.
    axes.plot(
        curve.false_positive_rate,
        curve.true_positive_rate,
        color=colour,
        linestyle=dash,
        drawstyle="steps-post",
        label=f"{curve.name}: {curve.auroc:.3f}, {100 * caught:.0f} %",
        gid=f"curve:{curve.group}:{curve.name}",
    )
    dot = {"marker": "o", "markersize": 4.5, "clip_on": False, "zorder": 5}
    axes.plot([alpha], [caught], color=colour, **dot)


def draw_score_distributions(
    scores: Mapping[str, Sequence[float]],
    threshold: float,
    path: Path,
    *,
    alpha: float | None = None,
    log_scale: bool = False,
    title: str = "",
    caption: str = "",
) -> Path:
    """Return the file drawn: a row per group, with the threshold across and the share beyond it.

    Scores above `threshold` are flagged, and red. A group is a histogram (each row has its own
    height), or, with at most 40 scores, one mark per score. `alpha` labels the threshold;
    `log_scale` is for scores that span decades.

    Raises:
        ValueError: no groups, an empty group, a score or threshold that is not finite, or, with
            `log_scale`, not positive.
    """
    _check_scores(scores, threshold, log_scale=log_scale)
    edges = _bin_edges(list(chain(*scores.values())), threshold, log_scale=log_scale)
    height = 0.75 * len(scores) + 0.75 + (0.3 if title else 0) + (0.35 if caption else 0)
    with saved_figure(path, (6.4, height), title, caption) as figure:
        panels = figure.subplots(len(scores), 1, sharex=True, squeeze=False)[:, 0]
        if log_scale:
            panels[-1].set_xscale("log")
        for (group, values), axes in zip(scores.items(), panels, strict=True):
            _draw_group(axes, group, values, threshold, edges)
        for axes in panels[:-1]:
            axes.tick_params(axis="x", which="both", length=0)
        label = f"\N{GREEK SMALL LETTER ALPHA} = {alpha:g}" if alpha is not None else "threshold"
        place = {"xycoords": panels[0].get_xaxis_transform(), "ha": "center", "va": "bottom"}
        panels[0].annotate(label, (threshold, 1.02), size=8, annotation_clip=False, **place)
        panels[-1].set_xlabel("anomaly score")
    return Path(path)


def _check_scores(
    scores: Mapping[str, Sequence[float]], threshold: float, *, log_scale: bool
) -> None:
    if not scores:
        raise ValueError("there are 0 groups of scores to draw; pass at least one")
    if empty := [group for group, values in scores.items() if len(values) == 0]:
        raise ValueError(f"group {empty[0]!r} has 0 scores; leave it out or pass at least one")
    for owner, values in {"the threshold": [threshold], **scores}.items():
        _check_values(owner, values, log_scale=log_scale)


def _check_values(owner: str, values: Sequence[float], *, log_scale: bool) -> None:
    if strange := [value for value in values if not math.isfinite(value)]:
        raise ValueError(f"{owner} has the score {strange[0]}; scores must be finite")
    if log_scale and min(values) <= 0:
        raise ValueError(
            f"{owner} has the score {min(values)}; scores must be positive with log_scale=True; "
            "draw with log_scale=False"
        )


def _bin_edges(values: Sequence[float], threshold: float, *, log_scale: bool) -> list[float]:
    """Return the edges of about 50 bins, one at the threshold, so that none is half flagged."""
    scale, back = (math.log, math.exp) if log_scale else (float, float)
    low, high = scale(min(*values, threshold)), scale(max(*values, threshold))
    middle = scale(threshold)
    step = (high - low) / 50 or 1.0
    below, above = math.ceil((middle - low) / step), math.ceil((high - middle) / step)
    edges = [back(middle + step * index) for index in range(-below, above + 1)]
    # exp(log(x)) and sums of steps miss by an ulp: the outer edges must hold every score, the
    # middle the threshold.
    edges[below] = threshold
    if len(edges) <= 2:
        return edges
    return [min(edges[0], *values), *edges[1:-1], max(edges[-1], *values)]


def _draw_group(
    axes: Axes, group: str, values: Sequence[float], threshold: float, edges: Sequence[float]
) -> None:
    flagged = [value for value in values if value > threshold]
    passed = [value for value in values if not value > threshold]
    as_strip = len(values) <= STRIP_LIMIT
    for part, colour, name in ((passed, POSITIVE, "passed"), (flagged, NEGATIVE, "flagged")):
        style: Style = {"color": colour, "gid": f"{name}:{group}"}
        if as_strip:
            axes.vlines(part, 0, 1, linewidth=1.4, alpha=0.75, **style)
        elif part:
            axes.hist(part, bins=list(edges), alpha=0.85, linewidth=0, **style)
    axes.set_ylim(0, 2.2 if as_strip else None)
    axes.axvline(threshold, color="#4A4A4A", linewidth=1.0, linestyle=(0, (4, 2)), zorder=5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylabel(group, rotation=0, ha="right", va="center", size=9)
    share = f"{len(flagged)} of {len(values)} flagged\n{100 * len(flagged) / len(values):.1f} %"
    place = {"xycoords": "axes fraction", "xytext": (8, 0), "textcoords": "offset points"}
    style = {"va": "center", "size": 8, "color": FAINT_INK, "annotation_clip": False}
    axes.annotate(share, (1, 0.5), **place, **style)
