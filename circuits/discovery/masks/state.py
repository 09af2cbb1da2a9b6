"""Where training is: all that its next step depends on, and what has been kept on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.ablation.optimal import Optimal

RATE_OF_CONSTANTS = 0.01  # of Adam, in units of a constant's scale


@dataclass(frozen=True)
class Point:
    """What a step came to."""

    step: int
    loss: float  # 1 - faithfulness, and the penalty
    faithfulness: float  # of the batch, under drawn masks
    metric: float  # of the batch, not oriented
    edges: float  # expected, before the step

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss)


@dataclass
class Constants:
    """Those of ablation=optimal, which move along with the mask."""

    start: Optimal
    moved: Float[Tensor, "W T D"]

    def now(self) -> Optimal:
        """The ablation, differentiable in `moved`."""
        return self.start.at(self.moved)


@dataclass
class State:
    """The parameters of a mask, those of their optimiser, and the course of the training."""

    gates: dict[str, Tensor]  # theta by kind of gate
    optimiser: torch.optim.AdamW
    multipliers: Float[Tensor, "2"]  # of a Lagrangian
    step: int = 0  # how many are done
    curve: list[Point] = field(default_factory=list)
    rungs: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # theta as it passed a size
    constants: Constants | None = None  # of ablation=optimal

    @classmethod
    def new(
        cls,
        gates: Mapping[str, Tensor],
        learning_rate: float,
        betas: tuple[float, float],
        optimal: Optimal | None = None,
    ) -> State:
        """The state before the first step."""
        gates = {name: theta.clone().requires_grad_() for name, theta in gates.items()}
        optimiser = torch.optim.AdamW(gates.values(), learning_rate, betas, weight_decay=0.0)
        multipliers = torch.zeros(2, device=next(iter(gates.values())).device)
        if optimal is None:
            return cls(gates, optimiser, multipliers)
        constants = Constants(optimal, torch.zeros_like(optimal.constants).requires_grad_())
        optimiser.add_param_group({"params": [constants.moved], "lr": RATE_OF_CONSTANTS})
        return cls(gates, optimiser, multipliers, constants=constants)

    def parameters(self) -> list[Tensor]:
        """All that is trained."""
        return [*self.gates.values(), *([self.constants.moved] if self.constants else [])]

    def held(self) -> dict[str, Tensor]:
        """A copy of the parameters, on the CPU."""
        return {name: theta.detach().cpu().clone() for name, theta in self.gates.items()}
