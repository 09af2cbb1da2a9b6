"""Work on prompts, as many at a time as a memory budget allows.

Whatever is done prompt by prompt goes through here, so that `memory=` holds everywhere, and so that
this is the one place where prompts could be spread over several devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from circuits.engine.engine import Engine
from circuits.engine.memory import Footprint, footprint, most_prompts, parse_memory
from circuits.prompts.prompts import Prompts

Result = TypeVar("Result")
Bytes = Callable[[Footprint], int]


def in_batches(
    engine: Engine, prompts: Prompts, each: Bytes, *, memory: str, shared: Bytes = lambda _: 0
) -> Iterator[Prompts]:
    """Yields prompts in order, on the engine's device, as many at a time as fit.

    Args:
        each: bytes that the work on one prompt takes at most.
        memory: working memory beside the model's own weights, such as 500MB.
        shared: bytes that it takes besides, however many prompts there are.

    Raises:
        TooLittleMemory: not even one prompt fits.
    """
    size = footprint(engine, prompts)
    count = most_prompts(prompts, each(size), parse_memory(memory), shared(size))
    return (batch.to(engine.device) for batch in prompts.batches(count))


def over_batches(
    work: Callable[[Prompts], Result],
    engine: Engine,
    prompts: Prompts,
    each: Bytes,
    *,
    memory: str,
    shared: Bytes = lambda _: 0,
) -> Result:
    """Returns what `work` makes of all prompts: its results of batches (see `in_batches`) joined.

    A result is a tensor with prompts along its first axis, or a dataclass of such tensors, whose
    other fields are the same for all batches.
    """
    batches = in_batches(engine, prompts, each, memory=memory, shared=shared)
    return joined([work(batch) for batch in batches])


def joined(parts: list[Any]) -> Any:
    """Tensors, or dataclasses of tensors, one after the other along the first axis."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if is_dataclass(first):
        columns = {one.name: [getattr(part, one.name) for part in parts] for one in fields(first)}
        return type(first)(**{name: joined(values) for name, values in columns.items()})
    return first
