"""Put several runs side by side: a table, and one picture of faithfulness against edges.

    madcap compare runs/acdc runs/eap_ig out=runs/compared
    madcap compare runs/*
    madcap compare 'runs=[runs/a, runs/b]'

Columns: edges kept, faithfulness, CPR and CMD (see `madcap evaluate`), the share of prompts that
the circuit gets right, KL(model || circuit) in nats, the seconds of discovery; and a second table
of faithfulness by each metric.
Runs that were measured on different models, prompts, metrics or ablations are refused: their
figures mean different things. out=DIR gets compare.json, compare.md, compare.png and compare.svg.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mad.comparison import Compared

FILES = ("compare.json", "compare.md", "compare.png", "compare.svg")


@dataclass
class Compare:
    """Which runs are compared."""

    runs: list[str] = field(default_factory=list)  # run folders; they may also stand by themselves
    out: str | None = None  # folder for the table and the picture; null: print only
    overwrite: bool = False  # replace what an earlier comparison left in `out`


def run(config: Compare) -> None:
    """Compares, prints the table, and writes it with the picture."""
    from mad.benchmark.tables import terminal_table
    from mad.commands.console import output
    from mad.comparison import caption, compared, table, table_by_metric

    folder = None if config.out is None else Path(config.out)
    if folder is not None and not config.overwrite:
        _refuse_used(folder)
    runs = compared([Path(one) for one in config.runs])
    console, left = output(), ("run", "method")
    console.print(terminal_table(caption(runs), *table(runs), left=left))
    console.print(terminal_table("faithfulness by metric", *table_by_metric(runs), left=left))
    if folder is not None:
        _write(runs, folder)
        print(f"wrote {', '.join(str(folder / name) for name in FILES)}")


def _refuse_used(folder: Path) -> None:
    for name in FILES:
        if (folder / name).exists():
            raise FileExistsError(
                f"{folder} holds {name} already; choose another out=, or overwrite=true"
            )


def _write(runs: Sequence[Compared], folder: Path) -> None:
    from circuits.files import write_json, write_text
    from mad.benchmark.tables import markdown_table
    from mad.comparison import caption, draw_comparison, table, table_by_metric

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILES[0], [asdict(run) for run in runs])
    tables = [markdown_table(*table(runs)), markdown_table(*table_by_metric(runs))]
    write_text(folder / FILES[1], "\n\n".join([caption(runs), *tables]) + "\n")
    for name in FILES[2:]:
        draw_comparison(runs, folder / name)
