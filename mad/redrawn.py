"""More circuits of the same behaviour, found in the same way on trusted prompts that are redrawn.

A circuit that keeps an edge it does not need is blind to what comes over that edge, and greedy
discovery keeps some such edges.  Which ones is a matter of the prompts that it sees.

Shapes: circuits C, readers R, writers W; `*S` positions, where edges are told apart by position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.circuit import Circuit
from circuits.engine import Engine
from circuits.evaluation.stability import redrawn
from circuits.extraction import rediscover
from circuits.prompts import Prompts


def further_circuits(
    circuit: Circuit, engine: Engine, trusted: Prompts, count: int, *, memory: str = "2GB"
) -> list[Bool[Tensor, "R W *S"]]:
    """Returns circuits found by a circuit's method on as many redrawn prompts as it was found on.

    Raises:
        ValueError: the circuit does not say how it was found, or there are too few prompts.
    """
    if count and len(trusted) < 2:
        raise ValueError(
            f"circuits={count + 1} needs at least 2 trusted prompts to redraw, but there are "
            f"{len(trusted)}; give more, or lower circuits"
        )
    discovery = circuit.about.get("splits", {}).get("discovery", {})
    n_prompts = min(len(trusted), discovery.get("prompts", len(trusted)))
    draws = (redrawn(trusted, n_prompts, seed) for seed in range(1, count + 1))
    return [rediscover(circuit, engine, drawn, memory=memory) for drawn in draws]


def restored_masks(
    circuit: Circuit, circuits: int, state: Mapping[str, Tensor]
) -> Float[Tensor, "C R W *S"]:
    """Returns the masks of a circuit and of the further ones that were saved.

    Raises:
        TypeError: there are not so many circuits, or they are of another graph.
    """
    shape = (circuits - 1, *circuit.mask.shape)
    masks = state.get("masks", torch.zeros(0, *shape[1:], dtype=torch.bool))
    if masks.shape != shape or masks.dtype != torch.bool:
        raise TypeError(
            f"masks is {masks.dtype} of shape {tuple(masks.shape)}, not bool of {shape}"
        )
    return stacked(circuit, [*masks])


def stacked(circuit: Circuit, further: Sequence[Tensor]) -> Float[Tensor, "C R W *S"]:
    """Returns the masks of a circuit and of further ones."""
    return torch.stack([circuit.mask, *(mask.float() for mask in further)])
