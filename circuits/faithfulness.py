"""How much of the model's metric a circuit keeps, beside random circuits of its size.

    faithfulness = (m(C) - m(0)) / (m(M) - m(0))        of means over prompts, unclipped

m(M) is the full model's, m(C) the circuit's, m(0) that of the model with every edge removed.

A circuit is of edges, or of units (`circuits.parts`): its figures name which.

Shapes: prompts N; `*E` the axes of a mask, [R, W, *S] of edges and [U, *S] of units.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.batches import joined
from circuits.metrics import METRICS
from circuits.objective import Objective
from circuits.selection import Ranking, random_circuits, random_rankings, sizes

log = logging.getLogger(__name__)

RANDOM_SIZES, RANDOM_PER_SIZE = 9, 5  # of the band of random circuits beside the curve


@dataclass(frozen=True)
class Faithfulness:
    """A circuit's faithfulness with what it is made of: the metric's own numbers, not oriented."""

    value: float
    model: float
    circuit: float
    empty: float
    metric: str
    ablation: str
    n_prompts: int


@dataclass(frozen=True)
class FaithfulnessScale:
    """The two ends of the scale, measured once: the full model, and every edge removed."""

    objective: Objective
    full: float
    empty: float

    def faithfulness(self, mask: Bool[Tensor, "*E"] | Float[Tensor, "*E"]) -> Faithfulness:
        """Returns the faithfulness of a circuit."""
        return self.of(self.objective.measure(mask))

    def faithfulness_each(
        self, masks: Sequence[Bool[Tensor, "*E"] | Float[Tensor, "*E"]], label: str
    ) -> list[Faithfulness]:
        """Returns the faithfulness of each of some circuits, with a progress bar."""
        return [self.of(values) for values in self.objective.measure_each(masks, label)]

    def of(self, values: Float[Tensor, "N"]) -> Faithfulness:
        """Returns the faithfulness of a circuit with these values of the oriented metric."""
        circuit = values.double().mean().item()
        sign = 1.0 if self.objective.metric.higher_is_better else -1.0
        return Faithfulness(
            value=(circuit - self.empty) / (self.full - self.empty),
            model=sign * self.full,
            circuit=sign * circuit,
            empty=sign * self.empty,
            metric=self.objective.metric.name,
            ablation=self.objective.batches.ablation.name,
            n_prompts=len(values),
        )


class NotSeparated(ValueError):
    """The metric is the same, within noise, for the model and with every edge removed."""


def faithfulness_scale(objective: Objective) -> FaithfulnessScale:
    """Returns the faithfulness scale of an objective; NotSeparated as `between`."""
    return between(objective, objective.full(), objective.empty())


def between(
    objective: Objective, full: Float[Tensor, "N"], empty: Float[Tensor, "N"]
) -> FaithfulnessScale:
    """Returns the faithfulness scale between the values of the full and of the ablated model.

    Raises:
        NotSeparated: |m(M) - m(0)| is under two standard errors: the quotient would be noise.
    """
    full, empty = full.double(), empty.double()
    gap, noise = _gap(full, empty)
    if not abs(gap) > noise:
        raise NotSeparated(
            f"metric {objective.metric.name} does not separate the model from the ablated model: "
            f"they are {abs(gap):.3g} apart, two standard errors are {noise:.3g} "
            f"over {len(full)} prompts; use more prompts, another metric or another ablation"
        )
    return FaithfulnessScale(objective, full.mean().item(), empty.mean().item())


def evaluate(
    scale: FaithfulnessScale,
    kept: Bool[Tensor, "*E"],
    ranked: Ranking,
    *,
    random_draws: int = 20,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns a circuit's figures: by metric, beside random circuits of its size, over sizes.

    `worse_than_none` names the metrics by which it is worse than the empty circuit.

    Args:
        ranked: the order in which circuits of other sizes take their edges.
        random_draws: how many random circuits of its size it is compared with.
        seed: of the random circuits.
    """
    graph, edges = scale.objective.space, int(kept.sum())
    noun = graph.noun
    values = under_each_metric(scale.objective, kept)
    own = scale.of(values[scale.objective.metric.name].circuit)
    drawn = random_circuits(graph, edges, random_draws, seed) if edges else []
    ladder = {int(mask.sum()): mask for mask in map(ranked.circuit, sizes(graph))}
    rungs = sizes(graph, RANDOM_SIZES) if drawn else []
    rankings = random_rankings(graph, min(RANDOM_PER_SIZE, random_draws), seed + 1)
    random_ladder = [other.grown(wanted) for wanted in rungs for other in rankings]
    results = iter(scale.faithfulness_each([*drawn, *ladder.values(), *random_ladder], "evaluate"))
    chance = torch.tensor([next(results).value for _ in drawn])
    curve = [{noun: size, "faithfulness": next(results).value} for size in ladder]
    band = [[next(results).value for _ in rankings] for _ in rungs]
    return {
        f"{noun}_total": graph.n_parts,
        f"{noun}_kept": edges,
        "faithfulness": own.value,
        "faithfulness_detail": asdict(own),
        "by_metric": {name: asdict(result) for name, result in by_metric(scale, values).items()},
        "worse_than_none": worse_than_none(values),
        "kl": -values["kl"].circuit.mean().item(),
        "random_circuits": {
            "count": len(drawn),
            "mean": chance.mean().item() if drawn else None,
            "percentile_95": chance.quantile(0.95).item() if drawn else None,
            "best": chance.max().item() if drawn else None,
        },
        "curve": curve,
        "random_curve": [
            {noun: wanted, "low": min(at), "high": max(at)}
            for wanted, at in zip(rungs, band, strict=True)
        ],
    }


@dataclass(frozen=True)
class Measured:
    """One metric, oriented, of each prompt."""

    full: Float[Tensor, "N"]
    empty: Float[Tensor, "N"]
    circuit: Float[Tensor, "N"]


def under_each_metric(objective: Objective, kept: Bool[Tensor, "*E"]) -> dict[str, Measured]:
    """Returns every metric that the prompts allow, of the same two runs under a mask."""
    metrics = [one for one in METRICS.values() if not one.lacks(objective.batches.prompts[0])]
    parts: dict[str, list[Measured]] = {metric.name: [] for metric in metrics}
    for batch in objective.batches:
        clean = batch.clean.logits
        runs = [clean, *(objective.logits(batch, mask) for mask in (torch.zeros_like(kept), kept))]
        for metric in metrics:
            values = [metric.oriented(logits, batch.prompts, clean) for logits in runs]
            parts[metric.name].append(Measured(*values))
    return {name: joined(own) for name, own in parts.items()}


def worse_than_none(values: Mapping[str, Measured]) -> list[str]:
    """The metrics by which the model is better than the empty circuit, and a circuit worse.

    Both by over two standard errors of the mean.
    """
    return [
        name
        for name, own in values.items()
        if _above(own.full, own.empty) and _above(own.empty, own.circuit)
    ]


def _above(higher: Float[Tensor, "N"], lower: Float[Tensor, "N"]) -> bool:
    gap, noise = _gap(higher, lower)
    return gap > noise


def _gap(higher: Float[Tensor, "N"], lower: Float[Tensor, "N"]) -> tuple[float, float]:
    """The mean difference over prompts, and two standard errors of it."""
    gap = higher.double() - lower.double()
    error = gap.std().item() / len(gap) ** 0.5 if len(gap) > 1 else 0.0
    return gap.mean().item(), 2 * error


def by_metric(scale: FaithfulnessScale, values: Mapping[str, Measured]) -> dict[str, Faithfulness]:
    """Returns the faithfulness under each metric that separates the model from the ablated one."""
    results = {}
    for name, own in values.items():
        objective = replace(scale.objective, metric=METRICS[name])
        try:
            other = between(objective, own.full, own.empty)
        except NotSeparated as error:
            log.info("no faithfulness under %s: %s", name, error)
            continue
        results[name] = other.of(own.circuit)
    return results
