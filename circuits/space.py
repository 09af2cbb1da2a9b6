"""What a mask is over: the edges of a graph (`circuits.graph`), or units (`circuits.parts`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor


class Space(ABC):
    """The parts that a circuit may keep, each at an index of a tensor.

    Shapes: `*E` the axes of a mask, [R, W, *S] of edges and [U, *S] of units.
    """

    noun: ClassVar[str]  # what the parts are called

    @cached_property
    @abstractmethod
    def exists(self) -> Bool[Tensor, "*E"]:
        """True where there is a part."""

    @property
    @abstractmethod
    def n_parts(self) -> int:
        """How many there are."""

    @abstractmethod
    def to_json(self) -> dict:
        """What tells it apart from others, as JSON can say it."""

    @abstractmethod
    def part_name(self, *index: int) -> str:
        """The name of the part at an index."""

    @abstractmethod
    def without_dead_ends(self, kept: Bool[Tensor, "*E"]) -> Bool[Tensor, "*E"]:
        """The kept parts that lie on a way from an input to the logits."""
