"""What was measured, as Markdown and JSON: every table is a function from a `Summary` to a string.

    write(Path("runs/study"))  # reads runs/study/scores, writes runs/study/report.md and report.json

AUROC is of one stratum of anomalies against one group of normals; the worst case is the smallest
over all of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mad.study.cells import (
    ALPHAS,
    CALIBRATION,
    DRAWS,
    MAIN,
    NONE,
    ORACLE,
    SEVERAL,
    Cell,
    Combination,
    Control,
    Difference,
    Flag,
    Results,
    Scorer,
    best_baseline,
    by_scorer,
    cells,
    compare,
    controls,
    flags,
    oracle,
    places,
    read,
    with_combination,
    worst_cases,
    worst_controls,
    worst_false_alarms,
)

FILES = ("report.md", "report.json")
ALARM = 0.01  # the false-alarm rate that the headline and the grids are at


@dataclass(frozen=True)
class Summary:
    """Results with all that the tables are made of."""

    results: Results
    cells: tuple[Cell, ...]  # random controls too, and oracle rows
    flags: tuple[Flag, ...]
    main: str = MAIN  # the circuit that candidates are reported at
    draws: int = DRAWS
    seed: int = 0
    missed: tuple[str, ...] = ()  # models that were trained and did not learn their task

    @cached_property
    def worst(self) -> Mapping[Scorer, Cell]:
        """Every scorer's worst case."""
        return worst_cases(self.cells)

    @cached_property
    def alarms(self) -> Mapping[Scorer, Flag]:
        """Every scorer's worst false alarms."""
        return worst_false_alarms(self.flags, ALARM)

    @cached_property
    def controls(self) -> Mapping[tuple[Scorer, tuple[str, int, str, str]], Control]:
        """Random controls by place."""
        return controls(self.cells)

    @cached_property
    def worst_controls(self) -> Mapping[Scorer, Control]:
        """Random controls' worst cases."""
        return worst_controls(self.cells)

    @cached_property
    def counts(self) -> Mapping[Scorer, int]:
        """In how many places each scorer was computed."""
        return {scorer: len(own) for scorer, own in by_scorer(self.cells).items()}

    @cached_property
    def everywhere(self) -> int:
        """How many places there are."""
        return len(places(self.cells))

    @cached_property
    def shown(self) -> tuple[Scorer, ...]:
        """Baselines, oracle rows, combinations, and candidates at the main circuit; best worst case
        first.
        """
        there = [s for s in self.worst if s.baseline or s.circuit in (self.main, SEVERAL, ORACLE)]
        return tuple(
            sorted(there, key=lambda s: (self.counts[s] < self.everywhere, -self.worst[s].auroc, s))
        )

    @cached_property
    def candidates(self) -> tuple[str, ...]:
        """Scores that look through a circuit."""
        apart = (NONE, ORACLE, SEVERAL)
        return tuple(sorted({s.score for s in self.results.scorers if s.circuit not in apart}))

    @cached_property
    def best_baseline(self) -> Scorer | None:
        """The baseline to beat; None: none was computed everywhere."""
        try:
            return best_baseline(self.cells)
        except ValueError:
            return None

    @cached_property
    def differences(self) -> Mapping[Scorer, Difference]:
        """Every complete candidate's worst case less the best baseline's."""
        if self.best_baseline is None:
            return {}
        complete = [
            s
            for s in self.shown
            if s.circuit not in (NONE, ORACLE) and self.counts[s] == self.everywhere
        ]
        against = self.best_baseline
        return {
            s: compare(self.results, s, against, draws=self.draws, seed=self.seed) for s in complete
        }


def summarise(
    results: Results,
    *,
    main: str = MAIN,
    draws: int = DRAWS,
    seed: int = 0,
    missed: Sequence[str] = (),
) -> Summary:
    """Computes every cell and every flag.

    Raises:
        ValueError: draws is under 2, or a calibration part is too small for an alpha of `ALPHAS`.
    """
    if draws < 2:
        raise ValueError(f"draws={draws}, but an interval needs at least 2")
    found = cells(results, draws=draws, seed=seed)
    return Summary(
        results, (*found, *oracle(found)), flags(results, ALPHAS), main, draws, seed, tuple(missed)
    )


def write(
    folder: Path,
    *,
    tasks: Sequence[str] | None = None,
    stem: str = "report",
    main: str = MAIN,
    combinations: Sequence[Combination] = (),
    draws: int = DRAWS,
    seed: int = 0,
) -> Summary:
    """Reads `folder`/scores, writes `folder`/STEM.md and STEM.json, and returns what they were made
    of.

    `tasks` are those that are reported; None: all.

    Raises:
        FileNotFoundError, ValueError: as `mad.study.cells.read` and `summarise`.
    """
    folder = Path(folder)
    results = read(folder)
    if tasks is not None:
        results = results.select(tasks=tasks)
    for combination in combinations:
        results = with_combination(results, combination)
    missed = sorted(
        f"{file.parent.name} {file.stem}" for file in (folder / "models").glob("*/*.missed")
    )
    summary = summarise(results, main=main, draws=draws, seed=seed, missed=missed)
    (folder / f"{stem}.md").write_text(markdown(summary))
    (folder / f"{stem}.json").write_text(as_json(summary))
    return summary


# --- Markdown
# ---------------------------------------------------------------------------------------------------


def markdown(summary: Summary) -> str:
    """Every table, one below the other."""
    sections = {
        "Worst cases": headline,
        "Every task, regime and stratum": full_table,
        "Who is flagged": flag_table,
        "Circuits": circuit_tables,
        "Trusted inputs": trusted_inputs,
    }
    parts = ["# Which scores tell anomalies from normals", about(summary)]
    parts += [f"## {title}\n\n{section(summary)}" for title, section in sections.items()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def about(summary: Summary) -> str:
    """What was scored, and how numbers are to be read."""
    seeds: dict[str, list[int]] = {}
    for subject in summary.results.subjects:
        seeds.setdefault(subject.task, []).append(subject.seed)
    listed = "; ".join(
        f"{task} (seeds {', '.join(map(str, own))})" for task, own in sorted(seeds.items())
    )
    missed = (
        f"Passed over, since they did not learn their task: {', '.join(summary.missed)}.\n"
        * bool(summary.missed)
    )
    return (
        f"Models: {listed}.\n{missed}"
        f"Candidates look through the circuit `{summary.main}` unless another is named; baselines "
        "through none.\n"
        f"AUROC with 95 % bootstrap intervals over prompts ({summary.draws} draws); models are not "
        "redrawn.\n"
        "`iid`: normals as the trusted ones; `shift`: normals are new too.  `control`: random "
        "circuits of the same "
        "size.  `oracle`: picks the layer in each cell by its AUROC, which no detector can."
    )


def headline(summary: Summary) -> str:
    """Each score's worst case with where it occurs, its random controls', and its worst false
    alarms.
    """
    if not summary.shown:
        return "No task with anomalies was scored."
    rows = []
    for scorer in summary.shown:
        worst, alarm, difference = (
            summary.worst[scorer],
            summary.alarms.get(scorer),
            summary.differences.get(scorer),
        )
        control = summary.worst_controls.get(scorer)
        rows.append(
            (
                _title(scorer, summary.main),
                _bounded(worst),
                _place(worst),
                "-"
                if difference is None
                else f"{difference.difference:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]",
                _spread(control),
                "-" if alarm is None else _percent(alarm.share),
                "-"
                if alarm is None
                else f"{alarm.task} {alarm.seed} {alarm.group} {alarm.stratum}",
                f"{summary.counts[scorer]}/{summary.everywhere}",
            )
        )
    best = summary.best_baseline
    against = (
        "No baseline was computed everywhere."
        if best is None
        else f"The best baseline is `{best.score}`."
    )
    text = (
        f"{against}  `difference`: worst case less the best baseline's.  `control worst`: mean "
        "over random circuits of "
        "each one's own worst case, with their range.  `false alarms`: the benign stratum with "
        "the largest share "
        f"flagged at {100 * ALARM:g} %.  A score that is missing in some cells stands below those "
        "that are complete."
    )
    headers = "score,worst case,where,difference,control worst,false alarms,of which,cells".split(
        ","
    )
    return f"{text}\n\n{_table(headers, rows)}"


def full_table(summary: Summary) -> str:
    """For each task, regime and stratum the AUROC of every shown score: mean over seeds, and seed
    by seed.
    """
    own = {(cell.scorer, cell.place): cell for cell in summary.cells}
    parts = [
        "By mean over seeds.  Each seed: AUROC [95 % interval], then the mean of its random "
        "controls after a slash."
    ]
    for task, regime, stratum in sorted({(c.task, c.regime, c.stratum) for c in summary.cells}):
        here = [
            cell
            for cell in summary.cells
            if (cell.task, cell.regime, cell.stratum) == (task, regime, stratum)
        ]
        seeds = sorted({cell.seed for cell in here})
        rows: list[tuple[float, tuple[str, ...]]] = []
        for scorer in summary.shown:
            found = [own.get((scorer, (task, seed, regime, stratum))) for seed in seeds]
            values = [cell.auroc for cell in found if cell is not None]
            if values:
                columns = [
                    "-" if cell is None else _bounded(cell) + _beside(summary, cell)
                    for cell in found
                ]
                mean = sum(values) / len(values)
                rows.append((mean, (_title(scorer, summary.main), f"{mean:.3f}", *columns)))
        rows.sort(key=lambda row: -row[0])
        sizes = sorted({(cell.anomalies, cell.normals) for cell in here})
        counted = ", ".join(
            f"{anomalies} anomalies, {normals} normals" for anomalies, normals in sizes
        )
        table = _table(
            ["score", "mean", *(f"seed {seed}" for seed in seeds)], [row for _, row in rows]
        )
        parts.append(f"### {task}, {regime}, {stratum}\n\n{counted}\n\n{table}")
    return "\n\n".join(parts)


def flag_table(summary: Summary) -> str:
    """The share of each stratum that is flagged at each alpha: mean over seeds, and the range."""
    shown = set(_with_unranked(summary))
    shares: dict[tuple, list[float]] = {}
    for flag in summary.flags:
        if flag.scorer in shown:
            shares.setdefault(
                (flag.task, flag.group, flag.stratum, flag.scorer, flag.alpha), []
            ).append(flag.share)
    alphas = sorted({flag.alpha for flag in summary.flags})
    parts = [
        "Mean over seeds, and smallest to largest.  Of normals these are false alarms, of "
        "anomalies detections."
    ]
    for task in sorted({flag.task for flag in summary.flags}):
        columns = list(
            dict.fromkeys((f.group, f.stratum, f.alpha) for f in summary.flags if f.task == task)
        )
        for alpha in alphas:
            own = [(group, stratum) for group, stratum, at in columns if at == alpha]
            rows = []
            for scorer in _with_unranked(summary):
                found = [
                    shares.get((task, group, stratum, scorer, alpha)) for group, stratum in own
                ]
                if any(found):
                    rows.append((_title(scorer, summary.main), *map(_shares, found)))
            headers = ["score", *(f"{group} {stratum}" for group, stratum in own)]
            parts.append(f"### {task}, alpha {100 * alpha:g} %\n\n{_table(headers, rows)}")
    return "\n\n".join(parts)


def _with_unranked(summary: Summary) -> tuple[Scorer, ...]:
    """The shown scores, and those computed only where there are no anomalies; an oracle flags
    nobody.
    """
    more = [
        s
        for s in summary.results.scorers
        if s not in summary.worst and (s.baseline or s.circuit == summary.main)
    ]
    return tuple(s for s in (*summary.shown, *more) if s.circuit != ORACLE)


def _shares(values: Sequence[float] | None) -> str:
    if not values:
        return "-"
    mean = _percent(sum(values) / len(values))
    return (
        mean if len(values) == 1 else f"{mean} ({_percent(min(values))} to {_percent(max(values))})"
    )


# --- circuits
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parsed:
    """A recipe's name taken apart."""

    granularity: str  # positions or edges
    ablation: str
    tau: str
    rest: str  # order, bootstrap or number of prompts, where they are not the usual ones


def parse_recipe(name: str) -> Parsed | None:
    """A recipe's name taken apart; None: it is no recipe's."""
    found = re.fullmatch(
        r"(positions|edges)-([a-z_]+)-(\d[\d.]*(?:e[+-]?\d+)?)((?:-(?:order|boot|n)\d+)*)", name
    )
    return None if found is None else Parsed(found[1], found[2], found[3], found[4].lstrip("-"))


def recipes(summary: Summary, score: str) -> dict[str, Parsed]:
    """The recipes that a score was computed at, in the order of their names."""
    names = sorted({scorer.circuit for scorer in summary.results.scorers if scorer.score == score})
    return {name: parsed for name in names if (parsed := parse_recipe(name)) is not None}


def edges_kept(results: Results, recipe: str) -> list[int]:
    """How many edges the circuit of a recipe keeps on each subject that has it."""
    found = (
        subject.about.get("circuits", {}).get(recipe, {}).get("edges")
        for subject in results.subjects
    )
    return [int(edges) for edges in found if edges is not None]


def circuit_tables(summary: Summary) -> str:
    """For each candidate its grid over recipes, and the recipes that are on no grid."""
    if not summary.candidates:
        return "No score looks through a circuit."
    parts = [
        "Worst case / worst false alarms at 1 %, over granularity and ablation (rows) and tau "
        "(columns).  In brackets "
        "the cells, where some are missing.",
        f"### Edges kept\n\nSmallest to largest over models.\n\n{edges_table(summary)}",
    ]
    for score in summary.candidates:
        parts.append(f"### {score}\n\n{grid(summary, score)}")
        if any(parsed.rest for parsed in recipes(summary, score).values()):
            parts.append(variants(summary, score))
    return "\n\n".join(parts)


def grid(summary: Summary, score: str) -> str:
    """Worst case and worst false alarms of one score over granularity, ablation and tau."""
    return _grid(recipes(summary, score), lambda name: _outcome(summary, Scorer(score, name)))


def edges_table(summary: Summary) -> str:
    """Edges kept over granularity, ablation and tau."""
    names = {
        name: parsed
        for score in summary.candidates
        for name, parsed in recipes(summary, score).items()
    }
    return _grid(names, lambda name: _range(edges_kept(summary.results, name)))


def _grid(names: Mapping[str, Parsed], text: Callable[[str], str]) -> str:
    own = {(p.granularity, p.ablation, p.tau): name for name, p in names.items() if not p.rest}
    taus = sorted({tau for _, _, tau in own}, key=float)
    rows = [
        (
            f"{granularity}, {ablation}",
            *(
                text(own[granularity, ablation, tau])
                if (granularity, ablation, tau) in own
                else "-"
                for tau in taus
            ),
        )
        for granularity, ablation in sorted({key[:2] for key in own}, reverse=True)
    ]
    return _table(["circuit", *(f"tau {tau}" for tau in taus)], rows)


def variants(summary: Summary, score: str) -> str:
    """One score at recipes with another order, other draws or fewer discovery prompts."""
    rows = [
        (name, _outcome(summary, Scorer(score, name)), _range(edges_kept(summary.results, name)))
        for name, parsed in recipes(summary, score).items()
        if parsed.rest
    ]
    return _table(["circuit", "worst case / false alarms", "edges kept"], rows)


def _outcome(summary: Summary, scorer: Scorer) -> str:
    worst, alarm, count = (
        summary.worst.get(scorer),
        summary.alarms.get(scorer),
        summary.counts.get(scorer, 0),
    )
    some = f" ({count}/{summary.everywhere})" if count < summary.everywhere else ""
    texts = (
        "-" if worst is None else f"{worst.auroc:.3f}",
        "-" if alarm is None else _percent(alarm.share),
    )
    return " / ".join(texts) + some


def trusted_inputs(summary: Summary) -> str:
    """How many trusted prompts each part had, and what fewer discovery prompts do to each score."""
    sizes = {
        subject.name: _trusted(subject.about, subject.parts) for subject in summary.results.subjects
    }
    names = list(dict.fromkeys(part for own in sizes.values() for part in own))
    rows = [(name, *(str(own.get(part, "-")) for part in names)) for name, own in sizes.items()]
    parts = [_table(["model", *names], rows)]
    fewer = []
    for score in summary.candidates:
        known = recipes(summary, score)
        for name, parsed in known.items():
            if count := re.fullmatch(r"n(\d+)", parsed.rest):
                base = name.removesuffix(f"-{parsed.rest}")
                fewer.append((score, base, int(count[1]), name))
    if fewer:
        bases = dict.fromkeys((score, base) for score, base, _, _ in fewer)
        rows = [(s, b, str(n), _outcome(summary, Scorer(s, name))) for s, b, n, name in fewer]
        rows += [(s, b, "all", _outcome(summary, Scorer(s, b))) for s, b in bases]
        rows.sort(
            key=lambda row: (row[0], row[1], row[2] == "all", int(row[2]) if row[2] != "all" else 0)
        )
        headers = ["score", "circuit", "discovery prompts", "worst case / false alarms"]
        parts.append(f"Fewer prompts to find the circuit on:\n\n{_table(headers, rows)}")
    return "\n\n".join(parts)


def _trusted(
    record: Mapping[str, Any], parts: Mapping[Scorer, Mapping[str, Any]]
) -> dict[str, int]:
    """Trusted prompts by part: as recorded, and the calibration as it was scored."""
    sizes = {
        part: record["sizes"][part]
        for part in ("discovery", "fit", "hosts")
        if part in record.get("sizes", {})
    }
    lengths = {len(own[CALIBRATION]) for own in parts.values()}
    return sizes | ({CALIBRATION: lengths.pop()} if lengths else {})


# --- JSON
# -------------------------------------------------------------------------------------------------------


def as_json(summary: Summary) -> str:
    """Everything in the tables as numbers, all circuits included; random controls as mean, lowest
    and highest.
    """
    data = {
        "main": summary.main,
        "draws": summary.draws,
        "seed": summary.seed,
        "missed": summary.missed,
        "best_baseline": None if summary.best_baseline is None else summary.best_baseline.score,
        "worst": [
            _worst(summary, scorer) for scorer in sorted(summary.worst) if scorer.control_of is None
        ],
        "differences": [asdict(difference) for difference in summary.differences.values()],
        "cells": [
            asdict(cell) | {"control": _optional(summary.controls.get((cell.scorer, cell.place)))}
            for cell in summary.cells
            if cell.scorer.control_of is None
        ],
        "flags": [asdict(flag) for flag in summary.flags],
        "trusted": {
            subject.name: _trusted(subject.about, subject.parts)
            for subject in summary.results.subjects
        },
        "circuits": {
            subject.name: subject.about.get("circuits", {}) for subject in summary.results.subjects
        },
    }
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def _worst(summary: Summary, scorer: Scorer) -> dict[str, Any]:
    return {
        "score": scorer.score,
        "circuit": scorer.circuit,
        "worst": asdict(summary.worst[scorer]),
        "control": _optional(summary.worst_controls.get(scorer)),
        "false_alarm": _optional(summary.alarms.get(scorer)),
        "edges": edges_kept(summary.results, scorer.circuit),
        "cells": summary.counts[scorer],
        "of": summary.everywhere,
    }


def _optional(value: Any) -> dict[str, Any] | None:
    return None if value is None else asdict(value)


# --- texts
# ------------------------------------------------------------------------------------------------------


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (headers, ("---",) * len(headers), *rows)
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _title(scorer: Scorer, main: str) -> str:
    if scorer.circuit == ORACLE:
        return f"{scorer.score} (oracle)"
    if scorer.circuit == NONE:
        return f"{scorer.score} (baseline)"
    return (
        f"**{scorer.score}**"
        if scorer.circuit == main
        else f"**{scorer.score}** at {scorer.circuit}"
    )


def _place(cell: Cell) -> str:
    return f"{cell.task} {cell.seed} {cell.regime} {cell.stratum}"


def _bounded(cell: Cell) -> str:
    return f"{cell.auroc:.3f}" + ("" if cell.low is None else f" [{cell.low:.3f}, {cell.high:.3f}]")


def _beside(summary: Summary, cell: Cell) -> str:
    control = summary.controls.get((cell.scorer, cell.place))
    return "" if control is None else f" / {control.mean:.3f}"


def _spread(control: Control | None) -> str:
    return (
        "-" if control is None else f"{control.mean:.3f} ({control.low:.3f} to {control.high:.3f})"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _range(values: Sequence[int]) -> str:
    if not values:
        return "-"
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"
