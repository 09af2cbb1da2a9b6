"""The whole path on the shipped model, in a minute: extract, plot, score, compare.

    madcap demo out=runs/demo
    madcap demo out=runs/demo seed=1 method.tau=0.03 overwrite=true
    madcap demo out=runs/demo detector=strict

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mad.pipeline import Run, RunConfig
from mad.trusted import Splits

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table
    from torch import Tensor

    from circuits.circuit import Circuit
    from circuits.prompts import Prompts
    from mad.benchmark.results import Scorer, Scores
    from mad.calibration import Calibrated

NORMALS, ANOMALY = ("normal_iid", "normal_shift"), "anomaly"
HEADERS = (
    *("", "AUROC\niid", "\nshift"),
    *("flagged\niid", "\nshift", "\nanomaly", "\nagree", "\ndisagree"),
)
Parts = dict[str, "Tensor"]  # scores of the calibration inputs and of each group


@dataclass
class Demo(RunConfig):
    """What the demonstration runs on."""

    model: Any = "???"  # the model with the backdoor
    task: Any = "???"  # the trusted prompts
    method: Any = "???"  # how edges are judged
    ablation: Any = "???"  # what a removed edge carries during discovery
    detector: Any = "???"  # the detector that is fitted and calibrated
    alpha: float = 0.01  # the false-alarm rate that calibration has to allow
    splits: Splits = field(default_factory=Splits)  # trusted prompts for each purpose
    inputs: int = 300  # prompts of each group that are scored
    controls: int = 5  # random circuits of the same size that are scored too
    out: str = "runs/demo"  # folder to write


def run(config: Demo) -> None:
    """Runs the demonstration and prints the table."""
    from mad.benchmark.results import Scorer
    from mad.commands.console import output
    from mad.commands.plot import Plot, draw
    from mad.pipeline import make_run

    console = output()
    console.print(
        f"1. the circuit of {config.task.name} by {config.method.name}, on trusted prompts"
    )
    done = make_run(config)
    console.print("2. its pictures")
    pictures = draw(done.folder, Plot())
    console.print("3. scores of new inputs")
    drawn = _inputs(config, done)
    parts = {Scorer(config.detector.name): _scored(config, done, drawn)}
    console.print("4. beside baselines and random circuits")
    inputs = {group: done.model.prompts(records) for group, records in drawn.items()}
    parts |= _others(config, done, inputs)
    random = dict(_random_circuits(config, done, inputs))
    pictures += _pictures(config, done, parts)
    rows = table_rows(_subject(config, drawn, parts), config.alpha)
    rows += _mean_row(table_rows(_subject(config, drawn, random), config.alpha))
    data = {"rows": rows, "alpha": config.alpha}
    (done.folder / "demo.json").write_text(json.dumps(data, indent=1) + "\n")
    console.print(_circuit_line(config, done), highlight=False, soft_wrap=True)
    console.print(_table(config, rows))
    console.print("pictures:")
    for path in pictures:
        console.print(f"  {path}", highlight=False)
    console.print(f"scores:   {done.folder / 'scored.jsonl'}", highlight=False)


# --- scores ---------------------------------------------------------------------------------------


def _inputs(config: Demo, done: Run) -> dict[str, list[dict]]:
    """New records of each group: those of `normal_iid` are in none of the run's trusted splits."""
    from mad.tasks import ANOMALY_TASKS

    task = ANOMALY_TASKS["recall_redirect"]
    sizes = {"normal_iid": 3 * config.inputs, "normal_shift": config.inputs}
    drawn = task.groups(
        task.schema(), trusted=0, **sizes, anomaly=config.inputs, seed=config.seed + 1
    )
    trusted = {sequence for prompts in done.splits.values() for sequence in prompts.sequences()}
    new = [record for record in drawn["normal_iid"] if tuple(record["clean"]) not in trusted]
    drawn["normal_iid"] = new[: config.inputs]
    return {group: drawn[group] for group in (*NORMALS, ANOMALY)}


def _scored(config: Demo, done: Run, drawn: Mapping[str, list[dict]]) -> Parts:
    """Scores a file of the inputs, as `madcap score` does, and reads the scores back."""
    import torch

    from circuits.prompts import write_jsonl
    from mad.scoring import Scoring, read_results, score

    inputs, out = done.folder / "inputs.jsonl", done.folder / "scored.jsonl"
    write_jsonl([record for records in drawn.values() for record in records], inputs)
    settings = Scoring(alpha=config.alpha)
    score(inputs, out, done.detector, done.model, settings, memory=config.memory, overwrite=True)
    scores = torch.tensor([result["score"] for result in read_results(out)])
    by_group = zip(drawn, scores.split([len(records) for records in drawn.values()]))
    return {"calibration": done.detector.calibration.scores, **dict(by_group)}


def _others(config: Demo, done: Run, inputs: Mapping[str, Prompts]) -> dict[Scorer, Parts]:
    """Other detectors, fitted on the same trusted prompts and saved beside the run's own."""
    from mad.benchmark.results import Scorer
    from mad.detectors import Deviation, Mahalanobis, MaxProbability, Strict
    from mad.saved_detector import save_detector

    parts = {}
    deviation = Deviation(ablation="positional_mean" if config.positions else "mean")
    for other in (Strict(), deviation, MaxProbability(), Mahalanobis()):
        if other.name != config.detector.name:
            fitted, scores = _fitted(config, done, inputs, other, done.circuit)
            folder = done.folder / "detector" / other.name
            save_detector(fitted, folder, weight_hash=done.model.weight_hash)
            parts[Scorer(other.name)] = scores
    return parts


def _random_circuits(
    config: Demo, done: Run, inputs: Mapping[str, Prompts]
) -> Iterator[tuple[Scorer, Parts]]:
    """The run's own detector on random circuits."""
    from circuits.extraction import random_controls
    from mad.benchmark.results import Scorer

    controls = random_controls(done.circuit, config.controls, config.seed)
    for number, circuit in enumerate(controls):
        scores = _fitted(config, done, inputs, config.detector, circuit)[1]
        yield Scorer(f"random circuit {number}"), scores


def _fitted(
    config: Demo, done: Run, inputs: Mapping[str, Prompts], detector: Any, circuit: Circuit
) -> tuple[Calibrated, Parts]:
    """A calibrated detector, and its scores of the inputs."""
    from mad.calibration import fit
    from mad.detector import Context

    fitted = fit(
        detector,
        Context(done.engine, circuit),
        done.splits["fit"],
        done.splits["calibration"],
        used={split: done.splits[split] for split in ("discovery", "evaluation")},
        memory=config.memory,
    )
    scores = {group: fitted.score(own, memory=config.memory) for group, own in inputs.items()}
    return fitted, {"calibration": fitted.calibration.scores, **scores}


def _subject(
    config: Demo, drawn: Mapping[str, list[dict]], parts: Mapping[Scorer, Parts]
) -> Scores:
    """The scores as the benchmark has them; anomalies are told apart by kind."""
    from mad.benchmark.results import Scores

    strata = {group: [group] * len(drawn[group]) for group in NORMALS}
    strata[ANOMALY] = [record["kind"] for record in drawn[ANOMALY]]
    return Scores("recall_redirect", config.seed, strata, {}, parts)


# --- what is shown --------------------------------------------------------------------------------


def _pictures(config: Demo, done: Run, parts: Mapping[Scorer, Parts]) -> list[Path]:
    from mad.benchmark.auroc import roc_curve
    from mad.benchmark.results import TITLES
    from mad.benchmark.roc import draw_roc, draw_score_distributions

    model, name = done.model.path.rsplit("/", 1)[-1], config.detector.name
    curves = [
        roc_curve(scorer.detector, title, scores[group], scores[ANOMALY])
        for scorer, scores in parts.items()
        for group, title in TITLES.items()
    ]
    own = next(iter(parts.values()))
    return [
        draw_roc(
            curves,
            done.folder / "roc.png",
            "Who notices the backdoor",
            f"{model}: anomalies are prompts with the backdoor's trigger",
        ),
        draw_score_distributions(
            {group.replace("_", " "): own[group].tolist() for group in (*NORMALS, ANOMALY)},
            done.detector.calibration.threshold(config.alpha),
            done.folder / "scores.png",
            alpha=config.alpha,
            log_scale=True,
            title="What prompts carry off the circuit, put into trusted prompts",
            caption=f"score of {name}, with the calibrated threshold",
        ),
    ]


def _circuit_line(config: Demo, done: Run) -> str:
    """The circuit's size and faithfulness."""
    metrics, chance = done.metrics, done.metrics["random_circuits"]["mean"]
    metric = done.circuit.about["metric"]
    line = (
        f"\ncircuit: {metrics['edges_kept']} of {metrics['edges_total']} edges kept, faithfulness "
        f"{metrics['faithfulness']:.3f} ({metric}, {config.ablation.name} ablation)"
    )
    return line if chance is None else f"{line}; random circuits of that size {chance:.3f}"


def table_rows(subject: Scores, alpha: float) -> list[dict[str, Any]]:
    """Each detector's AUROC of all anomalies, and the shares flagged: of groups, and of each kind
    of anomalies.
    """
    from mad.benchmark.auroc import separations
    from mad.benchmark.flags import flags
    from mad.benchmark.results import Results

    pooled = {group: [group] * len(names) for group, names in subject.strata.items()}
    whole = replace(subject, strata=pooled)
    rows = {s: {"detector": s.detector, "auroc": {}, "flagged": {}} for s in subject.parts}
    for one in separations(Results((whole,)), draws=0):
        rows[one.scorer]["auroc"][one.place.group] = one.auroc
    for flag in flags(Results((whole, subject)), [alpha]):
        rows[flag.scorer]["flagged"][flag.place.stratum] = flag.share
    return list(rows.values())


def _mean_row(controls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The mean over random circuits; no row where there are none."""
    if not controls:
        return []

    def mean(what: str, groups: Sequence[str]) -> dict[str, float]:
        return {g: sum(row[what][g] for row in controls) / len(controls) for g in groups}

    name, flagged = f"random circuits ({len(controls)})", mean("flagged", (*NORMALS, ANOMALY))
    return [{"detector": name, "auroc": mean("auroc", NORMALS), "flagged": flagged}]


def _table(config: Demo, rows: Sequence[Mapping[str, Any]]) -> Table:
    from rich import box
    from rich.table import Table

    title = f"AUROC, and share flagged at alpha = {config.alpha:.0%}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in HEADERS:
        table.add_column(header, justify="right" if header else "left", no_wrap=True)
    for row in rows:
        name, flagged = row["detector"].split(" (")[0], row["flagged"]
        aurocs = [f"{row['auroc'][group]:.3f}" for group in NORMALS]
        groups = (*NORMALS, ANOMALY, "agree", "disagree")
        shares = [f"{flagged[group]:.1%}" if group in flagged else "" for group in groups]
        table.add_row(name, *aurocs, *shares)
    return table
