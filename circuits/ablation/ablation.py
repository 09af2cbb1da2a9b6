"""The protocol of an ablation.

Shapes: prompts B, positions S, d_model D, writers W.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.ablation.source import WRITERS, Source
from circuits.engine.engine import Engine
from circuits.engine.memory import Footprint
from circuits.prompts.prompts import Prompts

log = logging.getLogger(__name__)


@dataclass
class AblationConfig:
    """What removed edges carry."""

    # zero, mean, positional_mean, counterfactual, resample or optimal
    name: str = "counterfactual"
    seed: int = 0  # of the donors' draw, for resample; of what is drawn in training, for optimal
    steps: int = 300  # of the training, for optimal


class Ablation(ABC):
    """A fitted ablation."""

    name: ClassVar[str]
    per_prompt: ClassVar[bool] = False  # whether each prompt has values of its own
    learned: ClassVar[bool] = False  # whether it was trained, so that a run keeps its `state`
    any_source: ClassVar[bool] = False  # whether it can take values of other things than writers

    def __init__(self, source: Source = WRITERS) -> None:
        self.source = source

    @classmethod
    def fit(
        cls,
        engine: Engine,
        reference: Prompts,
        config: AblationConfig,
        *,
        memory: str,
        source: Source = WRITERS,
    ) -> Ablation:
        """Returns the ablation fitted on reference prompts; of some there is nothing to fit."""
        return cls(source)

    def able(self, prompts: Prompts) -> Bool[Tensor, "B"]:
        """Which prompts it has values for, on the CPU."""
        return torch.ones(len(prompts), dtype=torch.bool)

    @classmethod
    def require(cls, prompts: Prompts) -> None:
        """Raises ValueError where prompts lack what the ablation needs of each; most need none."""
        return

    @abstractmethod
    def writers(self, engine: Engine, prompts: Prompts) -> Float[Tensor, "W B S D"]:
        """What writers write on these prompts, B and S 1 where rows are equal, or ValueError.

        Of an ablation that was fitted to another source it is what that reads.
        """

    def values(self, engine: Engine, prompts: Prompts) -> Any:
        """What removed edges carry on these prompts, ready for `Engine.masked`, or ValueError.

        Of an ablation that was fitted to another source, ready for runs under masks of that.
        """
        return self.source.prepared(engine, self.writers(engine, prompts))

    def refined(
        self, engine: Engine, prompts: Prompts, kept: Bool[Tensor, "*E"], *, memory: str = "2GB"
    ) -> Ablation:
        """The ablation for a circuit that was found on the prompts; most are as good for all."""
        return self

    def shared_bytes(self, size: Footprint) -> int:
        """What its values and a mask take in a run, however many prompts there are."""
        return size.shared(self.per_prompt) + size.mask

    def state(self) -> Mapping[str, Tensor]:
        """The tensors from which it can be restored; ValueError where it keeps none."""
        raise ValueError(f"ablation={self.name} keeps no tensors; it is fitted anew each time")

    @classmethod
    def restore(cls, engine: Engine, state: Mapping[str, Tensor]) -> Ablation:
        """The ablation from its `state`; ValueError where it keeps none."""
        raise ValueError(f"ablation={cls.name} keeps no tensors; it is fitted anew each time")


def able_prompts(ablation: Ablation, prompts: Prompts) -> Prompts:
    """The prompts that an ablation has values for, with a warning where it leaves some out.

    Where it has values for none, all of them, so that it says itself why.
    """
    able = ablation.able(prompts)
    if able.all() or not able.any():
        return prompts
    out = (~able).nonzero()[:, 0].tolist()
    log.warning(
        "ablation=%s: %d of %d prompts are left out, because no other reference prompt is as long "
        "as they are: %s; give more prompts of their length, or use ablation=mean",
        ablation.name,
        len(out),
        len(prompts),
        _named(prompts, out),
    )
    return prompts.select(able)


def _named(prompts: Prompts, rows: list[int]) -> str:
    """The first few of some prompts, by id and length."""
    few = [f"{prompts.ids[row]!r} ({int(prompts.lengths[row])} tokens)" for row in rows[:3]]
    return ", ".join(few) + (", ..." if len(rows) > len(few) else "")
