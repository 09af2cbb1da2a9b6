"""Zero ablation: removed edges carry nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.ablation.ablation import Ablation
from circuits.engine.engine import Engine
from circuits.prompts.prompts import Prompts


class Zero(Ablation):
    """Nothing."""

    name = "zero"

    @classmethod
    def fit(cls, engine: Engine, reference: Prompts, *, seed: int, memory: str) -> Zero:
        """Returns the ablation; there is nothing to fit."""
        return cls()

    def writers(self, engine: Engine, prompts: Prompts) -> Float[Tensor, "W 1 1 D"]:
        """Zeros."""
        shape = (len(engine.graph.writers), 1, 1, engine.architecture.width)
        return torch.zeros(shape, dtype=engine.dtype, device=engine.device)

    def state(self) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}

    @classmethod
    def restore(cls, engine: Engine, state: Mapping[str, Tensor]) -> Zero:
        """The ablation."""
        return cls()
