"""Mean ablation: removed edges carry their writer's mean over a reference set.

Shapes: prompts B, positions S, d_model D, writers W.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.ablation.ablation import Ablation, AblationConfig
from circuits.ablation.source import WRITERS, Source
from circuits.batches import in_batches
from circuits.engine.engine import Engine
from circuits.files import restored_tensors
from circuits.prompts.errors import InputError
from circuits.prompts.prompts import Prompts


@dataclass(frozen=True)
class Means:
    """Mean output of every writer, or of every row of another source, over a reference set.

    `count[p]` is how many prompts reach position p; `rest` pools positions 1 and later.
    """

    first: Float[Tensor, "W D"]
    rest: Float[Tensor, "W D"]
    positional: Float[Tensor, "W S D"]
    count: Int[Tensor, "S"]


@torch.no_grad()
def writer_means(
    engine: Engine, prompts: Prompts, *, memory: str = "2GB", source: Source = WRITERS
) -> Means:
    """Every writer's mean over the real tokens of prompts, summed in float64; or a source's."""
    longest = int(prompts.lengths.max())
    rows, numbers = source.shape(engine)
    total = torch.zeros((rows, longest, numbers), dtype=torch.float64, device=engine.device)
    count = torch.zeros(longest, dtype=torch.int64, device=engine.device)
    for batch in in_batches(
        engine, prompts, source.footprint, memory=memory, shared=lambda _: 2 * total.nbytes
    ):
        writers = source.read(engine, batch)
        length, real = batch.clean.shape[1], batch.key_mask[..., None]
        for row in range(len(writers)):  # one at a time, since float64 takes twice as much
            total[row, :length] += (writers[row].double() * real).sum(0)
        count[:length] += batch.key_mask.sum(0)
        del writers  # before the next run
    positional = (total / count[:, None]).to(engine.dtype)
    rest = (total[:, 1:].sum(1) / max(int(count[1:].sum()), 1)).to(engine.dtype)
    return Means(positional[:, 0].clone(), rest, positional, count)


class Mean(Ablation):
    """The mean over positions; position 0 has its own."""

    name = "mean"
    any_source = True

    def __init__(self, means: Means, source: Source = WRITERS) -> None:
        super().__init__(source)
        self.means = means

    @classmethod
    def fit(
        cls,
        engine: Engine,
        reference: Prompts,
        config: AblationConfig,
        *,
        memory: str,
        source: Source = WRITERS,
    ) -> Mean:
        return cls(writer_means(engine, reference, memory=memory, source=source), source)

    def able(self, prompts: Prompts) -> Bool[Tensor, "B"]:
        return prompts.lengths.cpu() <= (1 if len(self.means.count) == 1 else torch.inf)

    def writers(self, engine: Engine, prompts: Prompts) -> Float[Tensor, "W 1 S D"]:
        """The means, for as many positions as the prompts have, or InputError."""
        length = prompts.clean.shape[1]
        if length > 1 and len(self.means.count) == 1:
            raise InputError(
                f"ablation=mean: prompts have up to {length} tokens, but all reference prompts "
                "have 1 token, so that there is no mean for later positions; use longer reference "
                "prompts"
            )
        later = self.means.rest[:, None].expand(-1, length - 1, -1)
        return torch.cat([self.means.first[:, None], later], 1)[:, None]

    def state(self) -> Mapping[str, Tensor]:
        return dict(vars(self.means))

    @classmethod
    def restore(cls, engine: Engine, state: Mapping[str, Tensor]) -> Mean:
        rows, numbers = WRITERS.shape(engine)
        kept = vars(restored_tensors(Means, state, W=rows, D=numbers))
        tensors = {name: tensor.to(engine.device) for name, tensor in kept.items()}
        values = {name: tensors[name].to(engine.dtype) for name in ("first", "rest", "positional")}
        return cls(Means(**values, count=tensors["count"]))


class PositionalMean(Mean):
    """The mean at each position."""

    name = "positional_mean"

    def able(self, prompts: Prompts) -> Bool[Tensor, "B"]:
        return prompts.lengths.cpu() <= self._seen

    @property
    def _seen(self) -> int:
        """How many positions have a mean."""
        return int((self.means.count > 0).sum())

    def writers(self, engine: Engine, prompts: Prompts) -> Float[Tensor, "W 1 S D"]:
        """The means at the positions of the prompts; InputError beyond the reference prompts'."""
        length, seen = prompts.clean.shape[1], self._seen
        if length > seen:
            raise InputError(
                f"ablation=positional_mean: prompts reach position {length - 1}, but the means "
                f"were taken from prompts of at most {seen} tokens; use ablation=mean or longer "
                "reference prompts"
            )
        return self.means.positional[:, None, :length]
