"""Pictures of the study, in the style of `circuits.plot.style`: same results, same bytes.

    results = read(Path("runs/study"))
    draw_worst(results, Path("out/worst.png"))
    draw_grid(results, "routing", Path("out/grid.png"))
    draw_false_alarms(results, ["routing", "mahalanobis_all_mean"], Path("out/false_alarms.png"))
    draw_agree(results, ["routing", "output_kl"], Path("out/agree.png"))

Candidates are drawn at their main circuit, baselines through none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuits.plot.style import (
    FAINT_INK,
    INK,
    NEGATIVE,
    POSITIVE,
    SERIES_COLOURS,
    annotate_figure,
    plot_style,
    save_figure,
    wrapped,
)
from mad.detector import Calibration
from mad.study.cells import (
    ANOMALY,
    CALIBRATION,
    MAIN,
    NONE,
    ORACLE,
    SEVERAL,
    Cell,
    Results,
    Scorer,
    by_scorer,
    cells,
    flags,
    oracle,
    places,
    worst_cases,
    worst_controls,
    worst_false_alarms,
)
from mad.study.report import ALARM, parse_recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REGIME_COLOURS = {"iid": SERIES_COLOURS[0], "shift": SERIES_COLOURS[1]}
REGIME_NAMES = {"iid": "in distribution", "shift": "shifted normals"}
LANES = {
    ("iid", "agree"): 0.27,
    ("iid", "disagree"): 0.12,
    ("shift", "agree"): -0.12,
    ("shift", "disagree"): -0.27,
}
MARKERS = {"agree": "^", "disagree": "o"}
BAND, BAR = "#C9C9C9", "#ECECEC"
FALSE_ALARM_LINE = 0.05
PANELS_ABREAST = 4
CAPTION = 380.0  # points: the widest caption where a legend stands below it


def draw_worst(
    results: Results, path: Path, *, main: str = MAIN, title: str = "", caption: str = ""
) -> Path:
    """Return the file drawn: a row per score, a mark per cell, a bar that ends at the worst case.

    Colour is the regime, a triangle an anomaly whose answer is also the normal one.  A grey band
    spans the worst cases of random circuits of the same size.  Baselines at one layer are drawn as
    the oracle that they make together; a score that is missing in some cells says in how many it
    is.

    Raises:
        ValueError: no task with anomalies.
    """
    found = cells(results, draws=0)
    if not found:
        raise ValueError("0 tasks with anomalies to draw; score at least one")
    everywhere, randoms = len(places(found)), worst_controls(found)
    found = (*found, *oracle(found))
    worst, own = worst_cases(found), by_scorer(found)
    apart = {s for s in worst if s.circuit not in (main, SEVERAL, ORACLE) and not s.baseline}
    rows = sorted(set(worst) - apart, key=lambda s: (worst[s].auroc, s))  # the best on top
    from matplotlib.figure import Figure

    with plot_style():
        height = 1.25 + 0.36 * len(rows) + (0.3 if title else 0) + (0.3 if caption else 0)
        figure = Figure(figsize=(8.2, height), layout="constrained")
        axes = figure.add_subplot(xlabel="AUROC of anomalies against normals", xlim=(-0.02, 1.02))
        axes.axvline(0.5, color="#9A9A9A", linewidth=0.8, linestyle=":", zorder=1)
        for y, scorer in enumerate(rows):
            _draw_row(axes, y, own[scorer], worst[scorer])
            if (control := randoms.get(scorer)) is not None:
                low, width = control.low, control.high - control.low
                axes.barh(
                    y,
                    width,
                    left=low,
                    height=0.84,
                    color=BAND,
                    edgecolor=BAND,
                    linewidth=1.5,
                    zorder=2,
                )
            axes.annotate(
                f"{worst[scorer].auroc:.3f}",
                (1, y),
                xycoords=axes.get_yaxis_transform(),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                size=8.5,
                annotation_clip=False,
            )
        axes.set_yticks(
            range(len(rows)), [_label(scorer, len(own[scorer]), everywhere) for scorer in rows]
        )
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.tick_params(axis="y", length=0)
        for tick, scorer in zip(axes.get_yticklabels(), rows, strict=True):
            tick.set_color(FAINT_INK if scorer.circuit == ORACLE else INK)
            tick.set_fontweight("bold" if scorer.circuit in (main, SEVERAL) else "normal")
        axes.annotate(
            "worst",
            (1, 1),
            xycoords="axes fraction",
            xytext=(6, 2),
            textcoords="offset points",
            va="bottom",
            size=8.5,
            color=FAINT_INK,
            annotation_clip=False,
        )
        figure.legend(
            handles=_worst_legend(bool(randoms)), loc="outside lower center", ncols=4, fontsize=8.5
        )
        annotate_figure(figure, title, "")
        if caption:
            axes.set_xlabel(f"{axes.get_xlabel()}\n{wrapped(caption, 8.5, CAPTION)[0]}")
        save_figure(figure, [Path(path)])
    return Path(path)


def _draw_row(axes: Axes, y: int, own: Sequence[Cell], worst: Cell) -> None:
    axes.barh(y, worst.auroc, height=0.84, color=BAR, linewidth=0, zorder=0.5)
    axes.vlines(worst.auroc, y - 0.42, y + 0.42, color=INK, linewidth=1.8, zorder=4)
    for cell in own:
        kind = _kind(cell.stratum)
        axes.plot(
            [cell.auroc],
            [y + LANES[cell.regime, kind]],
            marker=MARKERS[kind],
            markersize=4.2,
            linestyle="",
            color=REGIME_COLOURS[cell.regime],
            alpha=0.8,
            markeredgewidth=0,
            zorder=5,
            clip_on=False,
        )


def _kind(stratum: str) -> str:
    """agree or disagree: the last word of a stratum of anomalies."""
    return "agree" if stratum.split()[-1] == "agree" else "disagree"


def _worst_legend(randoms: bool) -> list:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list = [
        Line2D(
            [],
            [],
            linestyle="",
            marker=MARKERS[kind],
            color=colour,
            label=f"{REGIME_NAMES[regime]}, {kind}",
        )
        for regime, colour in REGIME_COLOURS.items()
        for kind in MARKERS
    ]
    handles.append(
        Line2D([], [], color=INK, linestyle="", marker="|", markersize=10, label="worst case")
    )
    return handles + ([Patch(color=BAND, label="random circuits' worst cases")] if randoms else [])


def _label(scorer: Scorer, count: int, everywhere: int) -> str:
    name = scorer.score.replace("_", " ") + (" (oracle)" if scorer.circuit == ORACLE else "")
    return name if count == everywhere else f"{name} ({count} of {everywhere} cells)"


def draw_grid(
    results: Results, score: str, path: Path, *, title: str = "", caption: str = ""
) -> Path:
    """Return the file drawn: the worst case of a score over granularity and ablation (rows) and tau
    (columns).

    The small number is the worst share of false alarms at 1 %.  A cell with a star was not computed
    on every subject that another cell was.

    Raises:
        ValueError: the score was computed at no recipe.
    """
    own = _of(results, [s for s in results.scorers if s.score == score and not s.control_of])
    found = cells(own, draws=0)
    worst = {scorer.circuit: cell for scorer, cell in worst_cases(found).items()}
    counts = {scorer.circuit: len(cells_of) for scorer, cells_of in by_scorer(found).items()}
    alarms = {
        scorer.circuit: flag
        for scorer, flag in worst_false_alarms(flags(own, (ALARM,)), ALARM).items()
    }
    parsed = {
        name: recipe
        for name in worst
        if (recipe := parse_recipe(name)) is not None and not recipe.rest
    }
    if not parsed:
        raise ValueError(
            f"0 circuits by recipe for score={score!r}; it must be a score that looks through "
            "circuits"
        )
    names = {
        ((recipe.granularity, recipe.ablation), recipe.tau): name for name, recipe in parsed.items()
    }
    rows, taus = (
        sorted({row for row, _ in names}, reverse=True),
        sorted({tau for _, tau in names}, key=float),
    )
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    colours = LinearSegmentedColormap.from_list("auroc", ["#E9A79B", "#FFFFFF", "#7DB8DA"])
    with plot_style():
        size = (
            2.4 + 1.0 * len(taus),
            1.1 + 0.52 * len(rows) + (0.35 if title else 0) + (0.3 if caption else 0),
        )
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot(xlabel="tau")
        grid = [[names.get((row, tau)) for tau in taus] for row in rows]
        values = [
            [math.nan if name is None else worst[name].auroc for name in line] for line in grid
        ]
        axes.imshow(values, cmap=colours, vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(taus)), taus)
        axes.set_yticks(range(len(rows)), [", ".join(row).replace("_", " ") for row in rows])
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        for y, line in enumerate(grid):
            for x, name in enumerate(line):
                if name is not None:
                    star = "*" if counts[name] < max(counts[other] for other in parsed) else ""
                    axes.text(
                        x,
                        y - 0.12,
                        f"{worst[name].auroc:.3f}{star}",
                        ha="center",
                        va="center",
                        size=9,
                    )
                    share = f"{100 * alarms[name].share:.1f} %"
                    axes.text(x, y + 0.26, share, ha="center", va="center", size=7, color=FAINT_INK)
        annotate_figure(figure, title, caption)
        save_figure(figure, [Path(path)])
    return Path(path)


def draw_false_alarms(
    results: Results,
    scores: Sequence[str],
    path: Path,
    *,
    main: str = MAIN,
    title: str = "",
    caption: str = "",
) -> Path:
    """Return the file drawn: the share of each benign stratum that is flagged at 1 %, a mark per
    score and seed.

    Lines stand at the 1 % that calibration promises on prompts like the trusted ones, and at 5 %.

    Raises:
        ValueError: no scores, or one that is not there.
    """
    scorers = _chosen(results, scores, main)
    found = [flag for flag in flags(_of(results, scorers), (ALARM,)) if flag.benign]
    rows = list(dict.fromkeys((flag.task, flag.group, flag.stratum) for flag in found))[
        ::-1
    ]  # the first on top
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    with plot_style():
        step = 0.16 + 0.09 * len(scorers)
        height = (
            1.0
            + step * len(rows)
            + 0.2 * math.ceil(len(scorers) / 3)
            + 0.3 * bool(title)
            + 0.3 * bool(caption)
        )
        figure = Figure(figsize=(7.6, height), layout="constrained")
        axes = figure.add_subplot(xlabel="flagged at \N{GREEK SMALL LETTER ALPHA} = 1 %")
        axes.set_xscale("symlog", linthresh=0.01, linscale=0.6)
        for level, style in ((ALARM, ":"), (FALSE_ALARM_LINE, (0, (4, 2)))):
            axes.axvline(level, color=FAINT_INK, linewidth=0.9, linestyle=style, zorder=1)
        for y in range(0, len(rows), 2):
            axes.axhspan(y - 0.5, y + 0.5, color="#F5F5F5", linewidth=0, zorder=0)
        for index, scorer in enumerate(scorers):
            lane = 0.36 - 0.72 * (index + 0.5) / len(scorers)
            own = [flag for flag in found if flag.scorer == scorer]
            ys = [rows.index((flag.task, flag.group, flag.stratum)) + lane for flag in own]
            colour, marker = (
                SERIES_COLOURS[index % len(SERIES_COLOURS)],
                "osD^v"[index // len(SERIES_COLOURS) % 5],
            )
            axes.plot(
                [flag.share for flag in own],
                ys,
                linestyle="",
                marker=marker,
                markersize=4.5,
                color=colour,
                alpha=0.85,
                markeredgewidth=0,
                zorder=5,
                clip_on=False,
            )
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.01, 0.05, 0.2, 1], ["0", "1 %", "5 %", "20 %", "100 %"])
        axes.minorticks_off()
        axes.set_ylim(-0.5, len(rows) - 0.5)
        axes.set_yticks(range(len(rows)), [_stratum_label(*row) for row in rows])
        axes.tick_params(axis="y", length=0, pad=7)
        handles = [
            Line2D(
                [],
                [],
                linestyle="",
                marker="osD^v"[i // len(SERIES_COLOURS) % 5],
                markersize=5,
                color=SERIES_COLOURS[i % len(SERIES_COLOURS)],
                label=scorer.score.replace("_", " "),
            )
            for i, scorer in enumerate(scorers)
        ]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(3, len(handles)), fontsize=8.5
        )
        annotate_figure(figure, title, "")
        if caption:
            axes.set_xlabel(f"{axes.get_xlabel()}\n{wrapped(caption, 8.5, CAPTION)[0]}")
        save_figure(figure, [Path(path)])
    return Path(path)


def _stratum_label(task: str, group: str, stratum: str) -> str:
    what = "as trusted" if group == "normal_iid" else f"new: {stratum}"
    return f"{task}, {what}".replace("_", " ")


def draw_agree(
    results: Results,
    scores: Sequence[str],
    path: Path,
    *,
    task: str = "recall_redirect",
    seed: int | None = None,
    main: str = MAIN,
    title: str = "",
    caption: str = "",
) -> Path:
    """Return the file drawn: where each group's prompts stand among all, a panel per score and a
    row per group.

    A prompt's place is its rank among the calibration prompts and all that are drawn, from 0 to 1:
    scores with different units share an axis, and nothing else of their scale is left.  A dashed
    line is the threshold at 1 %, beyond which prompts are flagged, and red.  `seed` is the model;
    None: the lowest.

    Raises:
        ValueError: no scores, one that is not there, or no such model, or one without anomalies.
    """
    scorers = _chosen(results, scores, main)
    there = results.select(tasks=[task], seeds=None if seed is None else [seed])
    subject = min(there.subjects, key=lambda subject: subject.seed)
    if not subject.anomalous:
        raise ValueError(f"{subject.name} has no anomalies to draw; choose another task")
    if missing := [scorer for scorer in scorers if scorer not in subject.parts]:
        raise ValueError(f"{missing[0]} has no scores on {subject.name}; draw scores that it has")
    groups = {"normal, iid": "normal_iid", "normal, shifted": "normal_shift"}
    rows = {
        name: (group, torch.arange(len(subject.strata[group]))) for name, group in groups.items()
    }
    rows |= {
        f"anomaly, {stratum}".replace("_", " "): (ANOMALY, own)
        for stratum, own in subject.rows(ANOMALY).items()
    }
    from matplotlib.figure import Figure

    with plot_style():
        down = math.ceil(len(scorers) / PANELS_ABREAST)
        across = math.ceil(len(scorers) / down)
        size = (
            1.5 + 2.3 * across,
            down * (0.55 + 0.42 * len(rows)) + 0.35 + 0.3 * bool(title) + 0.3 * bool(caption),
        )
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(down, across, squeeze=False, sharex=True)
        for index, axes in enumerate(grid.flat):
            if index >= len(scorers):
                axes.set_visible(False)
                continue
            _draw_ridges(axes, subject.parts[scorers[index]], rows)
            axes.set_title(scorers[index].score.replace("_", " "), size=9.5, loc="left")
            lowest = index + across >= len(scorers)  # nothing is drawn below
            axes.tick_params(axis="x", labelbottom=lowest)
            if index % across:
                axes.set_yticklabels([])
            if lowest:
                axes.set_xlabel("rank among all prompts", size=8.5)
        annotate_figure(figure, title, caption)
        save_figure(figure, [Path(path)])
    return Path(path)


def _draw_ridges(
    axes: Axes, parts: Mapping[str, Tensor], rows: Mapping[str, tuple[str, Tensor]]
) -> None:
    drawn = [parts[group][own] for group, own in rows.values()]
    everyone = torch.cat([parts[CALIBRATION], *drawn]).sort().values
    threshold = Calibration.of(parts[CALIBRATION]).threshold(ALARM)
    line = _rank(everyone, torch.tensor([threshold], dtype=everyone.dtype), right=True).item()
    edges = [i / 40 for i in range(41)]
    edges = sorted(
        {0.0, *(edge for edge in edges if abs(edge - line) > 0.006), line, 1.0}
    )  # no bin is half flagged
    for y, values in enumerate(reversed(drawn)):
        places = _rank(everyone, values)
        counts = torch.histogram(
            places.double(), bins=torch.tensor(edges, dtype=torch.float64)
        ).hist
        widths = torch.tensor([b - a for a, b in zip(edges, edges[1:])])
        heights = counts / widths
        heights = 0.86 * heights / heights.max()
        flagged = [left >= line for left in edges[:-1]]
        colours = [NEGATIVE if beyond else POSITIVE for beyond in flagged]
        axes.bar(
            edges[:-1],
            heights.tolist(),
            width=widths.tolist(),
            bottom=y,
            align="edge",
            color=colours,
            linewidth=0,
            alpha=0.85,
        )
        axes.axhline(y, color="#B5B5B5", linewidth=0.6, zorder=1)
    axes.axvline(line, color=INK, linewidth=0.9, linestyle=(0, (4, 2)), zorder=5)
    axes.set(xlim=(0, 1), ylim=(0, len(drawn)), xticks=(0, 0.5, 1))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks([y + 0.35 for y in range(len(drawn))], list(rows)[::-1])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _rank(everyone: Tensor, values: Tensor, *, right: bool = False) -> Tensor:
    """The share of all prompts that score lower, ties half; with `right`, lower or the same."""
    below, up_to = (torch.searchsorted(everyone, values, side=side) for side in ("left", "right"))
    return (up_to if right else (below + up_to) / 2) / len(everyone)


def _chosen(results: Results, scores: Sequence[str], main: str) -> list[Scorer]:
    """Each score through no circuit, or else through the main one."""
    if not scores:
        raise ValueError("0 scores to draw; name at least one")
    chosen = []
    for score in scores:
        there = [
            s
            for s in (Scorer(score, NONE), Scorer(score, SEVERAL), Scorer(score, main))
            if s in results.scorers
        ]
        if not there:
            names = ", ".join(
                sorted({s.score for s in results.scorers if s.circuit in (NONE, SEVERAL, main)})
            )
            raise ValueError(f"score={score!r}, but through no circuit or {main} there are {names}")
        chosen.append(there[0])
    return chosen


def _of(results: Results, scorers: Sequence[Scorer]) -> Results:
    """Nothing but some scores."""
    kept = [
        {s: subject.parts[s] for s in scorers if s in subject.parts} for subject in results.subjects
    ]
    return Results(
        tuple(
            replace(subject, parts=own) for subject, own in zip(results.subjects, kept, strict=True)
        )
    )


SHOWN = ("strict", "transplant_4", "routing", "nodes", "output_kl")


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Draws the study's pictures into a folder; of tasks with anomalies only where there are some."""
    tasks = {subject.task for subject in results.subjects}
    paths = []
    if any("anomaly" in subject.strata for subject in results.subjects):
        paths.append(
            draw_worst(
                results, folder / "worst.png", title="Which scores tell anomalies from normals"
            )
        )
        for score in ("transplant_4", "output_kl"):
            title = f"{score}: which circuit"
            paths.append(draw_grid(results, score, folder / f"grid_{score}.png", title=title))
    if "recall_redirect" in tasks:
        title = "Anomalies that give the normal answer"
        paths.append(draw_agree(results, SHOWN, folder / "agree.png", title=title))
    title = "False alarms on harmless novelty"
    shown = (*SHOWN, "mahalanobis_last_mean")
    paths.append(draw_false_alarms(results, shown, folder / "false_alarms.png", title=title))
    return paths
