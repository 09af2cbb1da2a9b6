"""Measure a circuit in every way: over sizes, by knock-outs, edge by edge, against a known one.

    madcap evaluate circuit=runs/pronoun
    madcap evaluate circuit=runs/pronoun redraws=0 minimality=0
    madcap evaluate circuit=runs/pronoun trusted=others.jsonl metric=logit_diff overwrite=true
    madcap evaluate circuit=runs/ioi against=known.json

Writes evaluation.json, evaluation.png and .svg into the run folder: faithfulness at MIB's ten sizes
with CPR and CMD, NDF, completeness under knock-outs, the effect of each edge, stability over
redrawn prompts; each with its standard error over prompts, and with what random circuits of the
same size reach. against=CIRCUIT is a known circuit, as a run folder, a circuit.json or a graph file
of EAP-IG or MIB: AUC of edges and of nodes.

Prompts are those that the run was measured on, made again from its task; trusted=FILE are others.
What the figures say against the circuit, or against each other, is told in warnings. Several runs
are compared by `madcap compare`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from circuits.evaluation.evaluate import Effort
from mad.commands.score import Place


@dataclass
class Other:
    """Another ablation."""

    name: str | None = None  # ablation=NAME: by this ablation; null: the circuit's own


@dataclass
class Evaluate(Effort):
    """Which circuit is measured, on what, and how much of it."""

    circuit: str = "???"  # the run folder that `madcap extract` wrote
    # trusted prompts to measure on: JSONL, auto-circuit JSON or EAP-IG CSV; null: those that the
    # run was measured on
    trusted: str | None = None
    against: str | None = None  # a known circuit: a run folder, circuit.json or EAP-IG graph file
    metric: str | None = None  # null: the circuit's own
    ablation: Other = field(default_factory=Other)
    # working memory beside the model's own weights: kB, MB, GB; decides how much runs at once
    memory: str = "2GB"
    seed: int = 0  # of all that is drawn
    model: Place = field(default_factory=Place)
    device: str = "cpu"  # any torch device
    overwrite: bool = False  # replace an earlier evaluation


def run(config: Evaluate) -> None:
    """Measures, writes, and prints the figures that matter most."""
    import logging
    from dataclasses import fields

    from circuits.engine.memory import parse_memory
    from circuits.files import write_json
    from mad.folder import EVALUATION, open_run
    from mad.measuring import check_measurable, draw_evaluation, measure

    folder = Path(config.circuit)
    if (folder / EVALUATION).exists() and not config.overwrite:
        raise FileExistsError(f"{folder / EVALUATION} exists; overwrite=true replaces it")
    check_measurable(folder, config.metric, config.ablation.name)
    parse_memory(config.memory)
    opened = open_run(folder, model=config.model.path, head=config.model.head, device=config.device)
    told = measure(
        opened,
        Effort(**{field.name: getattr(config, field.name) for field in fields(Effort)}),
        trusted=config.trusted,
        against=config.against,
        metric=config.metric,
        ablation=config.ablation.name,
        seed=config.seed,
        memory=config.memory,
    )
    write_json(folder / EVALUATION, told)
    draw_evaluation(told, opened.circuit, folder)
    for line in told["warnings"]:
        logging.getLogger(__name__).warning("%s", line)
    _print(told)
    print(f"wrote {folder / EVALUATION}, evaluation.png and evaluation.svg")


def _print(told: Mapping[str, Any]) -> None:
    from mad.benchmark.tables import terminal_table
    from mad.commands.console import output

    title = (
        f"{told['edges_kept']} of {told['edges_total']} edges on {told['prompts']['prompts']} "
        f"prompts, {told['metric']}, {told['ablation']} ablation, {told['seconds']:.0f} s"
    )
    headers = ("figure", "value", "error", "random")
    output().print(terminal_table(title, headers, _rows(told), left=("figure",)))


def _rows(told: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The figures that matter most, each with its error and that of random circuits."""
    areas, own = told["areas"], told["by_metric"].get(told["metric"], {})
    rows: list[tuple[Any, ...]] = [
        ("faithfulness", told["faithfulness"], own.get("error"), told["random_circuits"]["mean"]),
        ("NDF", told["ndf"]["value"], told["ndf"]["error"], told["ndf"]["random_mean"]),
    ]
    rows += [
        (f"faithfulness, {name}", one["value"], one["error"], None)
        for name, one in told["by_metric"].items()
        if name != told["metric"]
    ]
    for name in ("cpr", "cmd", "cpr_log", "cmd_log"):
        one = areas[name]
        label = name.upper().replace("_LOG", " over log size")
        rows.append((label, one["value"], one["error"], one["random_mean"]))
    rows += _rows_of_parts(told)
    return [(name, *(_number(value) for value in values)) for name, *values in rows]


def _rows_of_parts(told: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    if (whole := told["completeness"]) is not None:
        gap, without = whole["gap"], whole["without_circuit"]
        rows.append(
            ("knock-outs: mean gap", gap["value"], gap["error"], whole["gap_of_random_circuits"])
        )
        chance = whole["without_random_circuits"]
        rows.append(("the model without it", without["value"], without["error"], chance))
    if (minimal := told["minimality"]) is not None:
        chance = minimal["below_noise_of_random_circuits"]
        label = f"edges below noise, of {minimal['tested']}"
        rows.append((label, minimal["below_noise"], None, chance))
    if (stable := told["stability"]) is not None:
        label = f"Jaccard over {stable['redraws']} redraws"
        rows.append((label, stable["mean"], stable["error"], stable["of_random_circuits"]))
    if (known := told["against"]) is not None:
        rows += [(f"AUC of {kind}", known[kind]["auc"], None, 0.5) for kind in ("edges", "nodes")]
    return rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
