"""How much of the model's metric a circuit keeps, beside random circuits of its size.

    faithfulness = (m(C) - m(0)) / (m(M) - m(0))        of means over prompts, unclipped

m(M) is the full model's, m(C) the circuit's, m(0) that of the model with every edge removed.

A circuit is of edges, or of units (`circuits.parts`).

Shapes: prompts N, circuits K, draws of prompts D; `*E` the axes of a mask, [R, W, *S] of edges and
[U, *S] of units.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.batches import joined
from circuits.evaluation.bootstrap import Resampled
from circuits.metrics import METRICS, metrics_for
from circuits.objective import Objective

log = logging.getLogger(__name__)


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


@dataclass(frozen=True, eq=False)
class FaithfulnessScale:
    """The two ends of the scale, measured once: the full model, and every edge removed."""

    objective: Objective
    full_each: Float[Tensor, "N"]
    empty_each: Float[Tensor, "N"]

    @property
    def full(self) -> float:
        """The mean of the full model."""
        return self.full_each.mean().item()

    @property
    def empty(self) -> float:
        """The mean with every edge removed."""
        return self.empty_each.mean().item()

    def faithfulness(self, mask: Bool[Tensor, "*E"] | Float[Tensor, "*E"]) -> Faithfulness:
        """Returns the faithfulness of a circuit."""
        return self.of(self.objective.measure(mask))

    def measure_each(self, masks: Sequence[Bool[Tensor, "*E"]], label: str) -> Float[Tensor, "K N"]:
        """The oriented metric under each mask, with a progress bar; each mask is run once.

        All parts kept and the empty circuit are known.
        """
        exists, places, new = self.objective.space.exists, [], {}
        for mask in masks:
            key = mask.numpy().tobytes()
            places.append(key)
            if mask.any() and not torch.equal(mask, exists):
                new.setdefault(key, mask)
        runs = self.objective.measure_each([*new.values()], label).double() if new else []
        known = {exists.numpy().tobytes(): self.full_each} | dict(zip(new, runs))
        return torch.stack([known.get(key, self.empty_each) for key in places])

    def drawn(self, values: Float[Tensor, "*K N"], resampled: Resampled) -> Float[Tensor, "*K D"]:
        """The faithfulness of circuits with these values, over the prompts of each draw."""
        full, empty = resampled.means(self.full_each), resampled.means(self.empty_each)
        return (resampled.means(values) - empty) / (full - empty)

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
    return FaithfulnessScale(objective, full, empty)


@dataclass(frozen=True)
class Measured:
    """One metric, oriented, of each prompt."""

    full: Float[Tensor, "N"]
    empty: Float[Tensor, "N"]
    circuit: Float[Tensor, "N"]


def under_each_metric(objective: Objective, kept: Bool[Tensor, "*E"]) -> dict[str, Measured]:
    """Returns every metric that the prompts allow, of the same two runs under a mask."""
    metrics = metrics_for(objective.batches.prompts[0])
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
