"""Time the engine in forwards of the same model.

    madcap bench suite=engine
    madcap bench suite=engine out=runs/bench

Prints a table and, with out=, writes bench.json and bench.md. One forward is one plain forward of the same model on the
same batch in the same run, of the TransformerLens bridge or of the bare HuggingFace module.
"""

from __future__ import annotations

import json
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

    from circuits.speed import SHAPES, time_engine

    if config.suite != "engine":
        raise ValueError(f"suite={config.suite!r}, but the suites are engine")
    if config.threads < 1:
        raise ValueError(f"threads={config.threads}, but at least 1 is needed")
    torch.set_num_threads(config.threads)
    timings = [timing for shape in SHAPES for timing in time_engine(shape)]
    headers = ("shape", "work", "ms", "bridge forwards", "module forwards")
    rows = [
        (t.shape, t.work, f"{1e3 * t.seconds:.2f}", f"{t.bridge_forwards:.2f}", f"{t.module_forwards:.2f}")
        for t in timings
    ]
    table = Table(title=f"cost in forwards, {config.threads} threads", title_justify="left")
    for header in headers:
        table.add_column(header, justify="left" if header in ("shape", "work") else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if config.out:
        folder = Path(config.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench.json").write_text(json.dumps([asdict(t) for t in timings], indent=1) + "\n")
        lines = [
            "| " + " | ".join(headers) + " |",
            "|" + "---|" * len(headers),
            *("| " + " | ".join(r) + " |" for r in rows),
        ]
        (folder / "bench.md").write_text("\n".join(lines) + "\n")
        print(f"wrote {folder}/bench.json and bench.md")
