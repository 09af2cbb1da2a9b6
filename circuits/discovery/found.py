"""What a discovery method returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Found:
    """Scores of all edges and, from methods that decide themselves, the kept ones.

    A positive score supports the behaviour.  Entries of edges that cannot exist are 0.
    """

    scores: Float[Tensor, "R W *S"]
    kept: Bool[Tensor, "R W *S"] | None = None
    details: dict = field(default_factory=dict)
