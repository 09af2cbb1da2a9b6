"""What an ablation takes values of: rows of numbers at every position of a run.

By default the rows are writers.  Whatever else can be read of a plain run can be ablated alike.

Shapes: prompts B, positions S, rows W, numbers D.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor

from circuits.engine.engine import Engine
from circuits.engine.memory import Footprint
from circuits.prompts.prompts import Prompts


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


class Writers(Source):
    """What every writer writes."""

    def shape(self, engine: Engine) -> tuple[int, int]:
        return len(engine.graph.writers), engine.architecture.width

    def read(self, engine: Engine, prompts: Prompts) -> Float[Tensor, "W B S D"]:
        return engine.writers(prompts)

    def footprint(self, size: Footprint) -> int:
        return size.clean


WRITERS = Writers()
