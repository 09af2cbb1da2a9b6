"""What a circuit of units is to explain: runs under masks of units, prepared as those of edges are.

`prepare_units` gives a `circuits.objective.Objective`, so that whatever measures, selects and
evaluates circuits of edges does so with circuits of units.

Shapes: prompts B, pos S, scored positions P, d_model D, numbers of all sites Z, vocabulary V.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.ablation import Ablation, able_prompts
from circuits.engine.engine import Engine
from circuits.engine.memory import GATES, Footprint, footprint, most_prompts, parse_memory
from circuits.metrics import Metric
from circuits.objective import Mask, Objective, prepared_within
from circuits.parts.divided import Divided
from circuits.parts.units import Units
from circuits.prompts import Prompts


@dataclass(frozen=True)
class UnitClean:
    """The model's own logits at the scored positions."""

    logits: Float[Tensor, "B P V"]


@dataclass(frozen=True)
class UnitBatch:
    """Some prompts with the model's logits and the ablated numbers on them."""

    prompts: Prompts
    clean: UnitClean
    ablated: Float[Tensor, "B_or_1 S_or_1 Z"]


@dataclass(frozen=True)
class UnitContrast:
    """Some prompts with what attribution needs of them."""

    prompts: Prompts
    values: Float[Tensor, "B S Z"]  # of every number, clean less ablated
    embedded: Float[Tensor, "B S D"]  # what the input writers write in the clean run
    logits: Float[Tensor, "B P V"]  # of the clean run


@dataclass(frozen=True)
class UnitBatches:
    """Batches in order, the first of them prepared once and kept, the others on each pass."""

    divided: Divided
    ablation: Ablation
    whole: Prompts  # all that have ablated values
    prompts: tuple[Prompts, ...]
    kept: tuple[UnitBatch, ...]
    footprint: Footprint
    work: int  # bytes for the work on one batch

    @property
    def engine(self) -> Engine:
        return self.divided.engine

    @property
    def space(self) -> Units:
        """What a mask is over."""
        return self.divided.units

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[UnitBatch]:
        yield from self.kept
        for prompts in self.prompts[len(self.kept) :]:
            yield _prepared(self.divided, prompts, self.ablation)

    def contrasts(self) -> Iterator[UnitContrast]:
        """Clean less ablated numbers."""
        for batch in self:
            clean = self.divided.read(self.engine, batch.prompts)[0]
            embedded = clean[..., self.divided.input_numbers].clone()
            values = clean.sub_(batch.ablated)
            yield UnitContrast(batch.prompts, values, embedded, batch.clean.logits)

    def masks_at_once(self, batch: UnitBatch) -> int:
        """Under how many masks a batch can be run at once."""
        each = len(batch.prompts) * _masked(self.divided, self.footprint)
        return max(1, self.work // each)

    def training(self) -> tuple[int, int]:
        """Bytes that a step of a mask's training takes for each prompt, and besides."""
        size, divided = self.footprint, self.divided
        numbers, gates = divided.token_bytes * size.tokens, 4 * GATES * divided.units.n_parts
        logits = size.element * size.scored * size.vocabulary
        held = logits + gates + (numbers if self.ablation.per_prompt else 0)
        return divided.gradient(size) + held, numbers + 2 * gates

    def logits(
        self, batch: UnitBatch, mask: Mask, first_layer: int = 0
    ) -> Float[Tensor, "*K_B_P_V"]:
        """The logits of one batch at its scored positions when the model runs under the mask(s)."""
        assert first_layer == 0, "a run under a mask of units starts at block 0"
        return self.divided.masked(batch.prompts, mask, batch.ablated)


def prepare_units(
    divided: Divided, prompts: Prompts, metric: Metric, ablation: Ablation, *, memory: str = "2GB"
) -> Objective[UnitBatches]:
    """Returns an objective over units with as many runs done as half of `memory` can hold.

    The ablation has to be fitted to the units (`fit_ablation(..., source=divided)`).

    Raises:
        ValueError: as `circuits.objective.prepare`, or the ablation was fitted to something else.
    """
    if ablation.source is not divided:
        raise ValueError(
            f"ablation={ablation.name} was not fitted to these units; fit it with source=divided"
        )
    metric.require(prompts)
    prompts = able_prompts(ablation, prompts)
    budget, size = parse_memory(memory), footprint(divided.engine, prompts)
    tokens, numbers = size.tokens, divided.token_bytes
    each = divided.gradient(size)
    shared = 0 if ablation.per_prompt else numbers * tokens
    work = budget // 2 if each + shared <= budget // 2 else budget
    parts = tuple(prompts.batches(most_prompts(prompts, each, work, shared)))

    def held(part: Prompts) -> int:
        logits = size.element * size.scored * size.vocabulary
        return len(part) * (logits + (numbers * tokens if ablation.per_prompt else 0)) + shared

    kept = prepared_within(
        budget - work, parts, held, lambda part: _prepared(divided, part, ablation)
    )
    batches = UnitBatches(divided, ablation, prompts, parts, kept, size, work)
    return Objective(divided.engine, metric, batches)


def _masked(divided: Divided, size: Footprint) -> int:
    """Bytes that a prompt takes in a run under one mask, or in a gradient, beside what it holds."""
    return size.plain + 6 * divided.token_bytes * size.tokens


@torch.no_grad()
def _prepared(divided: Divided, prompts: Prompts, ablation: Ablation) -> UnitBatch:
    engine = divided.engine
    prompts = prompts.to(engine.device)
    ablated = ablation.values(engine, prompts)
    return UnitBatch(prompts, UnitClean(engine.logits(prompts)), ablated)
