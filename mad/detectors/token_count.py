"""The number of tokens: what can be had without looking at the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from circuits.prompts import Prompts
from mad.detector import Context


@dataclass
class TokenCount:
    """How long the prompt is."""

    name: str = "token_count"

    def check(self) -> None:
        """There is nothing to get wrong."""


@dataclass(frozen=True)
class TokenCountDetector:
    """How long prompts are."""

    config: TokenCount
    circuit = None
    scores_under = None

    def score(self, prompts: Prompts, *, memory: str = "2GB") -> Float[Tensor, "B"]:
        """The number of tokens."""
        return prompts.lengths.float().cpu()

    def state(self) -> dict[str, Tensor]:
        """Nothing was fitted."""
        return {}


def fit_token_count(
    config: TokenCount, context: Context, trusted: Prompts, *, memory: str = "2GB"
) -> TokenCountDetector:
    """Returns the detector; trusted prompts only calibrate it."""
    return TokenCountDetector(config)


def restore_token_count(
    config: TokenCount, context: Context, state: Mapping[str, Tensor], *, memory: str = "2GB"
) -> TokenCountDetector:
    """Returns a saved detector."""
    return TokenCountDetector(config)
