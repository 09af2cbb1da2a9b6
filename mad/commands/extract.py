"""Find the circuit behind a behaviour, measure it, and fit a detector to it.

    madcap extract model=gpt2 task=induction method=eap_ig out=runs/induction
    madcap extract model=FOLDER task=pronoun method=eap_ig selection.edges=80 out=runs/pronoun
    madcap extract model=X.pt task=prompts.jsonl method=acdc method.tau=0.05 metric=kl out=runs/mine
    madcap extract model=FOLDER task=pronoun method=eap_ig units=neurons out=runs/neurons
    madcap extract model=X.pt task=prompts.jsonl method.tau=0.1,0.01 'out=runs/tau${method.tau}' -m

The trusted prompts are split into four parts: one finds the circuit, one measures it, one gives the
means that new inputs are scored under, one calibrates the detector. `out` then holds circuit.json,
scores.safetensors, metrics.json, splits.json, config.yaml and detector/. Draw it with `madcap
plot`, score new inputs with `madcap score`. With check=true model, prompts, splits and alpha are
checked, and nothing is looked for or left.

Of a method that estimates what each removal does, `exact_sample` edges are really removed, and the
rank correlation is printed: near 1 its order can be trusted.

A circuit may also be of units=nodes, units=neurons or, with 'units.dictionaries=[FOLDER,...]',
units=features of sparse autoencoders and transcoders. No detector is fitted to it: they read edges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuits.parts.division import EDGES
from mad.pipeline import Run, RunConfig, make_run, make_unit_run


@dataclass
class Extract(RunConfig):
    """What is extracted from which model, and how."""

    ablation: Any = "???"  # what a removed edge carries during discovery
    detector: Any = "???"  # the detector that is fitted and calibrated at the end
    units: Any = "???"  # what the circuit is made of
    check: bool = False  # only check model, prompts, splits, alpha and `out`, and say what they are


def run(config: Extract) -> None:
    """Extracts, and prints the figures that matter most."""
    if config.check:
        return _check(config)
    from rich.table import Table

    from mad.commands.console import output

    done = make_run(config) if config.units.name == EDGES else make_unit_run(config)
    metrics, console = done.metrics, output()
    table = Table(
        title=f"circuit of {config.task.name} by {config.method.name}",
        title_justify="left",
        show_header=False,
    )
    noun = done.circuit.space.noun
    kept, total = metrics[f"{noun}_kept"], metrics[f"{noun}_total"]
    chance = metrics["random_circuits"]
    made_of = noun if noun == "edges" else config.units.name
    table.add_row(f"{made_of} kept", f"{kept} of {total} ({kept / total:.1%})")
    table.add_row(
        f"faithfulness ({done.circuit.about['metric']}, {config.ablation.name})",
        f"{metrics['faithfulness']:.3f}",
    )
    if chance["count"]:
        table.add_row(
            f"{chance['count']} random circuits of that size",
            f"mean {chance['mean']:.3f}, 95th percentile {chance['percentile_95']:.3f}",
        )
    if scoring := metrics.get("scoring"):
        value = scoring["faithfulness"]
        table.add_row(
            f"faithfulness for scoring ({scoring['ablation']})",
            "none" if value is None else f"{value:.3f}",
        )
    table.add_row("KL(model || circuit)", f"{metrics['kl']:.4f} nats")
    if exact := metrics.get("exact"):
        table.add_row(f"rank correlation with {exact['sampled']} exact effects", _ranks(exact))
    table.add_row("discovery", f"{metrics['seconds']:.1f} s, {metrics['forwards']:.0f} forwards")
    if isinstance(done, Run):
        calibrated = f"{len(done.detector.calibration.scores)} trusted inputs"
        table.add_row("calibration", f"{calibrated}, detector {config.detector.name}")
    else:
        table.add_row("detector", "none: one needs units=edges")
    console.print(table)
    console.print(f"wrote {done.folder}")


def _ranks(exact: Mapping[str, Any]) -> str:
    """Both rank correlations, as far as there are such."""
    told = {"of scores": exact["spearman"], "of |scores|": exact["spearman_absolute"]}
    return ", ".join(
        f"{'none' if value is None else format(value, '.2f')} {name}"
        for name, value in told.items()
    )


def _check(config: Extract) -> None:
    """A dry run: what would be refused before discovery is refused now; the rest is told."""
    from mad.folder import staged_run
    from mad.preparation import check_settings, prepare_run

    check_settings(config)
    with staged_run(Path(config.out), config.overwrite):  # left without a circuit, it is removed
        told = prepare_run(config).about()
    for name, value in told.items():
        print(f"{name:8} {value}")
    print(f"nothing was run or written; without check=true this writes {config.out}")
