"""Ablations by another run: removed edges carry what writers write on another prompt.

Shapes: prompts B, positions S, d_model D, writers W.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.ablation.ablation import Ablation, AblationConfig
from circuits.ablation.source import WRITERS, Source
from circuits.engine.engine import Engine
from circuits.prompts.errors import InputError
from circuits.prompts.prompts import Prompts


class Counterfactual(Ablation):
    """The writer's value on the prompt's own corrupt twin."""

    name = "counterfactual"
    per_prompt = True
    any_source = True

    @classmethod
    def require(cls, prompts: Prompts) -> None:
        """Raises ValueError where there are no corrupt prompts."""
        if prompts.corrupt is None:
            raise ValueError(
                "ablation=counterfactual needs a corrupt twin for each prompt; add `corrupt` to "
                "the prompts, or use ablation=mean"
            )

    def writers(self, engine: Engine, prompts: Prompts) -> Float[Tensor, "W B S D"]:
        """What is written on the corrupt prompts; ValueError where there are none."""
        self.require(prompts)
        return self.source.read(engine, prompts.corrupted())


class Resample(Ablation):
    """The writer's value on another prompt: one at least as long, and not the prompt itself.

    Which one depends on the seed and the prompt's tokens alone.
    """

    name = "resample"
    per_prompt = True
    any_source = True

    def __init__(self, donors: Prompts, seed: int, source: Source = WRITERS) -> None:
        super().__init__(source)
        self.donors, self.seed = donors, seed
        self._sequences = donors.sequences()
        self._lengths = donors.lengths.cpu()

    @classmethod
    def fit(
        cls,
        engine: Engine,
        reference: Prompts,
        config: AblationConfig,
        *,
        memory: str,
        source: Source = WRITERS,
    ) -> Resample:
        return cls(reference.to(engine.device), config.seed, source)

    def able(self, prompts: Prompts) -> Bool[Tensor, "B"]:
        """Those for which a donor is at least as long that is not the prompt itself."""
        lengths, copies = sorted(self._lengths.tolist()), Counter(self._sequences)
        donors = [
            len(lengths) - bisect_left(lengths, len(tokens)) - copies[tokens]
            for tokens in prompts.sequences()
        ]
        return torch.tensor(donors) > 0

    def writers(self, engine: Engine, prompts: Prompts) -> Float[Tensor, "W B S D"]:
        """What is written on the donors; InputError where a prompt has none as long."""
        longest, length = int(self._lengths.max()), int(prompts.lengths.max())
        if length > longest:
            raise InputError(
                f"ablation=resample: a prompt has {length} tokens, but the longest donor has "
                f"{longest}; use ablation=mean or longer reference prompts"
            )
        donors = self.donors.select(torch.stack([self._drawn(x) for x in prompts.sequences()]))
        width = prompts.clean.shape[1]
        # In a bidirectional model what comes later may matter.
        donors = donors.cut(width) if engine.graph.causal else donors
        return self.source.read(engine, donors)[:, :, :width]

    def _drawn(self, tokens: tuple[int, ...]) -> Tensor:
        """The number of a prompt's donor."""
        itself = torch.tensor([sequence == tokens for sequence in self._sequences])
        able = ((self._lengths >= len(tokens)) & ~itself).nonzero()[:, 0]
        if not len(able):
            raise InputError(
                "ablation=resample: no reference prompt but itself is at least as long as a "
                f"prompt of {len(tokens)} tokens; give more reference prompts, or use ablation=mean"
            )
        seed = mixed((self.seed, *tokens)) & 0x7FFF_FFFF
        generator = torch.Generator().manual_seed(seed)
        return able[torch.randint(len(able), (1,), generator=generator)][0]


_WORD = (1 << 64) - 1
_PRIMES = 11400714785074694791, 14029467366897019727, 2870177450012600261  # of xxHash


def mixed(numbers: Sequence[int]) -> int:
    """Returns 64 bits that depend on all of some non-negative numbers under 2^61 - 1.

    They are those of CPython's `hash` of the tuple since 3.8 (a variant of Collet's xxHash), which
    other versions and implementations of Python need not give.
    """
    first, second, fifth = _PRIMES
    state = fifth
    for number in numbers:
        state = (state + number * second) & _WORD
        state = ((state << 31) | (state >> 33)) & _WORD
        state = (state * first) & _WORD
    return (state + (len(numbers) ^ fifth ^ 3527539)) & _WORD
