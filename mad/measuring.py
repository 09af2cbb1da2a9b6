"""A run's circuit measured in every way, and the picture of that."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from circuits.ablation import ABLATIONS, Ablation
from circuits.circuit import Circuit
from circuits.evaluation.evaluate import Effort, evaluate
from circuits.metrics import metric_named
from circuits.plot.curve import FaithfulnessCurve, RandomBand, draw_faithfulness_curve
from circuits.prompts import Prompts
from circuits.regrouped import regrouped
from mad.folder import Opened
from mad.run_prompts import RunPrompts, run_prompts

log = logging.getLogger(__name__)


def check_measurable(folder: Path, metric: str | None, ablation: str | None) -> None:
    """Raises ValueError for what needs no model to be refused."""
    if folder.is_file():
        raise ValueError(
            f"{folder} is a file; give the run folder that `madcap extract` wrote, which names the "
            "model and its prompts"
        )
    if metric is not None:
        metric_named(metric)
    if ablation is not None and ablation not in ABLATIONS:
        raise ValueError(f"ablation={ablation!r}, but the ablations are {', '.join(ABLATIONS)}")


def measure(
    opened: Opened,
    effort: Effort,
    *,
    trusted: str | None = None,
    against: str | None = None,
    metric: str | None = None,
    ablation: str | None = None,
    seed: int = 0,
    memory: str = "2GB",
) -> dict[str, Any]:
    """Returns all figures of a run's circuit, as `circuits.evaluate`.

    Args:
        trusted: a file of prompts to measure on; None: those that the run was measured on.
        against: a known circuit: a run folder, a circuit.json or a graph file of EAP-IG or MIB.

    Raises:
        FileNotFoundError: there is no known circuit, or its prompts are not known or gone.
        ValueError: see `mad.run_prompts` and `circuits.evaluate`.
    """
    known = None if against is None else _of_its_graph(against, opened.circuit)
    prompts = run_prompts(opened, trusted)
    own = ablation in (None, opened.circuit.says("ablation"))
    fitted = opened.ablation() if own else None
    return evaluate(
        opened.circuit,
        opened.engine,
        prompts.evaluation,
        discovery=_discovery(prompts, effort, ablation or opened.circuit.says("ablation"), fitted),
        against=known,
        metric=metric,
        ablation=ablation,
        fitted=fitted,
        effort=effort,
        seed=seed,
        memory=memory,
    )


def _of_its_graph(against: str, circuit: Circuit) -> Circuit:
    try:
        return regrouped(Circuit.load(against), circuit.graph)
    except ValueError as error:
        raise ValueError(f"against={against}: {error}") from error


def _discovery(
    prompts: RunPrompts, effort: Effort, ablation: str, fitted: Ablation | None
) -> Prompts | None:
    """The prompts that the circuit was found on; without them those measured have to do."""
    if prompts.discovery is not None:
        return prompts.discovery
    if effort.redraws:
        raise ValueError(
            f"redraws={effort.redraws} needs the prompts that the circuit was found on, which "
            "cannot be had; give redraws=0"
        )
    if fitted is None and ablation not in ("counterfactual", "zero"):
        log.warning("ablation=%s is fitted on the prompts that are measured", ablation)
    return None


def draw_evaluation(told: Mapping[str, Any], circuit: Circuit, folder: Path) -> list[Path]:
    """Draws faithfulness over sizes, over the band of random circuits.

    Where the circuit was not selected by the ranking of CPR, or of CMD, also by that ranking.
    """
    areas = told["areas"]
    labels = {"signed": "by score", "absolute": "by |score|"}
    ways = {areas["cpr_ranking"], areas["cmd_ranking"]} - {areas["own_ranking"]}
    own = f"{circuit.says('method') or 'circuit'}, {labels[areas['own_ranking']]}"
    chosen = (told["edges_kept"], told["faithfulness"])
    curves = [replace(_curve(own, told["curve"]), chosen=chosen)]
    curves += [
        _curve(labels[way], [point[way] for point in areas["sizes"]]) for way in sorted(ways)
    ]
    random = told["random_curve"]
    band = None
    if random:
        edges, low, high = ([point[key] for point in random] for key in ("edges", "low", "high"))
        band = RandomBand(edges, low, high, "random circuits, lowest to highest")
    caption = (
        f"{told['metric']}, {told['ablation']} ablation, {told['prompts']['prompts']} prompts; "
        f"bars: standard errors, ring: the circuit; CPR {areas['cpr']['value']:.3f}, "
        f"CMD {areas['cmd']['value']:.3f}"
    )
    return [
        draw_faithfulness_curve(
            curves,
            folder / f"evaluation.{form}",
            random_band=band,
            edges_total=told["edges_total"],
            title=f"{circuit.says('task') or 'circuit'}: faithfulness over sizes",
            caption=caption,
        )
        for form in ("png", "svg")
    ]


def _curve(name: str, points: list[Mapping[str, Any]]) -> FaithfulnessCurve:
    there = [point for point in points if point["edges"]]
    return FaithfulnessCurve(
        name,
        [point["edges"] for point in there],
        [point["faithfulness"] for point in there],
        [point["error"] or 0.0 for point in there],
    )
