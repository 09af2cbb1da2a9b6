"""What makes a mask small, beside a loss that is 0 for the model and 1 for the empty circuit.

With s the share of all edges that the mask is expected to keep:

    fixed     price s                                (Cao et al. 2021, arXiv 2104.03514)
    steered   l1 d + l2 d^2,  d = log s - log t      (after Bhaskar et al. 2024, arXiv 2406.16778)

where the target t falls from the share at the start to the final one, evenly in log t over the
first part of the steps, and l1, l2 go up the gradient: l1 by d, l2 by d^2, so that the mask keeps
to the target whatever the loss says.  Edge Pruning takes shares themselves for d; their logarithms
give small circuits as many steps as large ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.discovery.masks.settings import MaskTraining

WARM_UP = 5 / 6  # of the steps, in which the target falls: 2,500 of 3,000 in Edge Pruning
RATE = 40.0  # of the multipliers, over the number of steps


@dataclass(frozen=True)
class Steered:
    """A Lagrangian that keeps the share at a target, which falls."""

    start: float  # share at the first step
    end: float  # share at the last
    steps: int

    def target(self, step: int) -> float:
        """The share that a step aims at."""
        done = min(1.0, (step + 1) / (WARM_UP * self.steps))
        return math.exp((1 - done) * math.log(self.start) + done * math.log(self.end))

    def __call__(
        self, share: Float[Tensor, ""], multipliers: Float[Tensor, "2"], step: int
    ) -> Float[Tensor, ""]:
        """The penalty of a step; moves the multipliers."""
        off = share.log() - math.log(self.target(step))
        terms = torch.stack((off, off**2))
        multipliers += RATE / self.steps * terms.detach()
        return (multipliers.clone() * terms).sum()


@dataclass(frozen=True)
class Fixed:
    """A price of the edges."""

    price: float

    def __call__(
        self, share: Float[Tensor, ""], multipliers: Float[Tensor, "2"], step: int
    ) -> Float[Tensor, ""]:
        return self.price * share


Penalty = Steered | Fixed


def penalty_of(config: MaskTraining, start: float, end: float) -> Penalty:
    """The penalty of a training that begins at one share of all edges and ends at another."""
    if config.penalty is not None:
        return Fixed(config.penalty)
    return Steered(start, end, config.steps)
