"""From a model and trusted prompts to a circuit with its figures: discover, select, evaluate.

Discovery sees one set of prompts and evaluation another.  Every figure names its metric, ablation
and prompts, because faithfulness means nothing without them.

Shapes: writers W, readers R.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm.auto import tqdm

from circuits.ablation import Ablation, AblationConfig, fit_ablation
from circuits.circuit import Circuit
from circuits.discovery import METHODS, Found
from circuits.engine import Engine
from circuits.graph import Graph
from circuits.metrics import METRICS, Metric, metric_named
from circuits.objective import (
    Faithfulness,
    FaithfulnessScale,
    NotSeparated,
    Objective,
    between,
    faithfulness_scale,
    prepare,
)
from circuits.prompts import Prompts
from circuits.selection import Selection, random_circuits, select, sizes

log = logging.getLogger(__name__)

RANDOM_SIZES, RANDOM_PER_SIZE = 9, 5  # of the band of random circuits beside the faithfulness curve


@dataclass(frozen=True)
class Extraction:
    """A circuit, its figures for `metrics.json`, and the fitted ablation."""

    circuit: Circuit
    metrics: dict[str, Any]
    ablation: Ablation


def extract(
    engine: Engine,
    discovery: Prompts,
    evaluation: Prompts,
    method: Any,
    *,
    metric: str = "kl",
    ablation: AblationConfig | None = None,
    selection: Selection | None = None,
    memory: str = "2GB",
    random_draws: int = 20,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> Extraction:
    """Finds the circuit of a behaviour and measures it on prompts that discovery has not seen.

    Args: engine: the model. discovery: trusted prompts to find the circuit on. evaluation: other
        trusted prompts, to measure it on. method: the configuration of a discovery method, such as
        `ACDC(tau=0.01)`; its `name` picks the function. metric: what the circuit has to keep
        (`METRICS`). ablation: what removed edges carry; by default the corrupt prompt's values.
        selection: which scored edges are kept, for methods that only score. memory: working memory
        beside the model's own weights, such as 500MB. random_draws: how many random circuits of the
        same size to compare with. seed: of the random circuits. about: recorded in `circuit.json`:
        the model's reference and weight hash, the task.

    Raises: ValueError: the sets overlap, a metric or ablation lacks what it needs, or the metric
        does not separate
            the model from the ablated model.
    """
    if shared := discovery.overlap(evaluation):
        raise ValueError(
            f"{shared} prompts are in both the discovery and the evaluation split; they must be "
            "disjoint"
        )
    if random_draws < 0:
        raise ValueError(f"random_draws={random_draws}, but it must be at least 0")
    if selection is not None and getattr(method, "decides", False) and (given := selection.given()):
        raise ValueError(
            f"selection.{given[0]}={getattr(selection, given[0])}, but method {method.name} "
            "decides itself which "
            "edges to keep; change its own settings (tau), or use a method that scores"
        )
    ablation, selection, chosen = (
        ablation or AblationConfig(),
        selection or Selection(),
        metric_named(metric),
    )
    fitted = fit_ablation(ablation, engine, discovery, memory=memory)
    found, kept, cost = _discover(
        prepare(engine, discovery, chosen, fitted, memory=memory), method, selection
    )
    held_out = prepare(engine, evaluation, chosen, fitted, memory=memory)
    metrics = evaluate(
        faithfulness_scale(held_out, ablation.name),
        found,
        kept,
        selection,
        random_draws=random_draws,
        seed=seed,
    )
    metrics |= {**cost, "method": found.details}
    _warn_of_poor_circuits(metrics)
    circuit = Circuit(
        graph=engine.graph,
        kept=kept,
        scores=found.scores,
        about={
            **(about or {}),
            "method": asdict(method),
            "metric": metric,
            "ablation": asdict(ablation),
            "selection": None if found.kept is not None else asdict(selection),
            "splits": {"discovery": _split(discovery), "evaluation": _split(evaluation)},
        },
    )
    return Extraction(circuit, metrics, fitted)


def _discover(
    objective: Objective, method: Any, selection: Selection
) -> tuple[Found, Bool[Tensor, "R W *S"], dict[str, float]]:
    """What a method found, the edges to keep, and what it cost; on return the prepared batches are
    let go.
    """
    # Refuses now what would be refused after the expensive part.
    scale = faithfulness_scale(objective, objective.batches.ablation.config.name)
    engine = objective.engine
    batches = [batch.to(engine.device) for batch in objective.batches.prompts]
    forward = _seconds(
        engine.device,
        lambda: [engine.logits(batch.clean, batch.key_mask, batch.positions) for batch in batches],
    )
    started = time.perf_counter()
    found = METHODS[method.name][1](method, objective)
    seconds = time.perf_counter() - started
    kept = found.kept if found.kept is not None else choose(scale, found, selection)
    return found, kept, {"seconds": seconds, "forwards": seconds / forward}


def rediscover(
    circuit: Circuit, engine: Engine, prompts: Prompts, *, memory: str = "2GB"
) -> Bool[Tensor, "R W *S"]:
    """Returns the edges that the method, metric, ablation and selection recorded in a circuit find
    on other prompts.

    Raises:
        ValueError: the circuit does not say how it was found.
    """
    about = circuit.about
    if missing := [name for name in ("method", "metric", "ablation") if name not in about]:
        raise ValueError(
            f"the circuit does not say by which {missing[0]} it was found, so that no other can be"
        )
    method = METHODS[about["method"]["name"]][0](**about["method"])
    ablation = fit_ablation(AblationConfig(**about["ablation"]), engine, prompts, memory=memory)
    selection = Selection(**(about.get("selection") or {}))
    objective = prepare(engine, prompts, metric_named(about["metric"]), ablation, memory=memory)
    return _discover(objective, method, selection)[1]


def _warn_of_poor_circuits(metrics: Mapping[str, Any]) -> None:
    kept, total, chance = (
        metrics["edges_kept"],
        metrics["edges_total"],
        metrics["random_circuits"]["percentile_95"],
    )
    if kept == total:
        log.warning(
            "all %d edges are kept, so that this circuit explains nothing and no input departs "
            "from it; ask for fewer "
            "(selection.edges, a lower selection.faithfulness, a higher method.tau) or use another "
            "method",
            total,
        )
    elif chance is not None and metrics["faithfulness"] <= chance:
        log.warning(
            "the circuit's faithfulness, %.3f, is no better than that of random circuits of its "
            "size (95th percentile "
            "%.3f)",
            metrics["faithfulness"],
            chance,
        )


def choose(scale: FaithfulnessScale, found: Found, selection: Selection) -> Tensor:
    """The kept edges that a selection asks for; for a target faithfulness, the first of a ladder of
    sizes to reach it.

    Raises: ValueError: more than one of edges, share and threshold, a threshold that `how` does not
        use, or a target that
            no circuit reaches.
    """
    graph = scale.objective.engine.graph
    if len(given := selection.given()) > 1:
        raise ValueError(f"selection has {' and '.join(given)}; give one of them")
    if selection.threshold is not None and selection.how in ("greedy", "top_n"):
        raise ValueError(
            f"selection.threshold={selection.threshold} is used by how=threshold only, not by "
            f"how={selection.how}; "
            "set how=threshold, or give edges, share or faithfulness"
        )
    pick = _picker(graph, found, selection)
    if selection.how == "threshold":
        return select(
            graph,
            found.scores,
            how="threshold",
            threshold=selection.threshold,
            absolute=selection.absolute,
        )
    if selection.edges is not None:
        if selection.edges < 1:
            raise ValueError(f"selection.edges={selection.edges}, but it must be at least 1")
        return pick(selection.edges)
    if selection.share is not None:
        if not 0 < selection.share <= 1:
            raise ValueError(
                f"selection.share={selection.share}, but it must be above 0 and at most 1"
            )
        return pick(max(1, round(selection.share * graph.n_edges)))
    if selection.faithfulness is None:
        raise ValueError("selection needs one of edges, share, threshold or faithfulness")
    best = (float("-inf"), 0)
    for edges in tqdm(sizes(graph), desc="select", unit="size", disable=None):
        kept = pick(edges)
        reached = scale.faithfulness(kept).value
        if reached >= selection.faithfulness:
            return kept
        best = max(best, (reached, edges))
    raise ValueError(
        f"no circuit reaches selection.faithfulness={selection.faithfulness} on the discovery "
        "prompts: the best is "
        f"{best[0]:.3f} with {best[1]} edges; lower it"
    )


def evaluate(
    scale: FaithfulnessScale,
    found: Found,
    kept: Tensor,
    selection: Selection,
    *,
    random_draws: int = 20,
    seed: int = 0,
) -> dict[str, Any]:
    """Figures of a circuit: faithfulness by metric, random circuits of its size, the curve over
    sizes, KL.
    """
    graph = scale.objective.engine.graph
    edges = int(kept.sum())
    drawn = random_circuits(graph, edges, random_draws, seed) if edges else []
    ladder = {int(mask.sum()): mask for mask in map(_picker(graph, found, selection), sizes(graph))}
    each = min(RANDOM_PER_SIZE, random_draws)
    rungs = sizes(graph, RANDOM_SIZES) if drawn else []
    random_ladder = [
        mask for wanted in rungs for mask in random_circuits(graph, wanted, each, seed + 1)
    ]
    masks = [kept, *drawn, *ladder.values(), *random_ladder]
    results = iter(scale.faithfulness_each(masks, "evaluate"))
    own = next(results)
    chance = torch.tensor([next(results).value for _ in drawn])
    curve = {edges: next(results).value for edges in ladder}
    random_curve = []
    for wanted in rungs:
        values = [next(results).value for _ in range(each)]
        random_curve.append({"edges": wanted, "low": min(values), "high": max(values)})
    return {
        "edges_total": graph.n_edges,
        "edges_kept": edges,
        "faithfulness": own.value,
        "faithfulness_detail": asdict(own),
        "by_metric": {name: asdict(result) for name, result in by_metric(scale, kept).items()},
        "kl": -_with_metric(scale.objective, METRICS["kl"]).measure(kept).mean().item(),
        "random_circuits": {
            "count": len(drawn),
            "mean": chance.mean().item() if drawn else None,
            "percentile_95": chance.quantile(0.95).item() if drawn else None,
            "best": chance.max().item() if drawn else None,
        },
        "curve": [{"edges": edges, "faithfulness": value} for edges, value in curve.items()],
        "random_curve": random_curve,
    }


def by_metric(scale: FaithfulnessScale, kept: Tensor) -> dict[str, Faithfulness]:
    """Faithfulness under each metric that the prompts allow and that separates the model from the
    ablated one.
    """
    objective, results = scale.objective, {}
    metrics = [
        metric for metric in METRICS.values() if not metric.lacks(objective.batches.prompts[0])
    ]
    values: dict[str, list[list[Tensor]]] = {metric.name: [[], [], []] for metric in metrics}
    for batch in objective.batches:
        runs = [
            batch.clean.logits,
            *(objective.logits(batch, mask) for mask in (torch.zeros_like(kept), kept)),
        ]
        for metric in metrics:
            for logits, into in zip(runs, values[metric.name], strict=True):
                into.append(metric.oriented(logits, batch.prompts, batch.clean.logits))
    for metric in metrics:
        full, empty, circuit = map(torch.cat, values[metric.name])
        try:
            other = between(_with_metric(objective, metric), scale.ablation, full, empty)
        except NotSeparated as error:
            log.info("no faithfulness under %s: %s", metric.name, error)
            continue
        results[metric.name] = other.of(circuit)
    return results


def _with_metric(objective: Objective, metric: Metric) -> Objective:
    return Objective(objective.engine, metric, objective.batches)


def _picker(graph: Graph, found: Found, selection: Selection) -> Callable[[int], Tensor]:
    """Circuits of a given number of edges, by the selection's ranking."""
    how = "greedy" if selection.how == "threshold" else selection.how
    return lambda edges: select(
        graph, found.scores, how=how, edges=edges, absolute=selection.absolute
    )


def _split(prompts: Prompts) -> dict[str, Any]:
    return {"prompts": len(prompts), "hash": prompts.hash()}


def _seconds(device: torch.device, work: Callable[[], Any], repeats: int = 3) -> float:
    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    times = []
    for _ in range(repeats):
        started = now()
        work()
        times.append(now() - started)
    return sorted(times)[len(times) // 2]
