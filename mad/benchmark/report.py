"""What was measured, as Markdown and JSON: every table is a function from a `Summary` to a string.

    write(Path("runs/detectors"))  # reads its scores, writes its report.md and report.json

AUROC is of one stratum of anomalies against one group of normals; the worst case is the smallest
over all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mad.benchmark.auroc import DRAWS, Separation, separations
from mad.benchmark.flags import Flag, flags, worst_false_alarms
from mad.benchmark.results import FOUND, ORACLE, Place, Results, Scorer, read, short
from mad.benchmark.tables import markdown_table
from mad.benchmark.worst_case import (
    Control,
    Difference,
    best_baseline,
    controls,
    difference,
    grouped,
    oracle,
    worst_cases,
    worst_controls,
)

ALARM = 0.01  # the false-alarm rate that the headline is at


@dataclass(frozen=True)
class Summary:
    """Results with all that tables and pictures are made of."""

    results: Results
    draws: int
    missed: Sequence[str]  # models that were trained and did not learn their task
    separations: Sequence[Separation]  # through random circuits too, and oracle rows
    flags: Sequence[Flag]
    worst: Mapping[Scorer, Separation]
    alarms: Mapping[Scorer, Flag]  # worst false alarms at `ALARM`
    controls: Mapping[tuple[Scorer, Place], Control]
    worst_controls: Mapping[Scorer, Control]
    counts: Mapping[Scorer, int]  # in how many places a scorer was computed
    everywhere: int  # how many places there are
    best_baseline: Scorer | None  # the one to beat; None: none was computed everywhere
    differences: Mapping[Scorer, Difference]  # of complete circuit detectors and that baseline

    @cached_property
    def shown(self) -> list[Scorer]:
        """All but random circuits and single layers: complete ones first, by worst case."""

        def rank(scorer: Scorer) -> tuple[bool, float, Scorer]:
            return self.counts[scorer] < self.everywhere, -self.worst[scorer].auroc, scorer

        return sorted((scorer for scorer in self.worst if scorer.shown), key=rank)


def summarise(results: Results, *, draws: int = DRAWS, missed: Sequence[str] = ()) -> Summary:
    """Computes everything.

    Raises:
        ValueError: draws is under 2, or a calibration part is too small for an alpha.
    """
    if draws < 2:
        raise ValueError(f"draws={draws}, but an interval needs at least 2")
    found = separations(results, draws=draws)
    found = (*found, *oracle(found))
    flagged, best = flags(results), best_baseline(found)
    counts = {s: len(own) for s, own in grouped(found, lambda one: one.scorer).items()}
    everywhere = len({one.place for one in found})
    complete = [s for s in counts if s.circuit == FOUND and counts[s] == everywhere]
    return Summary(
        results,
        draws,
        missed,
        found,
        flagged,
        worst_cases(found),
        worst_false_alarms(flagged, ALARM),
        controls(found),
        worst_controls(found),
        counts,
        everywhere,
        best,
        {s: difference(results, s, best, draws=draws) for s in complete} if best else {},
    )


def write(
    folder: Path,
    *,
    tasks: Sequence[str] | None = None,
    stem: str = "report",
    draws: int = DRAWS,
) -> Summary:
    """Reads `folder`/scores, writes `folder`/STEM.md and STEM.json, and returns what they say.

    `tasks` are those that are reported; None: all.

    Raises:
        FileNotFoundError, ValueError: as `mad.benchmark.results.read` and `summarise`.
    """
    results = read(folder)
    if tasks is not None:
        results = results.select(tasks)
    files = sorted((folder / "models").glob("*/*.missed"))
    missed = [f"{file.parent.name} {file.stem}" for file in files]
    summary = summarise(results, draws=draws, missed=missed)
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
    names = ", ".join(subject.name for subject in summary.results.subjects)
    missed = f"Passed over, since they did not learn their task: {', '.join(summary.missed)}.\n"
    return (
        f"Models, as task and seed: {names}.\n{missed if summary.missed else ''}"
        f"AUROC with 95 % bootstrap intervals over prompts ({summary.draws} draws); models are not "
        "redrawn.\n"
        "Detectors in bold look through a circuit, baselines through none.\n"
        "`iid`: normals as the trusted ones; `shift`: normals are new too.  `control`: random "
        "circuits of the same size.  `oracle`: picks the layer in each place by its AUROC, which "
        "no detector can."
    )


def headline(summary: Summary) -> str:
    """Each detector's worst case, its random circuits', and its worst false alarms."""
    if not summary.shown:
        return "No task with anomalies was scored."
    headers = "detector,worst case,where,difference,control worst,false alarms,of which,places"
    best = summary.best_baseline
    against = f"The best baseline is `{best}`." if best else "No baseline was computed everywhere."
    return (
        f"{against}  `difference`: worst case less the best baseline's.  `control worst`: mean "
        "over random circuits of each one's own worst case, with their range.  `false alarms`: "
        f"the benign stratum with the largest share flagged at {100 * ALARM:g} %.  A detector that "
        "is missing in some places stands below those that are complete.\n\n"
        + markdown_table(headers.split(","), _headline_rows(summary))
    )


def _headline_rows(summary: Summary) -> list[list[str]]:
    rows = []
    for scorer in summary.shown:
        worst, alarm = summary.worst[scorer], summary.alarms.get(scorer)
        gain, control = summary.differences.get(scorer), summary.worst_controls.get(scorer)
        rows.append(
            [
                _title(scorer),
                _bounded(worst),
                str(worst.place),
                f"{gain.difference:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]" if gain else "-",
                f"{control.mean:.3f} ({control.low:.3f} to {control.high:.3f})" if control else "-",
                _percent(alarm.share) if alarm else "-",
                str(alarm.place) if alarm else "-",
                f"{summary.counts[scorer]}/{summary.everywhere}",
            ]
        )
    return rows


def full_table(summary: Summary) -> str:
    """The AUROC of every shown detector everywhere: mean over seeds, and seed by seed."""
    parts = [
        "By mean over seeds.  Each seed: AUROC [95 % interval], then the mean of its random "
        "circuits after a slash."
    ]
    regimes = grouped(
        summary.separations, lambda one: (one.place.task, one.place.group, one.place.stratum)
    )
    for (task, group, stratum), here in sorted(regimes.items()):
        sizes = sorted({(one.anomalies, one.normals) for one in here})
        counted = ", ".join(f"{a} anomalies, {n} normals" for a, n in sizes)
        table = _seed_by_seed(summary, here)
        parts.append(f"### {task}, {short(group)}, {stratum}\n\n{counted}\n\n{table}")
    return "\n\n".join(parts)


def _seed_by_seed(summary: Summary, here: Sequence[Separation]) -> str:
    """The table of one task, group of normals and stratum."""
    own = {(one.scorer, one.place.seed): one for one in here}
    seeds = sorted({seed for _, seed in own})
    rows: list[tuple[float, list[str]]] = []
    for scorer in summary.shown:
        values = [own[scorer, seed].auroc for seed in seeds if (scorer, seed) in own]
        if values:
            mean = sum(values) / len(values)
            columns = [_with_control(summary, own.get((scorer, seed))) for seed in seeds]
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
    # Some may have been computed only where there are no anomalies; an oracle flags nobody.
    everyone = [s for s in dict.fromkeys((*summary.shown, *summary.results.scorers)) if s.shown]
    for (task, alpha), columns in sorted(shares.items()):
        found = {s: [column.get(s, []) for column in columns.values()] for s in everyone}
        rows = [[_title(s), *map(_shares, own)] for s, own in found.items() if any(own)]
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
        rows.append([subject.name, *(str(known.get(name, "-")) for name in columns)])
    return markdown_table(["model", "edges kept", "of", *sizes], rows)


def as_json(summary: Summary) -> str:
    """Everything in the tables as numbers; random circuits as mean, lowest and highest."""

    def optional(value: Any) -> dict[str, Any] | None:
        return None if value is None else asdict(value)

    def worst(one: Separation) -> dict[str, Any]:
        return asdict(one) | {
            "control": optional(summary.worst_controls.get(one.scorer)),
            "false_alarm": optional(summary.alarms.get(one.scorer)),
            "places": summary.counts[one.scorer],
            "of": summary.everywhere,
        }

    data = {
        "draws": summary.draws,
        "missed": summary.missed,
        "best_baseline": summary.best_baseline and summary.best_baseline.detector,
        "worst": [worst(one) for s, one in sorted(summary.worst.items()) if not s.random],
        "differences": [asdict(gain) for gain in summary.differences.values()],
        "separations": [
            asdict(one) | {"control": optional(summary.controls.get((one.scorer, one.place)))}
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


def _title(scorer: Scorer) -> str:
    if scorer.circuit == FOUND:
        return f"**{scorer.detector}**"
    return f"{scorer.detector} ({'oracle' if scorer.circuit == ORACLE else 'baseline'})"


def _bounded(one: Separation) -> str:
    return f"{one.auroc:.3f}" + ("" if one.low is None else f" [{one.low:.3f}, {one.high:.3f}]")


def _with_control(summary: Summary, one: Separation | None) -> str:
    if one is None:
        return "-"
    control = summary.controls.get((one.scorer, one.place))
    return f"{_bounded(one)} / {control.mean:.3f}" if control else _bounded(one)


def _shares(shares: Sequence[float]) -> str:
    if not shares:
        return "-"
    mean = _percent(sum(shares) / len(shares))
    if len(shares) == 1:
        return mean
    return f"{mean} ({_percent(min(shares))} to {_percent(max(shares))})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
