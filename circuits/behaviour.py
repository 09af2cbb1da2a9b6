"""A behaviour: prompts, a metric and an ablation, with all that is used again computed once.

Discovery and evaluation both ask one question: how large is the metric when only these edges are kept?
A `Behaviour` answers it; every value is per prompt and oriented so that higher is better.

Shapes: prompts N (all batches), B (one batch), writers W, readers R, candidate masks K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.ablation import Ablation
from circuits.engine import Clean, Factored
from circuits.masked import Ablated, Start
from circuits.metrics import Metric
from circuits.prompts import Prompts


@dataclass(frozen=True)
class Batch:
    """Some prompts with the model's clean run and the ablated values on them."""

    prompts: Prompts
    clean: Clean
    ablated: Ablated


@dataclass(frozen=True)
class Behaviour:
    """What a circuit is to explain."""

    engine: Factored
    metric: Metric
    batches: tuple[Batch, ...]

    @torch.no_grad()
    def measure(
        self, mask: Bool[Tensor, "*K_R_W_S"] | Float[Tensor, "*K_R_W_S"], *, first_layer: int = 0
    ) -> Float[Tensor, "*K N"]:
        """The oriented metric of each prompt when the model runs under the mask(s).

        Args:
            mask: share of each edge that is kept.
            first_layer: the run starts there, from the clean values of all writers before it; the same result, for
                less, when the mask keeps every edge into earlier layers.
        """
        values, before = [], self.engine.graph.first_writer(first_layer)
        for batch in self.batches:
            prompts = batch.prompts
            start = Start(first_layer, batch.clean.writers[:before])
            logits = self.engine.masked(
                prompts.clean,
                mask,
                batch.ablated,
                key_mask=prompts.key_mask,
                positions=prompts.positions,
                start=start,
            )
            values.append(self.metric.oriented(logits, prompts, batch.clean.logits))
        return torch.cat(values, -1)

    @torch.no_grad()
    def full(self) -> Float[Tensor, "N"]:
        """The oriented metric of the full model."""
        return torch.cat([self.metric.oriented(b.clean.logits, b.prompts, b.clean.logits) for b in self.batches])

    def empty(self) -> Float[Tensor, "N"]:
        """The oriented metric with every edge removed."""
        return self.measure(torch.zeros_like(self.engine.graph.exists))


def prepare(
    engine: Factored, prompts: Prompts, metric: Metric, ablation: Ablation, *, batch_size: int = 64
) -> Behaviour:
    """Returns a behaviour with its clean and ablated runs done.

    Raises:
        ValueError: the prompts lack what metric or ablation need, or are longer than the model's context.
    """
    metric.require(prompts)
    batches = []
    for batch in prompts.batches(batch_size):
        batch = batch.to(engine.device)
        clean = engine.clean(batch.clean, batch.key_mask, batch.positions)
        batches.append(Batch(batch, clean, ablation.values(engine, batch)))
    return Behaviour(engine, metric, tuple(batches))


@dataclass(frozen=True)
class Faithfulness:
    """How much of the model's metric a circuit keeps: (m(C) - m(0)) / (m(M) - m(0)), of means, unclipped.

    m(M) is the full model's, m(C) the circuit's, m(0) that of the model with every edge removed; all three are
    the plain metric (not oriented).
    """

    value: float
    model: float
    circuit: float
    empty: float
    metric: str
    ablation: str
    n_prompts: int


@dataclass(frozen=True)
class Yardstick:
    """The two ends of the faithfulness scale, measured once: the full model, and every edge removed."""

    behaviour: Behaviour
    ablation: str
    full: float
    empty: float

    def faithfulness(self, mask: Bool[Tensor, "R W *S"] | Float[Tensor, "R W *S"]) -> Faithfulness:
        """Returns the faithfulness of a circuit."""
        values = self.behaviour.measure(mask)
        circuit = values.double().mean().item()
        sign = 1.0 if self.behaviour.metric.higher_is_better else -1.0
        return Faithfulness(
            value=(circuit - self.empty) / (self.full - self.empty),
            model=sign * self.full,
            circuit=sign * circuit,
            empty=sign * self.empty,
            metric=self.behaviour.metric.name,
            ablation=self.ablation,
            n_prompts=len(values),
        )


class NotSeparated(ValueError):
    """The metric is the same, within noise, for the model and for the model with every edge removed."""


def yardstick(behaviour: Behaviour, ablation: str) -> Yardstick:
    """Returns the faithfulness scale of a behaviour under an ablation.

    Raises:
        NotSeparated: |m(M) - m(0)| is under two standard errors, so that the quotient would be noise.
    """
    full, empty = behaviour.full().double(), behaviour.empty().double()
    gap = full - empty
    error = gap.std().item() / len(gap) ** 0.5 if len(gap) > 1 else 0.0
    if not abs(gap.mean().item()) > 2 * error:
        raise NotSeparated(
            f"metric {behaviour.metric.name} does not separate the model from the ablated model: they are "
            f"{abs(gap.mean().item()):.3g} apart, two standard errors are {2 * error:.3g} over {len(full)} prompts; "
            "use more prompts, another metric or another ablation"
        )
    return Yardstick(behaviour, ablation, full.mean().item(), empty.mean().item())
