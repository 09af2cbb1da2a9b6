"""What a mask is over: the edges of a graph (`circuits.graph`), or units (`circuits.parts`)."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Bool
from torch import Tensor


@runtime_checkable
class Space(Protocol):
    """The parts that a circuit may keep, each at an index of a tensor.

    Shapes: `*E` the axes of a mask, [R, W, *S] of edges and [U, *S] of units.
    """

    @property
    def noun(self) -> str:
        """What the parts are called: edges or units."""
        ...

    @property
    def exists(self) -> Bool[Tensor, "*E"]:
        """True where there is a part."""
        ...

    @property
    def n_parts(self) -> int:
        """How many there are."""
        ...

    def part_name(self, *index: int) -> str:
        """The name of the part at an index."""
        ...

    def without_dead_ends(self, kept: Bool[Tensor, "*E"]) -> Bool[Tensor, "*E"]:
        """The kept parts that the logits can depend on."""
        ...
