"""What a circuit is to explain: a metric under a mask, with all that is used again computed once.

Discovery and evaluation both ask one question: how large is the metric when only these edges are
kept?  An `Objective` answers it; every value is per prompt and oriented so that higher is better.

A mask is over edges here, and over units where `circuits.parts.objective` prepares the runs.

Shapes: prompts N (all batches), B (one batch), writers W, readers R, candidate masks K; `*E` the
axes of a mask, [R, W, *S] of edges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.ablation import Ablation, able_prompts
from circuits.engine import Clean, Engine
from circuits.engine.masked import Ablated, Start
from circuits.engine.memory import Footprint, footprint, most_prompts, parse_memory
from circuits.metrics import Metric
from circuits.prompts import Prompts
from circuits.space import Space

Mask = Bool[Tensor, "*K_E"] | Float[Tensor, "*K_E"]  # share of each part that is kept
One = TypeVar("One")


@runtime_checkable
class Runs(Protocol):
    """Prepared batches of prompts, and how the model runs on them under a mask.

    Of each batch `prompts` and `clean.logits` can be read.
    """

    @property
    def engine(self) -> Engine: ...
    @property
    def ablation(self) -> Ablation: ...
    @property
    def whole(self) -> Prompts: ...
    @property
    def prompts(self) -> tuple[Prompts, ...]: ...
    @property
    def kept(self) -> tuple[Any, ...]: ...
    @property
    def space(self) -> Space: ...
    @property
    def work(self) -> int: ...

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...

    def masks_at_once(self, batch: Any) -> int:
        """Under how many masks a batch can be run at once."""
        ...

    def training(self) -> tuple[int, int]:
        """Bytes that a step of a mask's training takes for each prompt, and besides."""
        ...

    def logits(self, batch: Any, mask: Mask, first_layer: int) -> Float[Tensor, "*K_B_P_V"]:
        """The logits of one batch at its scored positions when the model runs under the mask(s)."""
        ...


Prepared = TypeVar("Prepared", bound=Runs)


@dataclass(frozen=True)
class Batch:
    """Some prompts with the model's clean run and the ablated values on them."""

    prompts: Prompts
    clean: Clean
    ablated: Ablated


@dataclass(frozen=True)
class Contrast:
    """Some prompts with what attribution needs of them."""

    prompts: Prompts
    values: Float[Tensor, "W B S D"]  # of every writer, clean less ablated
    embedded: Float[Tensor, "B S D"]  # what the input writers write in the clean run
    logits: Float[Tensor, "B P V"]  # of the clean run


@dataclass(frozen=True)
class Batches:
    """Batches in order, the first of them prepared once and kept, the others on each pass.

    To prepare a batch costs one forward, and another one where each prompt has its own ablated
    values (counterfactual, resample); a run under a mask costs about 1.2.
    """

    engine: Engine
    ablation: Ablation
    whole: Prompts  # all that have ablated values
    prompts: tuple[Prompts, ...]
    kept: tuple[Batch, ...]
    footprint: Footprint
    work: int  # bytes for the work on one batch, with its own prepared values where it is not kept

    @property
    def space(self) -> Space:
        """What a mask is over."""
        return self.engine.graph

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Batch]:
        yield from self.kept
        for prompts in self.prompts[len(self.kept) :]:
            yield _prepared(self.engine, prompts, self.ablation)

    def contrasts(self) -> Iterator[Contrast]:
        """Clean less ablated values; of a batch that is not kept they replace the clean ones."""
        n_inputs = self.engine.graph.n_inputs
        for batch in self.kept:
            clean = batch.clean
            values = clean.writers - batch.ablated.writers
            yield Contrast(batch.prompts, values, clean.writers[:n_inputs].sum(0), clean.logits)
        for prompts in self.prompts[len(self.kept) :]:
            prompts = prompts.to(self.engine.device)
            clean = self.engine.clean(prompts)
            embedded = clean.writers[:n_inputs].sum(0)
            values = clean.writers.sub_(self.ablation.writers(self.engine, prompts))
            yield Contrast(prompts, values, embedded, clean.logits)

    @property
    def spare(self) -> int:
        """Bytes for the work on one batch, when each that is not kept has been prepared anew."""
        anew = self.prompts[len(self.kept) :]
        held = (_held(self.footprint, self.ablation, len(prompts)) for prompts in anew)
        return self.work - max(held, default=0)

    def masks_at_once(self, batch: Batch) -> int:
        """Under how many masks a batch can be run at once."""
        prompts, footprint = len(batch.prompts), self.footprint
        left = self.work - _held(footprint, self.ablation, prompts)
        return max(1, left // (prompts * footprint.masked() + footprint.mask))

    def training(self) -> tuple[int, int]:
        """Bytes that a step of a mask's training takes for each prompt, and besides."""
        size, own = self.footprint, self.ablation.per_prompt
        return size.training(own), size.shared(own) + size.parameters

    def logits(self, batch: Batch, mask: Mask, first_layer: int) -> Float[Tensor, "*K_B_P_V"]:
        """The logits of one batch at its scored positions when the model runs under the mask(s)."""
        before = batch.clean.writers[: self.engine.graph.first_writer(first_layer)]
        start = Start(first_layer, before)
        return self.engine.masked(batch.prompts, mask, batch.ablated, start=start)


@dataclass(frozen=True)
class Objective(Generic[Prepared]):
    """What a circuit is to explain."""

    engine: Engine
    metric: Metric
    batches: Prepared

    @property
    def space(self) -> Space:
        """What a mask is over: the edges of the graph, or units."""
        return self.batches.space

    @torch.no_grad()
    def measure(self, mask: Mask, *, first_layer: int = 0) -> Float[Tensor, "*K N"]:
        """The oriented metric of each prompt when the model runs under the mask(s).

        A run from `first_layer` on starts from the clean values of all writers before it: the same
        result, for less, when the mask keeps every edge into earlier layers.
        """
        values, edge_axes = [], self.space.exists.ndim
        for batch in self.batches:
            if mask.ndim == edge_axes:
                values.append(self._on(batch, mask, first_layer))
                continue
            parts = mask.split(self.batches.masks_at_once(batch))
            values.append(torch.cat([self._on(batch, part, first_layer) for part in parts]))
        return torch.cat(values, -1)

    @torch.no_grad()
    def measure_each(
        self, masks: Sequence[Bool[Tensor, "*E"] | Float[Tensor, "*E"]], label: str
    ) -> Float[Tensor, "K N"]:
        """Like `measure`, each mask in a run of its own, for masks that have little in common.

        A run under several masks does the work that any of them leaves.
        """
        runs = len(masks) * len(self.batches)
        with tqdm(total=runs, desc=label, unit="run", disable=None) as progress:
            values = []
            for batch in self.batches:
                values.append([])
                for mask in masks:
                    values[-1].append(self._on(batch, mask))
                    progress.update()
        return torch.cat([torch.stack(rows) for rows in values], -1)

    def _on(self, batch: Any, mask: Mask, first_layer: int = 0) -> Float[Tensor, "*K B"]:
        """`measure` on one batch."""
        logits = self.logits(batch, mask, first_layer)
        return self.metric.oriented(logits, batch.prompts, batch.clean.logits)

    @torch.no_grad()
    def logits(self, batch: Any, mask: Mask, first_layer: int = 0) -> Float[Tensor, "*K_B_P_V"]:
        """The logits of one batch at its scored positions when the model runs under the mask(s)."""
        return self.batches.logits(batch, mask, first_layer)

    @torch.no_grad()
    def full(self) -> Float[Tensor, "N"]:
        """The oriented metric of the full model."""
        runs = ((batch.prompts, batch.clean.logits) for batch in self.batches)
        return torch.cat([self.metric.oriented(own, prompts, own) for prompts, own in runs])

    def empty(self) -> Float[Tensor, "N"]:
        """The oriented metric with every edge (or unit) removed."""
        return self.measure(torch.zeros_like(self.space.exists))


def prepare(
    engine: Engine, prompts: Prompts, metric: Metric, ablation: Ablation, *, memory: str = "2GB"
) -> Objective[Batches]:
    """Returns an objective with as many clean and ablated runs done as half of `memory` can hold.

    The other half is for the work on one batch.  Each pass over the objective prepares anew what
    could not be kept, at one or two forwards a batch.  A prompt that takes more than half by itself
    is worked on with all of the memory.  Prompts that the ablation has no values for (longer than
    all others, as a rule) are left out with a warning.

    Raises:
        ValueError: the prompts lack what metric or ablation need, are longer than the model's
            context, or take more memory than there is.
    """
    metric.require(prompts)
    prompts = able_prompts(ablation, prompts)
    budget, size = parse_memory(memory), footprint(engine, prompts)
    each, shared = size.objective(ablation.per_prompt), size.shared(ablation.per_prompt) + size.mask
    work = budget // 2 if each + shared <= budget // 2 else budget
    parts = tuple(prompts.batches(most_prompts(prompts, each, work, shared)))
    kept = prepared_within(
        budget - work,
        parts,
        lambda part: _held(size, ablation, len(part)),
        lambda part: _prepared(engine, part, ablation),
    )
    batches = Batches(engine, ablation, prompts, parts, kept, size, work)
    return Objective(engine, metric, batches)


def prepared_within(
    budget: int,
    parts: Sequence[Prompts],
    held: Callable[[Prompts], int],
    made: Callable[[Prompts], One],
) -> tuple[One, ...]:
    """Returns what is made of the first parts, as many as together hold no more than a budget."""
    kept, total = [], 0
    for part in parts:
        total += held(part)
        if total > budget:
            break
        kept.append(made(part))
    return tuple(kept)


def _held(size: Footprint, ablation: Ablation, n_prompts: int) -> int:
    """Bytes that a prepared batch holds on to."""
    return n_prompts * size.prepared(ablation.per_prompt) + size.shared(ablation.per_prompt)


def _prepared(engine: Engine, prompts: Prompts, ablation: Ablation) -> Batch:
    prompts = prompts.to(engine.device)
    clean = engine.clean(prompts)
    return Batch(prompts, clean, ablation.values(engine, prompts))
