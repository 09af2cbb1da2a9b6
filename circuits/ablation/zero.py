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
    any_source = True

    def writers(self, engine: Engine, prompts: Prompts) -> Float[Tensor, "W 1 1 D"]:
        rows, numbers = self.source.shape(engine)
        return torch.zeros((rows, 1, 1, numbers), dtype=engine.dtype, device=engine.device)

    def state(self) -> Mapping[str, Tensor]:
        return {}

    @classmethod
    def restore(cls, engine: Engine, state: Mapping[str, Tensor]) -> Zero:
        return cls()
