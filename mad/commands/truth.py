"""Put discovery methods to the test where the right answer is known.

    madcap truth out=runs/truth
    madcap truth methods=[acdc] programs=[recall,sort] ablation=mean

Runs discovery methods on transformers whose circuit is known exactly: programs compiled to weights,
plain, with the residual stream rotated, and with heads and neurons that compute something of no
use; and models that were trained until a program's circuit was theirs. Writes truth.json, truth.md
and truth.png: the AUC of edges and of nodes against the true circuit, whether it was found exactly,
and the time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from abstraction.ground_truth.scoreboard import Result

FILES = ("truth.json", "truth.md", "truth.png", "truth.svg")


@dataclass
class By:
    """The ablation that methods and truth go by."""

    # ablation=NAME: zero, mean, positional_mean, counterfactual, resample or optimal
    name: str = "resample"


@dataclass
class Truth:
    """What is tested on what."""

    # empty: all that are registered, with their default settings
    methods: list[str] = field(default_factory=list)
    programs: list[str] = field(default_factory=list)  # empty: all
    variants: list[str] = field(default_factory=list)  # empty: all
    # what methods go by; null: kl, and logit_diff for eap and atp_star, which kl gives no gradient
    metric: str | None = None
    ablation: By = field(default_factory=By)
    prompts: int = 64  # per program
    seed: int = 0  # of prompts and donors
    out: str | None = None  # folder for the table and the picture; null: print only
    overwrite: bool = False  # replace what an earlier run left in `out`


def run(config: Truth) -> None:
    """Tests, prints a summary, and writes the table and the picture."""
    from tqdm.auto import tqdm

    from abstraction.ground_truth.programs import PROGRAMS
    from abstraction.ground_truth.scoreboard import VARIANTS, cases, put_to_the_test
    from circuits.discovery import METHODS
    from mad.benchmark.tables import terminal_table
    from mad.commands.console import output

    folder = None if config.out is None else Path(config.out)
    if folder is not None and not config.overwrite:
        _refuse_used(folder)
    names = config.methods or list(METHODS)
    methods = {name: METHODS[name].schema() if name in METHODS else None for name in names}
    programs, variants = config.programs or list(PROGRAMS), config.variants or list(VARIANTS)
    tested = put_to_the_test(
        methods,
        programs,
        variants,
        metric=config.metric,
        ablation=config.ablation.name,
        prompts=config.prompts,
        seed=config.seed,
    )
    total = len(methods) * len(cases(programs, variants))
    results = list(tqdm(tested, total=total, desc="truth", unit="test", disable=None))
    rows = _summary(results)
    title = "discovery where the circuit is known; AUCs are means"
    headers = ("variant", "method", "exact", "edge AUC", "lowest", "node AUC", "s")
    output().print(terminal_table(title, headers, rows, left=("variant", "method")))
    if folder is not None:
        _write(results, config, folder)
        print(f"wrote {folder}/truth.json, truth.md, truth.png and truth.svg")


def _refuse_used(folder: Path) -> None:
    for name in FILES:
        if (folder / name).exists():
            raise FileExistsError(
                f"{folder} holds {name} already; choose another out=, or overwrite=true"
            )


def _summary(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """One row for each variant and method."""
    summary = []
    for variant, method in dict.fromkeys((r.variant, r.method) for r in results):
        rows = [r for r in results if (r.variant, r.method) == (variant, method)]
        edges = [r.edge_auc for r in rows if not math.isnan(r.edge_auc)]
        nodes = [r.node_auc for r in rows if not math.isnan(r.node_auc)]
        exact = f"{sum(r.exact for r in rows)}/{len(rows)}"
        lowest = _number(min(edges, default=math.nan))
        seconds = f"{sum(r.seconds for r in rows):.2f}"
        summary.append((variant, method, exact, _mean(edges), lowest, _mean(nodes), seconds))
    return summary


def _mean(values: list[float]) -> str:
    return _number(sum(values) / len(values) if values else math.nan)


def _write(results: Sequence[Result], config: Truth, folder: Path) -> None:
    from abstraction.ground_truth.scoreboard_plot import draw_truth
    from mad.benchmark.tables import markdown_table

    folder.mkdir(parents=True, exist_ok=True)
    data = [{name: _json(value) for name, value in asdict(result).items()} for result in results]
    (folder / "truth.json").write_text(
        json.dumps({"config": asdict(config), "results": data}, indent=1) + "\n"
    )
    columns = "program variant method true found of edge_AUC node_AUC exact missing extra seconds"
    headers = [column.replace("_", " ") for column in columns.split()]
    rows = [
        (
            r.program,
            r.variant,
            r.method,
            str(r.true_edges),
            str(r.found_edges),
            str(r.edges),
            _number(r.edge_auc),
            _number(r.node_auc),
            "yes" if r.exact else "no",
            " ".join(r.missing),
            " ".join(r.extra),
            f"{r.seconds:.2f}",
        )
        for r in results
    ]
    (folder / "truth.md").write_text(markdown_table(headers, rows) + "\n")
    metric = config.metric or "KL (EAP, AtP*: logit difference)"
    measured = f"{metric}, {config.ablation.name} ablation, {config.prompts} prompts"
    for form in ("png", "svg"):
        draw_truth(
            results,
            folder / f"truth.{form}",
            title="Discovery where the circuit is known",
            caption=f"edge AUC; tick: found exactly; {measured}",
        )


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _json(value: object) -> object:
    return None if isinstance(value, float) and math.isnan(value) else value
