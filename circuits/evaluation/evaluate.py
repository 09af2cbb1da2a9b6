"""All that can be measured of a circuit, for `evaluation.json`."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from circuits.ablation import ABLATIONS, Ablation, AblationConfig, fit_ablation
from circuits.circuit import Circuit
from circuits.engine import Engine
from circuits.evaluation.areas import rankings_of
from circuits.evaluation.completeness import completeness
from circuits.evaluation.figures import figures
from circuits.evaluation.known import against_known
from circuits.evaluation.minimality import minimality
from circuits.evaluation.stability import stability
from circuits.evaluation.verdicts import target_of, warnings
from circuits.faithfulness import FaithfulnessScale, faithfulness_scale
from circuits.files import restored
from circuits.metrics import metric_named
from circuits.objective import prepare
from circuits.prompts import Prompts
from circuits.regrouped import regrouped
from circuits.selection import Selection, random_circuits

log = logging.getLogger(__name__)


@dataclass
class Effort:
    """How much is measured; each of the numbers may be 0, which leaves that part out."""

    random_draws: int = 20  # random circuits of the same size to compare with
    knockouts: int = 20  # sets of the circuit's nodes that are knocked out
    minimality: int = 100  # edges that are removed one by one; drawn at random where there are more
    redraws: int = 5  # times that the circuit is looked for again on redrawn prompts


def evaluate(
    circuit: Circuit,
    engine: Engine,
    prompts: Prompts,
    *,
    discovery: Prompts | None = None,
    against: Circuit | None = None,
    metric: str | None = None,
    ablation: str | None = None,
    fitted: Ablation | None = None,
    effort: Effort | None = None,
    seed: int = 0,
    memory: str = "2GB",
) -> dict[str, Any]:
    """Returns all figures of a circuit, with standard errors and what random circuits reach.

    Args:
        circuit: of the engine's graph.
        prompts: trusted prompts that discovery has not seen, at least 2.
        discovery: the prompts that it was found on: the ablation is fitted on them, and they are
            redrawn for stability; None: the ablation is fitted on `prompts`, and stability is left
            out.
        against: a known circuit, whose kept edges are the true ones.
        metric: None: the circuit's own.
        ablation: None: the circuit's own.
        fitted: that ablation, where it is there already, as constants are that were trained for
            the circuit; None: it is fitted.
        effort: how much of each part is measured.
        seed: of all that is drawn at random.
        memory: working memory beside the model's own weights, such as 500MB.

    >>> from circuits import EAP, Selection, extract, load_model
    >>> from circuits.tasks import recall
    >>> model = load_model("pkg://mad/models/recall_redirect")
    >>> prompts = model.prompts(recall.generate(recall.Recall(), 32, seed=0))
    >>> parts = prompts.split({"discovery": 16, "evaluation": 16}, seed=0)
    >>> engine, kept = Engine(model), Selection(edges=30)
    >>> found = extract(
    ...     engine, *parts.values(), EAP(), metric="logit_diff", selection=kept, random_draws=0
    ... )
    >>> told = evaluate(found.circuit, engine, parts["evaluation"], effort=Effort(2, 2, 5, 0))
    >>> told["areas"]["cpr"]["value"] > 0, told["minimality"]["tested"]
    (True, 5)

    Raises:
        ValueError: another graph, too few prompts, prompts that lack what metric or ablation need,
            a circuit that does not say its metric or ablation, or a metric that does not separate
            the model from the ablated model.
    """
    effort = effort or Effort()
    _check(circuit, engine, prompts, effort)
    started = time.perf_counter()
    config = _ablation(circuit, ablation)
    ABLATIONS[config.name].require(prompts)
    chosen = metric_named(metric or _said(circuit, "metric"))
    known = None if against is None else regrouped(against, circuit.graph)
    fitted = fitted or fit_ablation(config, engine, discovery or prompts, memory=memory)
    scale = faithfulness_scale(prepare(engine, prompts, chosen, fitted, memory=memory))
    kept = circuit.kept
    told = figures(scale, kept, rankings_of(circuit), random_draws=effort.random_draws, seed=seed)
    count = effort.random_draws if kept.any() else 0
    chance = random_circuits(circuit.graph, len(circuit), count, seed)
    told |= _of_parts(scale, kept, chance, effort, seed)
    told["against"] = None if known is None else against_known(circuit, known, chance)
    told["stability"] = None
    if discovery is not None and effort.redraws:
        told["stability"] = stability(
            circuit, engine, discovery, chance, redraws=effort.redraws, seed=seed, memory=memory
        )
    told["warnings"] = warnings(told, _target(circuit, chosen.name))
    return {**_measured_with(circuit, scale, effort, seed), **told} | {
        "seconds": time.perf_counter() - started
    }


def _check(circuit: Circuit, engine: Engine, prompts: Prompts, effort: Effort) -> None:
    for name, value in asdict(effort).items():
        if value < 0:
            raise ValueError(f"{name}={value}, but it must be at least 0")
    if circuit.graph != engine.graph:
        raise ValueError(f"the circuit is of {circuit.graph}, but this model is {engine.graph}")
    if len(prompts) < 2:
        raise ValueError(
            f"{len(prompts)} prompts to evaluate on, but standard errors need at least 2; give more"
        )


def _said(circuit: Circuit, name: str) -> str:
    if said := circuit.says(name):
        return said
    raise ValueError(
        f"the circuit does not say by which {name} it was found, so that it cannot be measured in "
        f"the same way; give {name}=NAME"
    )


def _ablation(circuit: Circuit, name: str | None) -> AblationConfig:
    """The ablation of that name, or the circuit's own with its settings."""
    name = name or _said(circuit, "ablation")
    if name not in ABLATIONS:
        raise ValueError(f"ablation={name!r}, but the ablations are {', '.join(ABLATIONS)}")
    if name != circuit.says("ablation"):
        return AblationConfig(name)
    return restored(AblationConfig, circuit.about["ablation"], "ablation of the circuit")


def _target(circuit: Circuit, metric: str) -> float | None:
    """The faithfulness that the circuit was selected to reach, by the metric that is measured."""
    told = circuit.about.get("selection")
    if told is None or metric != circuit.says("metric"):
        return None
    return target_of(restored(Selection, told, "selection of the circuit"))


def _of_parts(
    scale: FaithfulnessScale,
    kept: Bool[Tensor, "R W *S"],
    chance: Sequence[Bool[Tensor, "R W *S"]],
    effort: Effort,
    seed: int,
) -> dict[str, Any]:
    """Completeness and minimality, of a circuit that has edges."""
    if not kept.any():
        return {"completeness": None, "minimality": None}
    drawn = chance[: effort.knockouts]
    return {
        "completeness": completeness(scale, kept, drawn, knockouts=effort.knockouts, seed=seed)
        if effort.knockouts
        else None,
        "minimality": minimality(scale, kept, chance, edges=effort.minimality, seed=seed)
        if effort.minimality
        else None,
    }


def _measured_with(
    circuit: Circuit, scale: FaithfulnessScale, effort: Effort, seed: int
) -> Mapping[str, Any]:
    """What every figure depends on."""
    batches = scale.objective.batches
    return {
        "circuit": circuit.hash(),
        "metric": scale.objective.metric.name,
        "ablation": batches.ablation.name,
        "prompts": {"prompts": len(batches.whole), "hash": batches.whole.hash()},
        "effort": asdict(effort),
        "seed": seed,
    }
