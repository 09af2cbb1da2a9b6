"""What was measured, as Markdown and JSON: every table is a function from a `Summary` to a string.

    write(Path("runs/detectors"))  # reads its scores, writes its report.md and report.json

AUROC is of one stratum of anomalies against one group of normals; the worst case is the smallest
over all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mad.benchmark.auroc import DRAWS, Separation
from mad.benchmark.results import FOUND, ORACLE, Scorer, read, short
from mad.benchmark.summary import ALARM, Summary, summarise
from mad.benchmark.tables import markdown_table


def write(
    folder: Path,
    *,
    tasks: Sequence[str] | None = None,
    stem: str = "report",
    draws: int = DRAWS,
    seed: int = 0,
) -> Summary:
    """Reads `folder`/scores, writes `folder`/STEM.md and STEM.json, and returns what they say.

    `tasks` are those that are reported; None: all.

    Raises:
        FileNotFoundError, ValueError: as `mad.benchmark.results.read` and `summarise`.
    """
    folder = Path(folder)
    results = read(folder)
    if tasks is not None:
        results = results.select(tasks=tasks)
    missed = sorted(
        f"{file.parent.name} {file.stem}" for file in (folder / "models").glob("*/*.missed")
    )
    summary = summarise(results, draws=draws, seed=seed, missed=missed)
    (folder / f"{stem}.md").write_text(markdown(summary))
    (folder / f"{stem}.json").write_text(as_json(summary))
    return summary


# --- Markdown -------------------------------------------------------------------------------------


def markdown(summary: Summary) -> str:
    """Every table, one below the other."""
    sections = {
        "Worst cases": headline,
        "Every task, group of normals and stratum": full_table,
        "Who is flagged": flag_table,
        "Models": model_table,
    }
    parts = ["# Which detectors tell anomalies from normals", about(summary)]
    parts += [f"## {title}\n\n{section(summary)}" for title, section in sections.items()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def about(summary: Summary) -> str:
    """What was scored, and how numbers are to be read."""
    seeds: dict[str, list[str]] = {}
    for subject in summary.results.subjects:
        seeds.setdefault(subject.task, []).append(str(subject.seed))
    models = "; ".join(f"{task} (seeds {', '.join(own)})" for task, own in sorted(seeds.items()))
    lines = [f"Models: {models}."]
    if summary.missed:
        lines.append(
            f"Passed over, since they did not learn their task: {', '.join(summary.missed)}."
        )
    lines += [
        f"AUROC with 95 % bootstrap intervals over prompts ({summary.draws} draws); models are not "
        "redrawn.",
        "Detectors in bold look through a circuit, baselines through none.",
        "`iid`: normals as the trusted ones; `shift`: normals are new too.  `control`: random "
        "circuits of the same size.  `oracle`: picks the layer in each place by its AUROC, which "
        "no detector can.",
    ]
    return "\n".join(lines)


def headline(summary: Summary) -> str:
    """Each detector's worst case with where it occurs, its random circuits', and its worst false
    alarms.
    """
    if not summary.shown:
        return "No task with anomalies was scored."
    best = summary.best_baseline
    against = "No baseline was computed everywhere."
    if best is not None:
        against = f"The best baseline is `{best}`."
    text = (
        f"{against}  `difference`: worst case less the best baseline's.  `control worst`: mean "
        "over random circuits of each one's own worst case, with their range.  `false alarms`: "
        f"the benign stratum with the largest share flagged at {100 * ALARM:g} %.  A detector that "
        "is missing in some places stands below those that are complete."
    )
    headers = (
        "detector,worst case,where,difference,control worst,false alarms,of which,places"
    ).split(",")
    rows = [_headline_row(summary, scorer) for scorer in summary.shown]
    return f"{text}\n\n{markdown_table(headers, rows)}"


def _headline_row(summary: Summary, scorer: Scorer) -> tuple[str, ...]:
    worst, alarm = summary.worst[scorer], summary.alarms.get(scorer)
    gain, control = summary.differences.get(scorer), summary.worst_controls.get(scorer)
    return (
        _title(scorer),
        _bounded(worst),
        str(worst.place),
        "-" if gain is None else f"{gain.difference:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]",
        "-" if control is None else f"{control.mean:.3f} ({control.low:.3f} to {control.high:.3f})",
        "-" if alarm is None else _percent(alarm.share),
        "-" if alarm is None else str(alarm.place),
        f"{summary.counts[scorer]}/{summary.everywhere}",
    )


def full_table(summary: Summary) -> str:
    """For each task, group of normals and stratum the AUROC of every shown detector: mean over
    seeds, and seed by seed.
    """
    parts = [
        "By mean over seeds.  Each seed: AUROC [95 % interval], then the mean of its random "
        "circuits after a slash."
    ]
    regimes: dict[tuple[str, str, str], list[Separation]] = {}
    for one in summary.separations:
        regime = (one.place.task, one.place.group, one.place.stratum)
        regimes.setdefault(regime, []).append(one)
    for (task, group, stratum), here in sorted(regimes.items()):
        sizes = sorted({(one.anomalies, one.normals) for one in here})
        counted = ", ".join(f"{a} anomalies, {n} normals" for a, n in sizes)
        table = _seed_by_seed(summary, here)
        parts.append(f"### {task}, {short(group)}, {stratum}\n\n{counted}\n\n{table}")
    return "\n\n".join(parts)


def _seed_by_seed(summary: Summary, here: Sequence[Separation]) -> str:
    """The table of one task, group of normals and stratum."""
    seeds = sorted({one.place.seed for one in here})
    own = {(one.scorer, one.place.seed): one for one in here}
    rows: list[tuple[float, list[str]]] = []
    for scorer in summary.shown:
        found = [own.get((scorer, seed)) for seed in seeds]
        values = [one.auroc for one in found if one is not None]
        if values:
            mean = sum(values) / len(values)
            columns = ["-" if one is None else _with_control(summary, one) for one in found]
            rows.append((mean, [_title(scorer), f"{mean:.3f}", *columns]))
    rows.sort(key=lambda row: -row[0])
    headers = ["detector", "mean", *(f"seed {seed}" for seed in seeds)]
    return markdown_table(headers, [row for _, row in rows])


def flag_table(summary: Summary) -> str:
    """The share of each stratum that is flagged at each alpha: mean over seeds, and the range."""
    shares: dict[tuple[str, float], dict[str, dict[Scorer, list[float]]]] = {}
    for flag in summary.flags:
        section = shares.setdefault((flag.place.task, flag.alpha), {})
        column = section.setdefault(f"{flag.place.group} {flag.place.stratum}", {})
        column.setdefault(flag.scorer, []).append(flag.share)
    parts = [
        "Mean over seeds, and smallest to largest.  Of normals these are false alarms, of "
        "anomalies detections."
    ]
    for (task, alpha), columns in sorted(shares.items()):
        rows = []
        for scorer in summary.flagging:
            found = [column.get(scorer, []) for column in columns.values()]
            if any(found):
                rows.append((_title(scorer), *map(_shares, found)))
        table = markdown_table(["detector", *columns], rows)
        parts.append(f"### {task}, alpha {100 * alpha:g} %\n\n{table}")
    return "\n\n".join(parts)


def model_table(summary: Summary) -> str:
    """Of each model the size of its circuit, and how many trusted prompts were used for what."""
    sizes = ("discovery", "fit", "hosts", "calibration")
    rows = []
    for subject in summary.results.subjects:
        known = {**subject.about.get("circuit", {}), **subject.about.get("sizes", {})}
        columns = ("edges", "edges_total", *sizes)
        rows.append((subject.name, *(str(known.get(name, "-")) for name in columns)))
    return markdown_table(["model", "edges kept", "of", *sizes], rows)


def as_json(summary: Summary) -> str:
    """Everything in the tables as numbers; random circuits as mean, lowest and highest."""
    best = summary.best_baseline
    data = {
        "draws": summary.draws,
        "seed": summary.seed,
        "missed": summary.missed,
        "best_baseline": None if best is None else best.detector,
        "worst": [
            asdict(worst)
            | {
                "control": _optional(summary.worst_controls.get(scorer)),
                "false_alarm": _optional(summary.alarms.get(scorer)),
                "places": summary.counts[scorer],
                "of": summary.everywhere,
            }
            for scorer, worst in sorted(summary.worst.items())
            if not scorer.random
        ],
        "differences": [asdict(gain) for gain in summary.differences.values()],
        "separations": [
            asdict(one) | {"control": _optional(summary.controls.get((one.scorer, one.place)))}
            for one in summary.separations
            if not one.scorer.random
        ],
        "flags": [asdict(flag) for flag in summary.flags],
        "models": {
            subject.name: {name: subject.about.get(name) for name in ("circuit", "sizes")}
            for subject in summary.results.subjects
        },
    }
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


# --- texts ----------------------------------------------------------------------------------------


def _optional(value: Any) -> dict[str, Any] | None:
    return None if value is None else asdict(value)


def _title(scorer: Scorer) -> str:
    if scorer.circuit == FOUND:
        return f"**{scorer.detector}**"
    return f"{scorer.detector} ({'oracle' if scorer.circuit == ORACLE else 'baseline'})"


def _bounded(one: Separation) -> str:
    return f"{one.auroc:.3f}" + ("" if one.low is None else f" [{one.low:.3f}, {one.high:.3f}]")


def _with_control(summary: Summary, one: Separation) -> str:
    control = summary.controls.get((one.scorer, one.place))
    return _bounded(one) + ("" if control is None else f" / {control.mean:.3f}")


def _shares(values: Iterable[float]) -> str:
    shares = sorted(values)
    if not shares:
        return "-"
    mean = _percent(sum(shares) / len(shares))
    if len(shares) == 1:
        return mean
    return f"{mean} ({_percent(shares[0])} to {_percent(shares[-1])})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
