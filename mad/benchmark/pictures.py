"""Pictures of the benchmark, in the style of `circuits.plot.style`: same results, same bytes.

summary = write(Path("runs/detectors"))
draw_worst(summary, Path("out/worst.png"))
draw_false_alarms(summary, ["strict", "mahalanobis, mean"], Path("out/false_alarms.png"))
draw_agree(summary, ["strict", "deviation"], Path("out/agree.png"))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuits.plot.style import FAINT_INK, INK, NEGATIVE, POSITIVE, SERIES_COLOURS, saved_figure
from mad.benchmark.auroc import Separation, ranks
from mad.benchmark.report import ALARM, Summary
from mad.benchmark.results import (
    ANOMALY,
    CALIBRATION,
    FOUND,
    NONE,
    ORACLE,
    TITLES,
    Place,
    Results,
    Scorer,
)
from mad.benchmark.worst_case import Control, grouped
from mad.calibration import Calibration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GROUP_COLOURS = dict(zip(TITLES, SERIES_COLOURS))
MARKERS = {"agree": "^", "disagree": "o"}
LANES = {  # up or down from the middle of a row
    ("normal_iid", "agree"): 0.27,
    ("normal_iid", "disagree"): 0.12,
    ("normal_shift", "agree"): -0.12,
    ("normal_shift", "disagree"): -0.27,
}
BAND, BAR, STRIPE, GUIDE = "#C9C9C9", "#ECECEC", "#F5F5F5", "#9A9A9A"
MARKS: dict[str, Any] = {"linestyle": "", "markeredgewidth": 0, "zorder": 5, "clip_on": False}
LEGEND: dict[str, Any] = {"loc": "outside lower center", "fontsize": 8.5}
FALSE_ALARM_LINE = 0.05
PANELS_ABREAST = 4
BINS = 40
SHOWN = ("strict", "fast", "routing", "nodes", "deviation")


def draw_all(summary: Summary, folder: Path) -> list[Path]:
    """Draws the pictures into a folder; of tasks with anomalies only where there are some."""
    paths = []
    if summary.separations:
        title = "Which detectors tell anomalies from normals"
        paths.append(draw_worst(summary, folder / "worst.png", title))
    if "recall_redirect" in {subject.task for subject in summary.results.subjects}:
        title = "Anomalies that give the normal answer"
        paths.append(draw_agree(summary, SHOWN, folder / "agree.png", title))
    shown = (*SHOWN, "mahalanobis, mean")
    title = "False alarms on harmless novelty"
    paths.append(draw_false_alarms(summary, shown, folder / "false_alarms.png", title))
    return paths


# --- worst cases ----------------------------------------------------------------------------------


def draw_worst(summary: Summary, path: Path, title: str = "") -> Path:
    """Return the file drawn: a row per detector, a mark per place, a bar up to the worst case.

    Colour is the group of normals, a triangle an anomaly whose answer is also the normal one.  A
    grey band spans the worst cases of random circuits of the same size.  Baselines at one layer are
    drawn as the oracle that they make together; a detector that is missing in some places says in
    how many it is.

    Raises:
        ValueError: no task with anomalies.
    """
    if not summary.separations:
        raise ValueError("0 tasks with anomalies to draw; score at least one")
    rows = sorted(summary.shown, key=lambda scorer: (summary.worst[scorer].auroc, scorer))
    own = grouped(summary.separations, lambda one: one.scorer)
    height = 1.25 + 0.36 * len(rows) + 0.3 * bool(title)
    with saved_figure(path, (8.2, height), title, "") as figure:
        axes = figure.add_subplot(xlabel="AUROC of anomalies against normals", xlim=(-0.02, 1.02))
        axes.axvline(0.5, color=GUIDE, linewidth=0.8, linestyle=":", zorder=1)
        axes.set_yticks(range(len(rows)), [_label(summary, scorer) for scorer in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.tick_params(axis="y", length=0)
        axes.text(1.01, 1, "worst", transform=axes.transAxes, size=8.5, color=FAINT_INK)
        _name_marks(axes)
        for y, scorer in enumerate(rows):
            _draw_row(axes, y, own[scorer], summary.worst[scorer].auroc)
            _draw_band(axes, y, summary.worst_controls.get(scorer))
            tick = axes.get_yticklabels()[y]
            tick.set_color(FAINT_INK if scorer.circuit == ORACLE else INK)
            tick.set_fontweight("bold" if scorer.circuit == FOUND else "normal")
        named = dict(zip(*axes.get_legend_handles_labels()[::-1]))  # each name once
        figure.legend(named.values(), named.keys(), ncols=4, **LEGEND)
    return Path(path)


def _name_marks(axes: Axes) -> None:
    """Marks for the legend alone."""
    for group, colour in GROUP_COLOURS.items():
        for kind, marker in MARKERS.items():
            label = f"{TITLES[group]}, {kind}"
            axes.plot([], [], linestyle="", marker=marker, color=colour, label=label)
    axes.plot([], [], linestyle="", marker="|", color=INK, markersize=10, label="worst case")


def _draw_row(axes: Axes, y: int, own: Sequence[Separation], worst: float) -> None:
    axes.barh(y, worst, height=0.84, color=BAR, linewidth=0, zorder=0.5)
    axes.vlines(worst, y - 0.42, y + 0.42, color=INK, linewidth=1.8, zorder=4)
    beside = {"transform": axes.get_yaxis_transform(), "va": "center"}
    axes.text(1.01, y, f"{worst:.3f}", size=8.5, **beside)
    for one in own:
        kind = "agree" if one.place.stratum.split()[-1] == "agree" else "disagree"
        style = {"color": GROUP_COLOURS[one.place.group], "marker": MARKERS[kind]}
        lane = y + LANES[one.place.group, kind]
        axes.plot([one.auroc], [lane], markersize=4.2, alpha=0.8, **style, **MARKS)


def _draw_band(axes: Axes, y: int, control: Control | None) -> None:
    if control is not None:
        style = {"color": BAND, "edgecolor": BAND, "linewidth": 1.5, "height": 0.84, "zorder": 2}
        label, width = "random circuits' worst cases", control.high - control.low
        axes.barh(y, width, left=control.low, label=label, **style)


def _label(summary: Summary, scorer: Scorer) -> str:
    count, everywhere = summary.counts[scorer], summary.everywhere
    name = _words(scorer.detector) + (" (oracle)" if scorer.circuit == ORACLE else "")
    return name if count == everywhere else f"{name} ({count} of {everywhere} places)"


def _words(name: str) -> str:
    return name.replace("_", " ")


# --- false alarms ---------------------------------------------------------------------------------


def draw_false_alarms(
    summary: Summary, detectors: Sequence[str], path: Path, title: str = ""
) -> Path:
    """Return the file drawn: the share of each benign stratum flagged at 1 %, a mark per seed.

    Lines stand at the 1 % that calibration promises on prompts like the trusted ones, and at 5 %.

    Raises:
        ValueError: no detectors, or one that is not there.
    """
    scorers = _chosen(summary.results, detectors)
    found = [f for f in summary.flags if f.benign and f.alpha == ALARM and f.scorer in scorers]
    rows = list(dict.fromkeys(_stratum(flag.place) for flag in found))[::-1]  # the first on top
    step = 0.16 + 0.09 * len(scorers)
    height = 1.0 + step * len(rows) + 0.2 * math.ceil(len(scorers) / 3) + 0.3 * bool(title)
    with saved_figure(path, (7.6, height), title, "") as figure:
        axes = figure.add_subplot(xlabel="flagged at \N{GREEK SMALL LETTER ALPHA} = 1 %")
        axes.set_xscale("symlog", linthresh=0.01, linscale=0.6)
        for level, dashes in ((ALARM, ":"), (FALSE_ALARM_LINE, (0, (4, 2)))):
            axes.axvline(level, color=FAINT_INK, linewidth=0.9, linestyle=dashes, zorder=1)
        for y in range(0, len(rows), 2):
            axes.axhspan(y - 0.5, y + 0.5, color=STRIPE, linewidth=0, zorder=0)
        for index, scorer in enumerate(scorers):
            own = [flag for flag in found if flag.scorer == scorer]
            lane = 0.36 - 0.72 * (index + 0.5) / len(scorers)
            ys = [rows.index(_stratum(flag.place)) + lane for flag in own]
            again, colour = divmod(index, len(SERIES_COLOURS))
            style = {"color": SERIES_COLOURS[colour], "marker": "osD^v"[again % 5]}
            label = _words(scorer.detector)
            shares = [flag.share for flag in own]
            axes.plot(shares, ys, markersize=4.5, alpha=0.85, label=label, **style, **MARKS)
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.01, 0.05, 0.2, 1], ["0", "1 %", "5 %", "20 %", "100 %"])
        axes.minorticks_off()
        axes.set_ylim(-0.5, len(rows) - 0.5)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(axis="y", length=0, pad=7)
        figure.legend(ncols=min(3, len(scorers)), **LEGEND)
    return Path(path)


def _stratum(place: Place) -> str:
    what = "as trusted" if place.group == "normal_iid" else f"new: {place.stratum}"
    return _words(f"{place.task}, {what}")


# --- ranks ----------------------------------------------------------------------------------------


def draw_agree(
    summary: Summary,
    detectors: Sequence[str],
    path: Path,
    title: str = "",
    *,
    task: str = "recall_redirect",
) -> Path:
    """Return the file drawn: where prompts stand among all, a panel per detector, a row per group.

    A prompt's place is its rank among the calibration prompts and all that are drawn, from 0 to 1:
    detectors with different units share an axis, and nothing else of their scale is left.  A dashed
    line is the threshold at 1 %, beyond which prompts are flagged, and red.  The model is that of
    the lowest seed.

    Raises:
        ValueError: no detectors, one that is not there, or no such model, or one without anomalies.
    """
    scorers = _chosen(summary.results, detectors)
    there = summary.results.select([task])
    subject = min(there.subjects, key=lambda subject: subject.seed)
    if not subject.anomalous:
        raise ValueError(f"{subject.name} has no anomalies to draw; choose another task")
    if missing := [scorer for scorer in scorers if scorer not in subject.parts]:
        raise ValueError(f"{missing[0]} has no scores on {subject.name}; draw what it has")
    kinds = subject.rows(ANOMALY)
    down = math.ceil(len(scorers) / PANELS_ABREAST)
    across = math.ceil(len(scorers) / down)
    height = down * (0.55 + 0.42 * (2 + len(kinds))) + 0.35 + 0.3 * bool(title)
    with saved_figure(path, (1.5 + 2.3 * across, height), title, "") as figure:
        panels = figure.subplots(down, across, squeeze=False, sharex=True).flatten()
        for index, (scorer, axes) in enumerate(zip(scorers, panels)):
            parts = subject.parts[scorer]
            rows = {"normal, iid": parts["normal_iid"], "normal, shifted": parts["normal_shift"]}
            rows |= {_words(f"anomaly, {kind}"): parts[ANOMALY][own] for kind, own in kinds.items()}
            _draw_ridges(axes, parts[CALIBRATION], rows)
            axes.set_title(_words(scorer.detector), size=9.5, loc="left")
            lowest = index + across >= len(scorers)  # nothing is drawn below
            axes.tick_params(axis="x", labelbottom=lowest)
            axes.set_xlabel("rank among all prompts" if lowest else "", size=8.5)
            if index % across:
                axes.set_yticklabels([])
        for axes in panels[len(scorers) :]:
            axes.set_visible(False)
    return Path(path)


def _draw_ridges(axes: Axes, calibration: Tensor, rows: Mapping[str, Tensor]) -> None:
    """A histogram per row, of ranks among all prompts; what is flagged is red."""
    everyone = torch.cat([calibration, *rows.values()]).sort().values
    threshold = torch.tensor(Calibration.of(calibration).threshold(ALARM), dtype=everyone.dtype)
    line = (torch.searchsorted(everyone, threshold, side="right") / len(everyone)).item()
    regular = [i / BINS for i in range(BINS + 1)]
    apart = [edge for edge in regular if abs(edge - line) > 0.006]
    edges = sorted({0.0, *apart, line, 1.0})  # no bin is half flagged
    widths = torch.tensor([right - left for left, right in pairwise(edges)])
    colours = [NEGATIVE if left >= line else POSITIVE for left in edges[:-1]]
    for y, values in enumerate(list(rows.values())[::-1]):
        below, up_to = ranks(everyone, values)
        middle = ((below + up_to) / 2 / len(everyone)).double()
        heights = torch.histogram(middle, torch.tensor(edges, dtype=torch.float64)).hist / widths
        heights = 0.86 * heights / heights.max()
        style = {"align": "edge", "color": colours, "linewidth": 0, "alpha": 0.85}
        axes.bar(edges[:-1], heights.tolist(), width=widths.tolist(), bottom=y, **style)
        axes.axhline(y, color="#B5B5B5", linewidth=0.6, zorder=1)
    axes.axvline(line, color=INK, linewidth=0.9, linestyle=(0, (4, 2)), zorder=5)
    axes.set(xlim=(0, 1), ylim=(0, len(rows)), xticks=(0, 0.5, 1))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks([y + 0.35 for y in range(len(rows))], list(rows)[::-1])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _chosen(results: Results, detectors: Sequence[str]) -> list[Scorer]:
    """Each detector, through its circuit if it has one."""
    if not detectors:
        raise ValueError("0 detectors to draw; name at least one")
    there = {s.detector: s for s in results.scorers if s.circuit in (NONE, FOUND)}
    if unknown := [name for name in detectors if name not in there]:
        raise ValueError(f"detector={unknown[0]!r}, but there are {', '.join(there)}")
    return [there[name] for name in detectors]
