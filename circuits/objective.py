"""A behaviour: prompts, a metric and an ablation, with all that is used again computed once.

Discovery and evaluation both ask one question: how large is the metric when only these edges are
kept? A `Objective` answers it; every value is per prompt and oriented so that higher is better.

Shapes: prompts N (all batches), B (one batch), writers W, readers R, candidate masks K.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.ablation import Ablation
from circuits.engine import Clean, Engine
from circuits.engine.masked import Ablated, Start
from circuits.engine.memory import Footprint, footprint, most_prompts, parse_memory
from circuits.metrics import Metric
from circuits.prompts import Prompts


@dataclass(frozen=True)
class Batch:
    """Some prompts with the model's clean run and the ablated values on them."""

    prompts: Prompts
    clean: Clean
    ablated: Ablated


@dataclass(frozen=True)
class Differences:
    """Some prompts with what attribution needs of them."""

    prompts: Prompts
    values: Float[Tensor, "W B S D"]  # of every writer, clean less ablated
    embedded: Float[Tensor, "B S D"]  # what the input writers write in the clean run
    logits: Float[Tensor, "B P V"]  # of the clean run


@dataclass(frozen=True)
class Batches:
    """Batches in order, the first of them prepared once and kept, the others prepared anew on each
    pass.

    To prepare a batch costs one forward, and another one where each prompt has its own ablated
    values (counterfactual, resample); a run under a mask costs about 1.2.
    """

    engine: Engine
    ablation: Ablation
    prompts: tuple[Prompts, ...]
    kept: tuple[Batch, ...]
    footprint: Footprint
    # bytes for the work on one batch, with its own clean and ablated values where it is not kept
    work: int

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Batch]:
        yield from self.kept
        for prompts in self.prompts[len(self.kept) :]:
            yield _prepared(self.engine, prompts, self.ablation)

    def differences(self) -> Iterator[Differences]:
        """Clean less ablated values; of a batch that is not kept they take the place of the clean
        ones.
        """
        n_inputs = self.engine.graph.n_inputs
        for batch in self.kept:
            clean = batch.clean
            values = clean.writers - batch.ablated.writers
            yield Differences(batch.prompts, values, clean.writers[:n_inputs].sum(0), clean.logits)
        for prompts in self.prompts[len(self.kept) :]:
            prompts = prompts.to(self.engine.device)
            clean = self.engine.clean(prompts.clean, prompts.key_mask, prompts.positions)
            embedded = clean.writers[:n_inputs].sum(0)
            values = clean.writers.sub_(self.ablation.writers(self.engine, prompts))
            yield Differences(prompts, values, embedded, clean.logits)

    def masks_at_once(self, batch: Batch) -> int:
        """Under how many masks a batch can be run at once."""
        prompts, footprint = len(batch.prompts), self.footprint
        left = self.work - _held(footprint, self.ablation, prompts)
        return max(1, left // (prompts * footprint.masked() + footprint.mask))


@dataclass(frozen=True)
class Objective:
    """What a circuit is to explain."""

    engine: Engine
    metric: Metric
    batches: Batches

    @torch.no_grad()
    def measure(
        self, mask: Bool[Tensor, "*K_R_W_S"] | Float[Tensor, "*K_R_W_S"], *, first_layer: int = 0
    ) -> Float[Tensor, "*K N"]:
        """The oriented metric of each prompt when the model runs under the mask(s).

        Args: mask: share of each edge that is kept. first_layer: the run starts there, from the
            clean values of all writers before it; the same result, for
                less, when the mask keeps every edge into earlier layers.
        """
        values, edge_axes = [], self.engine.graph.exists.ndim
        for batch in self.batches:
            if mask.ndim == edge_axes:
                values.append(self._on(batch, mask, first_layer))
                continue
            parts = mask.split(self.batches.masks_at_once(batch))
            values.append(torch.cat([self._on(batch, part, first_layer) for part in parts]))
        return torch.cat(values, -1)

    @torch.no_grad()
    def measure_each(
        self, masks: Sequence[Bool[Tensor, "R W *S"] | Float[Tensor, "R W *S"]], label: str
    ) -> Float[Tensor, "K N"]:
        """Like `measure`, each mask in a run of its own, for masks that have little in common.

        A run under several masks does the work that any of them leaves.
        """
        with tqdm(
            total=len(masks) * len(self.batches), desc=label, unit="run", disable=None
        ) as progress:
            values = []
            for batch in self.batches:
                values.append([])
                for mask in masks:
                    values[-1].append(self._on(batch, mask))
                    progress.update()
        return torch.cat([torch.stack(rows) for rows in values], -1)

    def _on(
        self,
        batch: Batch,
        mask: Bool[Tensor, "*K_R_W_S"] | Float[Tensor, "*K_R_W_S"],
        first_layer: int = 0,
    ) -> Float[Tensor, "*K B"]:
        """`measure` on one batch."""
        logits = self.logits(batch, mask, first_layer)
        return self.metric.oriented(logits, batch.prompts, batch.clean.logits)

    @torch.no_grad()
    def logits(
        self,
        batch: Batch,
        mask: Bool[Tensor, "*K_R_W_S"] | Float[Tensor, "*K_R_W_S"],
        first_layer: int = 0,
    ) -> Float[Tensor, "*K_B_P_V"]:
        """The logits of one batch at its scored positions when the model runs under the mask(s)."""
        prompts, before = batch.prompts, self.engine.graph.first_writer(first_layer)
        return self.engine.masked(
            prompts.clean,
            mask,
            batch.ablated,
            key_mask=prompts.key_mask,
            positions=prompts.positions,
            start=Start(first_layer, batch.clean.writers[:before]),
        )

    @torch.no_grad()
    def full(self) -> Float[Tensor, "N"]:
        """The oriented metric of the full model."""
        return torch.cat(
            [self.metric.oriented(b.clean.logits, b.prompts, b.clean.logits) for b in self.batches]
        )

    def empty(self) -> Float[Tensor, "N"]:
        """The oriented metric with every edge removed."""
        return self.measure(torch.zeros_like(self.engine.graph.exists))


def prepare(
    engine: Engine, prompts: Prompts, metric: Metric, ablation: Ablation, *, memory: str = "2GB"
) -> Objective:
    """Returns a behaviour with as many clean and ablated runs done as half of `memory` can hold.

    The other half is for the work on one batch.  Each pass over the behaviour prepares anew what
    could not be kept, at one or two forwards a batch.  A prompt that takes more than half by itself
    is worked on with all of the memory.

    Raises: ValueError: the prompts lack what metric or ablation need, are longer than the model's
        context, or take more
            memory than there is.
    """
    metric.require(prompts)
    budget, size = parse_memory(memory), footprint(engine, prompts)
    each, shared = size.objective(ablation.per_prompt), size.shared(ablation.per_prompt) + size.mask
    work = budget // 2 if each + shared <= budget // 2 else budget
    parts = tuple(prompts.batches(most_prompts(prompts, each, work, shared)))
    held, kept = 0, []
    for part in parts:
        held += _held(size, ablation, len(part))
        if held > budget - work:
            break
        kept.append(_prepared(engine, part, ablation))
    return Objective(engine, metric, Batches(engine, ablation, parts, tuple(kept), size, work))


def _held(size: Footprint, ablation: Ablation, n_prompts: int) -> int:
    """Bytes that a prepared batch holds on to."""
    return n_prompts * size.prepared(ablation.per_prompt) + size.shared(ablation.per_prompt)


def _prepared(engine: Engine, prompts: Prompts, ablation: Ablation) -> Batch:
    prompts = prompts.to(engine.device)
    clean = engine.clean(prompts.clean, prompts.key_mask, prompts.positions)
    return Batch(prompts, clean, ablation.values(engine, prompts))


@dataclass(frozen=True)
class Faithfulness:
    """How much of the model's metric a circuit keeps: (m(C) - m(0)) / (m(M) - m(0)), of means,
    unclipped.

    m(M) is the full model's, m(C) the circuit's, m(0) that of the model with every edge removed;
    all three are the plain metric (not oriented).
    """

    value: float
    model: float
    circuit: float
    empty: float
    metric: str
    ablation: str
    n_prompts: int


@dataclass(frozen=True)
class FaithfulnessScale:
    """The two ends of the faithfulness scale, measured once: the full model, and every edge
    removed.
    """

    objective: Objective
    ablation: str
    full: float
    empty: float

    def faithfulness(self, mask: Bool[Tensor, "R W *S"] | Float[Tensor, "R W *S"]) -> Faithfulness:
        """Returns the faithfulness of a circuit."""
        return self.of(self.objective.measure(mask))

    def faithfulness_each(
        self, masks: Sequence[Bool[Tensor, "R W *S"] | Float[Tensor, "R W *S"]], label: str
    ) -> list[Faithfulness]:
        """Returns the faithfulness of each of some circuits, with a progress bar."""
        return [self.of(values) for values in self.objective.measure_each(masks, label)]

    def of(self, values: Float[Tensor, "N"]) -> Faithfulness:
        """Returns the faithfulness of a circuit under which the oriented metric has these values."""
        circuit = values.double().mean().item()
        sign = 1.0 if self.objective.metric.higher_is_better else -1.0
        return Faithfulness(
            value=(circuit - self.empty) / (self.full - self.empty),
            model=sign * self.full,
            circuit=sign * circuit,
            empty=sign * self.empty,
            metric=self.objective.metric.name,
            ablation=self.ablation,
            n_prompts=len(values),
        )


class NotSeparated(ValueError):
    """The metric is the same, within noise, for the model and for the model with every edge
    removed.
    """


def faithfulness_scale(objective: Objective, ablation: str) -> FaithfulnessScale:
    """Returns the faithfulness scale of a behaviour under an ablation.

    Raises:
        NotSeparated: see `between`.
    """
    return between(objective, ablation, objective.full(), objective.empty())


def between(
    objective: Objective, ablation: str, full: Float[Tensor, "N"], empty: Float[Tensor, "N"]
) -> FaithfulnessScale:
    """Returns the faithfulness scale between the values of the full and of the ablated model.

    Raises: NotSeparated: |m(M) - m(0)| is under two standard errors, so that the quotient would be
        noise.
    """
    full, empty = full.double(), empty.double()
    gap = full - empty
    error = gap.std().item() / len(gap) ** 0.5 if len(gap) > 1 else 0.0
    if not abs(gap.mean().item()) > 2 * error:
        raise NotSeparated(
            f"metric {objective.metric.name} does not separate the model from the ablated model: "
            "they are "
            f"{abs(gap.mean().item()):.3g} apart, two standard errors are {2 * error:.3g} over "
            f"{len(full)} prompts; "
            "use more prompts, another metric or another ablation"
        )
    return FaithfulnessScale(objective, ablation, full.mean().item(), empty.mean().item())
