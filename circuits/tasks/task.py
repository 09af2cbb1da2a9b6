"""What a task family is to the rest of the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Task:
    """A generator of prompt records (`circuits.prompts`), with the dataclass that configures it."""

    name: str
    schema: type
    # generate(config, count, seed): different records, the same ones for the same seed
    generate: Callable[[Any, int, int], list[dict]]
