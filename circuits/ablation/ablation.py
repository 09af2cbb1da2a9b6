"""The protocol of an ablation.

Shapes: prompts B, positions S, d_model D, writers W.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from circuits.engine.engine import Engine
from circuits.engine.masked import Ablated
from circuits.engine.memory import Footprint
from circuits.prompts.prompts import Prompts


class Ablation(ABC):
    """A fitted ablation."""

    name: ClassVar[str]
    per_prompt: ClassVar[bool] = False  # whether each prompt has values of its own

    @classmethod
    def fit(cls, engine: Engine, reference: Prompts, *, seed: int, memory: str) -> Ablation:
        """Returns the ablation fitted on reference prompts; of some there is nothing to fit."""
        return cls()

    @classmethod
    def require(cls, prompts: Prompts) -> None:
        """Raises ValueError where prompts lack what the ablation needs of each; most need none."""
        return

    @abstractmethod
    def writers(self, engine: Engine, prompts: Prompts) -> Float[Tensor, "W B S D"]:
        """What writers write on these prompts, B and S 1 where rows are equal, or ValueError."""

    def values(self, engine: Engine, prompts: Prompts) -> Ablated:
        """What removed edges carry on these prompts, ready for `Engine.masked`, or ValueError."""
        return engine.ablated(self.writers(engine, prompts))

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
