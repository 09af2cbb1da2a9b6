"""What an ablation takes values of: rows of numbers at every position of a run.

By default the rows are writers.  Whatever else can be read of a plain run can be ablated alike.

Shapes: prompts B, positions S, rows W, numbers D, scored positions P, vocabulary V; `*E` the axes
of a mask.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Float
from torch import Tensor

from circuits.engine.engine import Engine
from circuits.engine.masked import Ablated
from circuits.engine.memory import Footprint
from circuits.prompts.prompts import Prompts
from circuits.space import Space


class Source(ABC):
    """Rows of numbers that can be read of a plain run."""

    @abstractmethod
    def shape(self, engine: Engine) -> tuple[int, int]:
        """How many rows there are, and how many numbers each has at a position."""

    @abstractmethod
    def read(self, engine: Engine, prompts: Prompts) -> Float[Tensor, "W B S D"]:
        """The rows in the run on these prompts."""

    @abstractmethod
    def footprint(self, size: Footprint) -> int:
        """Bytes that reading one prompt takes."""

    @abstractmethod
    def space(self, engine: Engine) -> Space:
        """What a mask that removes rows is over."""

    @abstractmethod
    def prepared(self, engine: Engine, values: Float[Tensor, "W B S D"]) -> Any:
        """Values that removed rows are to have, ready for `under`."""

    @abstractmethod
    def under(
        self, engine: Engine, prompts: Prompts, masks: Float[Tensor, "*B_E"], ablated: Any
    ) -> Float[Tensor, "B P V"]:
        """The logits of prompts under one mask, or each under its own; differentiable in both."""

    @abstractmethod
    def gradient(self, size: Footprint) -> int:
        """Bytes that such a run of one prompt and its gradient take, beside the values."""


class Writers(Source):
    """What every writer writes."""

    def shape(self, engine: Engine) -> tuple[int, int]:
        return len(engine.graph.writers), engine.architecture.width

    def read(self, engine: Engine, prompts: Prompts) -> Float[Tensor, "W B S D"]:
        return engine.writers(prompts)

    def footprint(self, size: Footprint) -> int:
        return size.clean

    def space(self, engine: Engine) -> Space:
        return engine.graph

    def prepared(self, engine: Engine, values: Float[Tensor, "W B S D"]) -> Ablated:
        return engine.ablated(values)

    def under(
        self, engine: Engine, prompts: Prompts, masks: Float[Tensor, "*B_E"], ablated: Ablated
    ) -> Float[Tensor, "B P V"]:
        each = masks.ndim > engine.graph.exists.ndim
        return engine.masked(prompts, masks, ablated, per_example=each, closed=True)

    def gradient(self, size: Footprint) -> int:
        return size.explanation


WRITERS = Writers()
