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
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from circuits.plot.style import (
    FAINT_INK,
    NEGATIVE,
    POSITIVE,
    SERIES_COLOURS,
    annotate_figure,
    plot_style,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FALSE_ALARM_RATE = 0.01  # the operating point that every ROC panel marks
PANEL, PANEL_GAP = 220.0, 34.0  # points
STRIP_LIMIT = 40  # groups of at most so many scores are drawn one mark a score


@dataclass(frozen=True)
class RocCurve:
    """One detector's ROC curve on one group of normal inputs: points by rising threshold index,
    rates in [0, 1].
    """

    name: str
    false_positive_rate: Sequence[float]
    true_positive_rate: Sequence[float]
    auroc: float
    group: str = ""  # the panel, such as "in distribution" or "shifted normals"


def detection_rate(curve: RocCurve, false_alarm_rate: float = FALSE_ALARM_RATE) -> float:
    """Return the largest true-positive rate that the curve reaches with at most `false_alarm_rate`
    false alarms.
    """
    pairs = zip(curve.false_positive_rate, curve.true_positive_rate, strict=True)
    return max((true for false, true in pairs if false <= false_alarm_rate), default=0.0)


def draw_roc(curves: Sequence[RocCurve], path: Path, title: str = "", caption: str = "") -> Path:
    """Return the file drawn: one panel per group, one line per detector in the same colour
    everywhere.

    Dots mark where 1 % of normal inputs raise an alarm; each legend gives AUROC and the share of
    anomalies caught there.

    Raises: ValueError: no curves, a detector twice in one group, fewer than two points, lengths
        that differ, a rate or
            AUROC outside [0, 1], or rates that fall.
    """
    if not curves:
        raise ValueError("there are 0 curves to draw; pass at least one")
    for curve in curves:
        _check_roc(curve)
    groups = list(dict.fromkeys(curve.group for curve in curves))
    names = list(dict.fromkeys(curve.name for curve in curves))
    if len({(curve.group, curve.name) for curve in curves}) < len(curves):
        raise ValueError(
            "a detector has two curves in one group; give each curve of a group its own name"
        )
    from matplotlib.figure import Figure

    with plot_style():
        most = max(sum(curve.group == group for curve in curves) for group in groups)
        below = 52 + 13 * (most + 1) + (30 if caption else 0)
        above = 22 + (26 if title else 0)
        width, height = 46 + len(groups) * (PANEL + PANEL_GAP), below + PANEL + above
        figure = Figure(figsize=(width / 72, height / 72))
        for index, group in enumerate(groups):
            left = 46 + index * (PANEL + PANEL_GAP)
            axes = figure.add_axes((left / width, below / height, PANEL / width, PANEL / height))
            _draw_roc_panel(axes, [curve for curve in curves if curve.group == group], names)
            axes.set_title(group, size=9.5, loc="left")
            if index == 0:
                axes.set_ylabel("anomalies caught")
        annotate_figure(figure, title, caption)
        save_figure(figure, [Path(path)])
    return Path(path)


def _check_roc(curve: RocCurve) -> None:
    label = f"{curve.name!r} in group {curve.group!r}" if curve.group else repr(curve.name)
    false, true = list(curve.false_positive_rate), list(curve.true_positive_rate)
    if len(false) != len(true) or len(false) < 2:
        raise ValueError(
            f"ROC curve {label} has {len(false)} false-positive and {len(true)} true-positive "
            "rates; "
            "pass equally many, at least 2"
        )
    for rate in (*false, *true, curve.auroc):
        if not 0.0 <= rate <= 1.0:  # NaN fails as well
            raise ValueError(
                f"ROC curve {label} has the rate {rate}; rates and AUROC lie in [0, 1]"
            )
    if any(b < a for rates in (false, true) for a, b in pairwise(rates)):
        raise ValueError(
            f"ROC curve {label} has rates that fall; sort its points by rising false-positive rate"
        )


def _draw_roc_panel(axes: Axes, curves: Sequence[RocCurve], names: Sequence[str]) -> None:
    axes.plot([0, 1], [0, 1], color="#B5B5B5", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.axvline(FALSE_ALARM_RATE, color="#B5B5B5", linewidth=0.8, linestyle=":", zorder=1)
    for curve in curves:
        index = names.index(curve.name)
        colour, dash = (
            SERIES_COLOURS[index % len(SERIES_COLOURS)],
            ("-", "--", ":")[index // len(SERIES_COLOURS) % 3],
        )
        caught = detection_rate(curve)
        label = f"{curve.name}: {curve.auroc:.3f}, {100 * caught:.0f} %"
        # Steps: between two thresholds nothing can be reached, so a straight join would flatter.
        axes.plot(
            curve.false_positive_rate,
            curve.true_positive_rate,
            color=colour,
            linestyle=dash,
            label=label,
            drawstyle="steps-post",
            gid=f"curve:{curve.group}:{curve.name}",
        )
        axes.plot(
            [FALSE_ALARM_RATE],
            [caught],
            marker="o",
            markersize=4.5,
            color=colour,
            clip_on=False,
            zorder=5,
        )
    axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="false alarms", xticks=_QUARTERS, yticks=_QUARTERS)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    place = {
        "loc": "upper left",
        "bbox_to_anchor": (-0.02, -0.16),
        "borderaxespad": 0.0,
        "handlelength": 1.6,
    }
    legend = axes.legend(
        fontsize=8, title="AUROC, caught at 1 % false alarms", title_fontsize=8, **place
    )
    legend.set_alignment("left")


_QUARTERS = (0, 0.25, 0.5, 0.75, 1)


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
    """Return the file drawn: a row per group, on one axis, with the threshold across and the share
    beyond it.

    Scores above `threshold` are flagged, and red. A group is a histogram (each row has its own
    height), or, with at most 40 scores, one mark per score. `alpha` labels the threshold;
    `log_scale` is for scores that span decades.

    Raises: ValueError: no groups, an empty group, a score or threshold that is not finite, or, with
        `log_scale`, not
            positive.
    """
    _check_scores(scores, threshold, log_scale=log_scale)
    from matplotlib.figure import Figure

    with plot_style():
        height = 0.75 * len(scores) + 0.75 + (0.3 if title else 0) + (0.35 if caption else 0)
        figure = Figure(figsize=(6.4, height), layout="constrained")
        panels = figure.subplots(len(scores), 1, sharex=True, squeeze=False)[:, 0]
        if log_scale:
            panels[-1].set_xscale("log")
        edges = _bin_edges(
            [*(score for group in scores.values() for score in group)],
            threshold,
            log_scale=log_scale,
        )
        for (group, values), axes in zip(scores.items(), panels, strict=True):
            _draw_group(axes, group, values, threshold, edges)
            if axes is not panels[-1]:
                axes.tick_params(axis="x", which="both", length=0)
        label = f"\N{GREEK SMALL LETTER ALPHA} = {alpha:g}" if alpha is not None else "threshold"
        place = {"xycoords": panels[0].get_xaxis_transform(), "ha": "center", "va": "bottom"}
        panels[0].annotate(label, (threshold, 1.02), size=8, annotation_clip=False, **place)
        panels[-1].set_xlabel("anomaly score")
        annotate_figure(figure, title, caption)
        save_figure(figure, [Path(path)])
    return Path(path)


def _check_scores(
    scores: Mapping[str, Sequence[float]], threshold: float, *, log_scale: bool
) -> None:
    if not scores:
        raise ValueError("there are 0 groups of scores to draw; pass at least one")
    for group, values in scores.items():
        if len(values) == 0:
            raise ValueError(f"group {group!r} has 0 scores; leave it out or pass at least one")
    for owner, value in [("the threshold", threshold)] + [
        (group, value) for group in scores for value in scores[group]
    ]:
        if not math.isfinite(value) or (log_scale and value <= 0):
            bound = (
                "positive with log_scale=True; draw with log_scale=False"
                if math.isfinite(value)
                else "finite"
            )
            raise ValueError(f"{owner} has the score {value}; scores must be {bound}")


def _bin_edges(values: Sequence[float], threshold: float, *, log_scale: bool) -> list[float]:
    """Return the edges of about 50 bins over all groups, one of them at the threshold: no bin is
    half flagged.
    """
    scale, back = (math.log, math.exp) if log_scale else (float, float)
    low, high, middle = (
        scale(min(*values, threshold)),
        scale(max(*values, threshold)),
        scale(threshold),
    )
    step = (high - low) / 50 or 1.0
    below, above = math.ceil((middle - low) / step), math.ceil((high - middle) / step)
    edges = [back(middle + step * index) for index in range(-below, above + 1)]
    # exp(log(x)) and sums of steps miss by an ulp: the outer edges must hold every score, the
    # middle the threshold.
    edges[below] = threshold
    return (
        [min(edges[0], *values), *edges[1:-1], max(edges[-1], *values)] if len(edges) > 2 else edges
    )


def _draw_group(
    axes: Axes, group: str, values: Sequence[float], threshold: float, edges: Sequence[float]
) -> None:
    flagged = [value for value in values if value > threshold]
    passed = [value for value in values if not value > threshold]
    for part, colour, name in ((passed, POSITIVE, "passed"), (flagged, NEGATIVE, "flagged")):
        if len(values) <= STRIP_LIMIT:
            axes.vlines(part, 0, 1, color=colour, linewidth=1.4, alpha=0.75, gid=f"{name}:{group}")
        elif part:
            axes.hist(
                part, bins=list(edges), color=colour, alpha=0.85, linewidth=0, gid=f"{name}:{group}"
            )
    axes.set_ylim(0, 2.2 if len(values) <= STRIP_LIMIT else None)
    axes.axvline(threshold, color="#4A4A4A", linewidth=1.0, linestyle=(0, (4, 2)), zorder=5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylabel(group, rotation=0, ha="right", va="center", size=9)
    share = f"{len(flagged)} of {len(values)} flagged\n{100 * len(flagged) / len(values):.1f} %"
    place = {
        "textcoords": "offset points",
        "xycoords": "axes fraction",
        "xytext": (8, 0),
        "va": "center",
    }
    axes.annotate(share, (1, 0.5), size=8, color=FAINT_INK, annotation_clip=False, **place)
