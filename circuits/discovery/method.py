"""What a discovery method is, and what it returns.

Shapes: `*E` the axes of a mask: [R, W, *S] of edges, [U, *S] of units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from circuits.ablation import Ablation
from circuits.mask_distribution import MaskDistribution
from circuits.objective import Objective


@dataclass(frozen=True)
class Found:
    """Scores of all edges (or units) and, from methods that decide themselves, the kept ones.

    A positive score supports the behaviour.  Entries of edges that cannot exist are 0.
    """

    scores: Float[Tensor, "*E"]
    kept: Bool[Tensor, "*E"] | None = None
    details: dict = field(default_factory=dict)
    # of learned masks: the trained one that a circuit of so many edges was taken from
    trained: Callable[[int], MaskDistribution] | None = None
    ablation: Ablation | None = None  # with constants that were trained along with a mask


@dataclass(frozen=True)
class Method:
    """A discovery method: its configuration and what runs it."""

    schema: type  # a dataclass, whose `name` is the method's
    run: Callable[[Any, Objective], Found]
    decides: bool = False  # which edges to keep, so that no selection follows
    needs_slope: bool = False  # of the metric at the clean run, where KL has none
    estimates: bool = False  # what removals do, to be compared with what they really do
    over_units: Callable[[Any, Objective], Found] | None = None  # the same over units; None: none
