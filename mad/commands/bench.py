"""Time the engine in forwards of the same model, and measure the peak memory of a run.

    madcap bench suite=engine
    madcap bench suite=engine out=runs/bench

Prints two tables and, with out=, writes bench.json and bench.md. One forward is one plain forward of the same model on
the same batch in the same run, of the TransformerLens bridge or of the bare HuggingFace module. Peak memory is that of
a fresh process: Python, torch, the model and the work on it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass
class Bench:
    """What is timed."""

    suite: str = "engine"  # engine: masked runs, attribution and scoring
    threads: int = 2  # CPU threads
    out: str | None = None  # folder for bench.json and bench.md; null: print only


def run(config: Bench) -> None:
    """Times and reports."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from circuits.speed import SHAPES, peak_of_eap, time_engine

    if config.suite != "engine":
        raise ValueError(f"suite={config.suite!r}, but the suites are engine")
    if config.threads < 1:
        raise ValueError(f"threads={config.threads}, but at least 1 is needed")
    torch.set_num_threads(config.threads)
    peaks = [peak_of_eap()]
    timings = [timing for shape in SHAPES for timing in time_engine(shape)]
    tables = [
        (
            f"cost in forwards, {config.threads} threads",
            ("shape", "work", "ms", "bridge forwards", "module forwards"),
            [
                (t.shape, t.work, f"{1e3 * t.seconds:.2f}", f"{t.bridge_forwards:.2f}", f"{t.module_forwards:.2f}")
                for t in timings
            ],
        ),
        (
            "peak memory, MB",
            ("shape", "work", "peak memory, MB"),
            [(peak.shape, peak.work, f"{peak.megabytes:.0f}") for peak in peaks],
        ),
    ]
    for title, headers, rows in tables:
        table = Table(title=title, title_justify="left")
        for header in headers:
            table.add_column(header, justify="left" if header in ("shape", "work") else "right")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    if config.out:
        folder = Path(config.out)
        folder.mkdir(parents=True, exist_ok=True)
        data = {"timings": [asdict(timing) for timing in timings], "peaks": [asdict(peak) for peak in peaks]}
        (folder / "bench.json").write_text(json.dumps(data, indent=1) + "\n")
        texts = ["\n".join(_markdown(headers, rows)) for _, headers, rows in tables]
        (folder / "bench.md").write_text("\n\n".join(texts) + "\n")
        print(f"wrote {folder}/bench.json and bench.md")


def _markdown(headers: Sequence[str], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [headers, ["---"] * len(headers), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
