"""Minus the log-probability of the model's first choice, averaged over scored positions.

Hendrycks & Gimpel 2017, arXiv 1610.02136.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.batches import over_batches
from circuits.prompts import Prompts
from mad.detectors.measured import Instrument, measuring
from mad.statistics import TOTAL


@dataclass
class MaxProbability:
    """How unsure the model is."""

    name: str = "max_probability"

    def check(self) -> None:
        """There is nothing to get wrong."""


@torch.no_grad()
def uncertainty(instrument: Instrument, prompts: Prompts, memory: str) -> Float[Tensor, "B 1"]:
    """Returns minus the log-probability of each prompt's first choice."""
    engine = instrument.engine

    def work(batch: Prompts) -> Tensor:
        largest = engine.logits(batch).float().log_softmax(-1).amax(-1)
        return -batch.mean_over_scored(largest).cpu()[:, None]

    return over_batches(work, engine, prompts, lambda size: size.plain, memory=memory)


MAX_PROBABILITY = measuring(MaxProbability, uncertainty, lambda config: TOTAL)
