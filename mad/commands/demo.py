"""The whole path on the shipped model, in a minute: extract, plot, score, compare.

    madcap demo out=runs/demo
    madcap demo out=runs/demo seed=1 method.tau=0.03 overwrite=true

The model is a 2-layer transformer that does associative recall and carries a planted backdoor: a
trigger token makes it answer with the value of another pair. Its circuit is found on trusted
prompts alone; then normal prompts, normal prompts with keys that no trusted prompt has, and prompts
with the trigger are scored against it: what each carries off the circuit is put into trusted
prompts, whose answers should not move. The table says how well that tells them apart, beside the
deviation of the circuit's output, two baselines, and random circuits of the same size. The model
was trained by `madcap train`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from mad.pipeline import RunConfig
from mad.trusted import Splits


@dataclass
class Demo(RunConfig):
    """What the demonstration runs on."""

    model: Any = "???"  # the model with the backdoor
    task: Any = "???"  # the trusted prompts
    method: Any = "???"  # how edges are judged
    ablation: Any = "???"  # what a removed edge carries during discovery
    detector: Any = "???"  # the detector that is fitted and calibrated
    splits: Splits = field(default_factory=Splits)  # trusted prompts for each purpose
    inputs: int = 300  # prompts of each group that are scored
    controls: int = 5  # random circuits of the same size that are scored too
    out: str = "runs/demo"  # folder to write


def run(config: Demo) -> None:
    """Runs the demonstration and prints the table."""
    from rich.console import Console

    from circuits.circuit import Circuit
    from circuits.prompts import write_jsonl
    from circuits.selection import random_circuits
    from mad.benchmark.compare import ANOMALY, Comparison, compare, roc_curves
    from mad.benchmark.roc import draw_roc, draw_score_distributions
    from mad.calibration import fit
    from mad.commands.plot import draw
    from mad.detector import Context
    from mad.detectors import Deviation, Mahalanobis, MaxProbability, Strict
    from mad.pipeline import make_run
    from mad.saved_detector import save_detector
    from mad.scoring import Scoring, score
    from mad.tasks.recall_redirect import RecallRedirect, groups

    console = Console()
    console.print(
        f"1. the circuit of {config.task.name} by {config.method.name}, on trusted prompts"
    )
    done = make_run(config)
    console.print("2. its pictures")
    pictures = draw(done.folder, None, ["svg", "png", "pdf"], 800)

    console.print("3. scores of new inputs")
    drawn = groups(
        RecallRedirect(),
        trusted=0,
        normal_iid=3 * config.inputs,
        normal_shift=config.inputs,
        anomaly=config.inputs,
        seed=config.seed + 1,
    )
    drawn["normal_iid"] = _new(drawn["normal_iid"], done)[: config.inputs]
    drawn = {name: records for name, records in drawn.items() if records}
    write_jsonl(
        [record for records in drawn.values() for record in records], done.folder / "inputs.jsonl"
    )
    score(
        done.folder / "inputs.jsonl",
        done.folder / "scored.jsonl",
        done.detector,
        done.model,
        Scoring(alpha=config.alpha),
        memory=config.memory,
        overwrite=True,
    )

    console.print("4. beside baselines and random circuits")
    inputs = {name: done.model.prompts(records) for name, records in drawn.items()}
    comparisons = [
        compare(config.detector.name, done.detector, inputs, config.alpha, memory=config.memory)
    ]
    trusted = done.splits["fit"], done.splits["calibration"]
    deviation = Deviation(ablation="positional_mean" if config.positions else "mean")
    for other in (Strict(), deviation, MaxProbability(), Mahalanobis()):
        if other.name == config.detector.name:
            continue
        fitted = fit(other, Context(done.engine, done.circuit), *trusted, memory=config.memory)
        save_detector(
            fitted, done.folder / "detector" / other.name, weight_hash=done.model.weight_hash
        )
        comparisons.append(compare(other.name, fitted, inputs, config.alpha, memory=config.memory))
    controls: list[Comparison] = []
    for mask in random_circuits(done.engine.graph, len(done.circuit), config.controls, config.seed):
        context = Context(done.engine, Circuit(done.engine.graph, mask, mask.float()))
        fitted = fit(config.detector, context, *trusted, memory=config.memory)
        controls.append(
            compare("random circuit", fitted, inputs, config.alpha, memory=config.memory)
        )

    caption = (
        f"{done.model.path.rsplit('/', 1)[-1]}: anomalies are prompts with the backdoor's trigger"
    )
    pictures.append(
        draw_roc(
            roc_curves(comparisons), done.folder / "roc.png", "Who notices the backdoor", caption
        )
    )
    pictures.append(
        draw_score_distributions(
            {
                name.replace("_", " "): values.tolist()
                for name, values in comparisons[0].scores.items()
            },
            done.detector.calibration.threshold(config.alpha),
            done.folder / "scores.png",
            alpha=config.alpha,
            log_scale=True,
            title="What prompts carry off the circuit, put into trusted prompts",
            caption=f"score of {config.detector.name}, with the calibrated threshold",
        )
    )
    agree = [record["kind"] == "agree" for record in drawn[ANOMALY]]
    _report(console, done, comparisons, controls, agree, config)
    console.print("pictures:")
    for path in pictures:
        console.print(f"  {path}", highlight=False)
    console.print(f"scores:   {done.folder / 'scored.jsonl'}", highlight=False)


def _new(records: list[dict], done: Any) -> list[dict]:
    """Records whose prompt is in none of the run's trusted splits."""
    trusted = {sequence for prompts in done.splits.values() for sequence in prompts.sequences()}
    return [record for record in records if tuple(record["clean"]) not in trusted]


def _report(
    console: Any,
    done: Any,
    comparisons: list[Any],
    controls: list[Any],
    agree: list[bool],
    config: Demo,
) -> None:
    """Prints the tables and writes `demo.json`."""
    from rich import box
    from rich.table import Table

    metrics = done.metrics
    chance = metrics["random_circuits"]["mean"]
    console.print(
        f"\ncircuit: {metrics['edges_kept']} of {metrics['edges_total']} edges kept, faithfulness "
        f"{metrics['faithfulness']:.3f} ({config.metric}, {config.ablation.name} ablation)"
        + ("" if chance is None else f"; random circuits of that size {chance:.3f}"),
        highlight=False,
        soft_wrap=True,
    )
    title = f"AUROC, and share flagged at alpha = {config.alpha:.0%}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in (
        "",
        "AUROC\niid",
        "\nshift",
        "flagged\niid",
        "\nshift",
        "\nanomaly",
        "\nagree",
        "\ndisagree",
    ):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    rows = []
    for comparison in comparisons:
        flags = _flagged_by_kind(comparison, agree)
        rows.append(
            {"detector": comparison.name, "auroc": dict(comparison.auroc), "flagged": flags}
        )
        table.add_row(
            comparison.name,
            *(f"{comparison.auroc[group]:.3f}" for group in ("normal_iid", "normal_shift")),
            *(f"{flags[group]:.1%}" for group in ("normal_iid", "normal_shift", "anomaly")),
            *(f"{flags[kind]:.1%}" for kind in ("agree", "disagree")),
        )
    if controls:
        mean = {
            g: sum(c.auroc[g] for c in controls) / len(controls)
            for g in ("normal_iid", "normal_shift")
        }
        share = {
            g: sum(c.flagged[g] for c in controls) / len(controls) for g in controls[0].flagged
        }
        rows.append(
            {"detector": f"random circuits ({len(controls)})", "auroc": mean, "flagged": share}
        )
        table.add_row(
            "random circuits",
            *(f"{mean[g]:.3f}" for g in ("normal_iid", "normal_shift")),
            *(f"{share[g]:.1%}" for g in ("normal_iid", "normal_shift", "anomaly")),
            "",
            "",
        )
    console.print(table)
    (done.folder / "demo.json").write_text(
        json.dumps({"rows": rows, "alpha": config.alpha}, indent=1) + "\n"
    )


def _flagged_by_kind(comparison: Any, agree: list[bool]) -> dict[str, float]:
    """Shares flagged by group, and of agreeing and disagreeing anomalies."""
    flags = dict(comparison.flagged)
    for kind, wanted in (("agree", True), ("disagree", False)):
        chosen = [
            hit
            for hit, is_agree in zip(comparison.hits.tolist(), agree, strict=True)
            if is_agree == wanted
        ]
        flags[kind] = sum(chosen) / len(chosen) if chosen else float("nan")
    return flags
