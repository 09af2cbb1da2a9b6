"""Stability: how much of a circuit is found again on redrawn prompts.

    J(A, B) = |A and B| / |A or B|      of edges; 1: the same circuit

Prompts are drawn with replacement from those that the circuit was found on, as many as there were
(the bootstrap), and the circuit is looked for again in the same way.  What changes is what the
sample of prompts decides.

Shapes: readers R, writers W; `*S` positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm.auto import tqdm

from circuits.circuit import Circuit
from circuits.engine import Engine
from circuits.extraction import rediscover
from circuits.prompts import Prompts


def redrawn(prompts: Prompts, count: int, seed: int) -> Prompts:
    """Returns so many of some prompts, drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    return prompts.select(torch.randint(len(prompts), (count,), generator=generator))


def stability(
    circuit: Circuit,
    engine: Engine,
    discovery: Prompts,
    chance: Sequence[Bool[Tensor, "R W *S"]],
    *,
    redraws: int,
    seed: int = 0,
    memory: str = "2GB",
) -> dict[str, Any]:
    """Returns the overlap of a circuit with those found on redrawn prompts, and with random ones.

    Args:
        discovery: the prompts that it was found on.
        chance: random circuits of its size.
        redraws: how often it is looked for again.
        seed: of the redrawn prompts.

    Raises:
        ValueError: there is one prompt, or the circuit does not say how it was found.
    """
    if len(discovery) < 2:
        raise ValueError(
            f"redraws={redraws} needs at least 2 discovery prompts to redraw, but there is "
            f"{len(discovery)}; give more, or redraws=0"
        )
    seeds = range(seed + 1, seed + 1 + redraws)
    found = [
        rediscover(circuit, engine, redrawn(discovery, len(discovery), draw), memory=memory)
        for draw in tqdm(seeds, desc="redraws", unit="circuit", disable=None)
    ]
    own = [jaccard(circuit.kept, other) for other in found]
    among = [jaccard(*pair) for pair in combinations(found, 2)]
    always = torch.stack([circuit.kept, *found]).all(0)
    return {
        "redraws": redraws,
        "edges": [int(other.sum()) for other in found],
        "jaccard": own,
        "mean": _mean(own),
        "error": torch.tensor(own).std().item() / redraws**0.5 if redraws > 1 else None,
        "among_redraws": _mean(among),
        "found_always": int(always.sum()),
        "of_random_circuits": _mean([jaccard(circuit.kept, other) for other in chance]),
    }


def jaccard(one: Bool[Tensor, "R W *S"], other: Bool[Tensor, "R W *S"]) -> float:
    """Returns the shared edges as a share of those of either; 1 for two empty circuits."""
    either = int((one | other).sum())
    return int((one & other).sum()) / either if either else 1.0


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
