"""Minus the log-probability of the model's first choice, averaged over scored positions.

Hendrycks & Gimpel 2017, arXiv 1610.02136.

Shapes: prompts B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.batches import over_batches
from circuits.engine import Engine
from circuits.prompts import Prompts
from mad.detector import Context


@dataclass
class MaxProbability:
    """How unsure the model is."""

    name: str = "max_probability"

    def check(self) -> None:
        """There is nothing to get wrong."""


@dataclass(frozen=True)
class MaxProbabilityDetector:
    """How unsure a model is."""

    config: MaxProbability
    engine: Engine
    circuit = None
    scores_under = None

    def score(self, prompts: Prompts, *, memory: str = "2GB") -> Float[Tensor, "B"]:
        """Minus the log-probability of the first choice."""
        return over_batches(
            self._score, self.engine, prompts, lambda size: size.plain, memory=memory
        )

    @torch.no_grad()
    def _score(self, prompts: Prompts) -> Float[Tensor, "B"]:
        largest = self.engine.logits(prompts).float().log_softmax(-1).amax(-1)
        return -prompts.mean_over_scored(largest).cpu()

    def state(self) -> dict[str, Tensor]:
        """Nothing was fitted."""
        return {}


def fit_max_probability(
    config: MaxProbability, context: Context, trusted: Prompts, *, memory: str = "2GB"
) -> MaxProbabilityDetector:
    """Returns the detector; trusted prompts only calibrate it."""
    return MaxProbabilityDetector(config, context.engine)


def restore_max_probability(
    config: MaxProbability, context: Context, state: Mapping[str, Tensor], *, memory: str = "2GB"
) -> MaxProbabilityDetector:
    """Returns a saved detector."""
    return MaxProbabilityDetector(config, context.engine)
