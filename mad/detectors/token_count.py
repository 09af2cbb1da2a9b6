"""The number of tokens: what can be had without looking at the model."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from circuits.prompts import Prompts
from mad.detectors.measured import Instrument, measuring
from mad.statistics import TOTAL


@dataclass
class TokenCount:
    """How long the prompt is."""

    name: str = "token_count"

    def check(self) -> None:
        """There is nothing to get wrong."""


def token_count(instrument: Instrument, prompts: Prompts, memory: str) -> Float[Tensor, "B 1"]:
    """Returns the number of tokens of each prompt."""
    return prompts.lengths[:, None].float().cpu()


TOKEN_COUNT = measuring(TokenCount, token_count, lambda config: TOTAL)
