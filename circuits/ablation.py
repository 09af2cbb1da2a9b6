"""What a removed edge carries instead of its writer's value.

    zero              nothing
    mean              the writer's mean over positions of a reference set; position 0 keeps its own mean,
                      because attention sinks live there
    positional_mean   the mean at each position
    counterfactual    the writer's value on the prompt's own corrupt twin
    resample          the writer's value on another prompt of the reference set, drawn at random

Means leave padding out.  Fit once on a reference set, then ask for the values on each batch.

Shapes: prompts B, positions S, d_model D, writers W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.engine import Engine
from circuits.engine.masked import Ablated
from circuits.engine.memory import footprint, most_prompts, parse_memory
from circuits.prompts import Prompts

ABLATIONS = ("zero", "mean", "positional_mean", "counterfactual", "resample")


@dataclass
class AblationConfig:
    """What removed edges carry."""

    name: str = "counterfactual"  # zero, mean, positional_mean, counterfactual or resample
    seed: int = 0  # of the donors' draw, for resample


@dataclass(frozen=True)
class Means:
    """Mean output of every writer over a reference set.

    `count[p]` is how many prompts reach position p; `rest` pools positions 1 and later.
    """

    first: Float[Tensor, "W D"]
    rest: Float[Tensor, "W D"]
    positional: Float[Tensor, "W S D"]
    count: Int[Tensor, "S"]


@dataclass(frozen=True)
class Ablation:
    """A fitted ablation."""

    config: AblationConfig
    means: Means | None = None
    donors: Prompts | None = None

    @property
    def per_prompt(self) -> bool:
        """Whether each prompt has values of its own."""
        return self.config.name in ("counterfactual", "resample")

    def values(self, engine: Engine, prompts: Prompts) -> Ablated:
        """Returns what removed edges carry on these prompts.

        Raises: ValueError: counterfactual without corrupt prompts; a position or length the
            reference set never had.
        """
        return engine.ablated(self.writers(engine, prompts))

    @torch.no_grad()
    def writers(self, engine: Engine, prompts: Prompts) -> Float[Tensor, "W B S D"]:
        """The ablated values themselves; axes B and S are of size 1 where all rows are equal."""
        name, length = self.config.name, prompts.clean.shape[1]
        if name == "counterfactual":
            if prompts.corrupt is None:
                raise ValueError(
                    "ablation=counterfactual needs a corrupt twin for each prompt; add `corrupt` "
                    "to the prompts, or "
                    "use ablation=mean"
                )
            return engine.clean(prompts.corrupt, prompts.key_mask, prompts.positions[:, :1]).writers
        if name == "resample":
            return self._resampled(engine, prompts)
        if name == "zero":
            shape = (len(engine.graph.writers), 1, 1, engine.architecture.width)
            return torch.zeros(shape, dtype=engine.dtype, device=engine.device)
        assert self.means is not None
        if name == "positional_mean":
            seen = int((self.means.count > 0).sum())
            if length > seen:
                raise ValueError(
                    f"ablation=positional_mean: prompts reach position {length - 1}, but the means "
                    "were taken from "
                    f"prompts of at most {seen} tokens; use ablation=mean or longer reference "
                    "prompts"
                )
            return self.means.positional[:, None, :length]
        if length > 1 and len(self.means.count) == 1:
            raise ValueError(
                f"ablation=mean: prompts have up to {length} tokens, but all reference prompts "
                "have 1 token, so that "
                "there is no mean for later positions; use longer reference prompts"
            )
        parts = [self.means.first[:, None], self.means.rest[:, None].expand(-1, length - 1, -1)]
        return torch.cat(parts, 1)[:, None]

    def _resampled(self, engine: Engine, prompts: Prompts) -> Float[Tensor, "W B S D"]:
        """Each prompt gets one donor at least as long, not itself; the draw depends on seed and
        tokens alone.
        """
        assert self.donors is not None
        longest = int(self.donors.lengths.max())
        if int(prompts.lengths.max()) > longest:
            raise ValueError(
                f"ablation=resample: a prompt has {int(prompts.lengths.max())} tokens, but the "
                "longest donor has "
                f"{longest}; use ablation=mean or longer reference prompts"
            )
        chosen, sequences = [], self.donors.sequences()
        for tokens, length in zip(prompts.clean.tolist(), prompts.lengths.tolist(), strict=True):
            itself = torch.tensor([sequence == tuple(tokens[:length]) for sequence in sequences])
            able = ((self.donors.lengths.cpu() >= length) & ~itself).nonzero()[:, 0]
            if not len(able):
                raise ValueError(
                    "ablation=resample: no reference prompt but itself is at least as long as a "
                    f"prompt of {length} "
                    "tokens; give more reference prompts, or use ablation=mean"
                )
            generator = torch.Generator().manual_seed(
                hash((self.config.seed, *tokens[:length])) & 0x7FFF_FFFF
            )
            chosen.append(able[torch.randint(len(able), (1,), generator=generator)])
        donors = self.donors.select(torch.cat(chosen))
        length = prompts.clean.shape[1]
        read = (
            length if engine.graph.causal else donors.clean.shape[1]
        )  # what comes later may matter
        run = engine.clean(
            donors.clean[:, :read], donors.key_mask[:, :read], donors.positions[:, :1] * 0
        )
        return run.writers[:, :, :length]


def fit_ablation(
    config: AblationConfig, engine: Engine, reference: Prompts, *, memory: str = "2GB"
) -> Ablation:
    """Returns an ablation fitted on reference prompts.

    Raises:
        ValueError: there is no such ablation.
    """
    if config.name not in ABLATIONS:
        raise ValueError(f"ablation={config.name!r}, but the ablations are {', '.join(ABLATIONS)}")
    if config.name in ("mean", "positional_mean"):
        return Ablation(config, means=writer_means(engine, reference, memory=memory))
    return Ablation(
        config, donors=reference.to(engine.device) if config.name == "resample" else None
    )


@torch.no_grad()
def writer_means(engine: Engine, prompts: Prompts, *, memory: str = "2GB") -> Means:
    """Returns every writer's mean over the real tokens of prompts, summed in float64.

    Raises:
        ValueError: a prompt takes more memory than there is.
    """
    longest, size = int(prompts.lengths.max()), footprint(engine, prompts)
    shape = (len(engine.graph.writers), longest, size.width)
    total = torch.zeros(shape, dtype=torch.float64, device=engine.device)
    count = torch.zeros(longest, dtype=torch.int64, device=engine.device)
    shared = 2 * total.nbytes
    for batch in prompts.batches(most_prompts(prompts, size.clean, parse_memory(memory), shared)):
        batch = batch.to(engine.device)
        writers = engine.clean(batch.clean, batch.key_mask, batch.positions[:, :1]).writers
        length, real = batch.clean.shape[1], batch.key_mask[..., None]
        for row in range(len(writers)):  # one at a time, since float64 takes twice as much
            total[row, :length] += (writers[row].double() * real).sum(0)
        count[:length] += batch.key_mask.sum(0)
        del writers  # before the next run
    positional = (total / count[:, None]).to(engine.dtype)
    rest = (total[:, 1:].sum(1) / max(int(count[1:].sum()), 1)).to(engine.dtype)
    return Means(positional[:, 0].clone(), rest, positional, count)
