"""Standard errors over prompts, by the bootstrap: the figure again, of prompts drawn anew.

Of the draws the error is half the width of the middle 68 %, which is the standard deviation where
they are normal, and finite where a few draws have a quotient by nearly nothing (Efron 1979).

Shapes: prompts N; draws D, the first of which is the prompts as they are; `*K` any leading axes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

DRAWS = 500
MIDDLE = (0.16, 0.84)  # of the draws: one standard deviation to either side


@dataclass(frozen=True)
class Figure:
    """A figure and its standard error over prompts; None where it has none that is finite."""

    value: float
    error: float | None


@dataclass(frozen=True, eq=False)
class Resampled:
    """Prompts drawn anew with replacement: how much each weighs in each draw's mean.

    >>> values = torch.tensor([0.0, 1.0, 0.0, 1.0])
    >>> figure(Resampled.of(4).means(values))
    Figure(value=0.5, error=0.25)
    """

    weights: Float[Tensor, "D N"]  # rows sum to 1

    @classmethod
    def of(cls, n_prompts: int, seed: int = 0) -> Resampled:
        """Draws so many prompts; one prompt alone has no error, and is not drawn."""
        draws = DRAWS if n_prompts > 1 else 0
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(n_prompts, (draws, n_prompts), generator=generator)
        counts = torch.zeros(draws, n_prompts, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones_like(counts))
        as_they_are = torch.ones(1, n_prompts, dtype=torch.float64)
        return cls(torch.cat([as_they_are, counts]) / n_prompts)

    def means(self, values: Float[Tensor, "*K N"]) -> Float[Tensor, "*K D"]:
        """The mean of the values over the prompts of each draw."""
        return values.double().cpu() @ self.weights.T


def figure(drawn: Float[Tensor, "D"]) -> Figure:
    """The figure of the prompts as they are, and its error over the draws."""
    if len(drawn) == 1:
        return Figure(drawn.item(), None)
    low, high = drawn[1:].nanquantile(drawn.new_tensor(MIDDLE)).tolist()
    error = (high - low) / 2
    return Figure(drawn[0].item(), error if error < float("inf") else None)
