"""Where a mask starts: all gates alike, or by the rank of scores that another method gave.

By rank the gate of rank r = 1, 2, ... of n is open with probability 1 / (1 + (r / r0)^2), where r0
is a tenth of n: a start at about a sixth of all edges, in the order of the scores.

Shapes: `*E` the axes of a mask, [R, W, *S] of edges and [U, *S] of units.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.discovery.masks.settings import MaskTraining
from circuits.gates import gate_shapes
from circuits.objective import Objective
from circuits.space import Space

NOISE = 0.01  # standard deviation of the first parameters
HALF = 0.1  # the gate of this rank, as a share of all, is open half of the time


def first_parameters(config: MaskTraining, objective: Objective, over: str) -> dict[str, Tensor]:
    """Theta of each gate before the first step; ValueError where a warm start is not to be had.

    With several kinds of gates the first is started by rank, the others are all alike.
    """
    engine = objective.engine
    generator = torch.Generator().manual_seed(config.seed)
    parameters = {
        name: config.initial + NOISE * torch.randn(shape, generator=generator)
        for name, shape in gate_shapes(objective.space, over).items()
    }
    if config.warm_start is not None:
        first = next(iter(parameters))
        scores = _scores(config.warm_start, objective)
        parameters[first] += by_rank(objective.space, scores, parameters[first]) - config.initial
    return {name: theta.to(engine.device) for name, theta in parameters.items()}


def by_rank(space: Space, scores: Float[Tensor, "*E"], like: Tensor) -> Tensor:
    """Theta of gates, shaped as `like`, by the best |score| of a part that each of them gates."""
    exists = space.exists
    best = scores.abs().float().masked_fill(~exists, -1.0)
    own = best if like.shape == best.shape else best.amax(0, keepdim=True)
    order = own.flatten().argsort(descending=True, stable=True)
    rank = torch.empty(own.numel())
    rank[order] = torch.arange(1, own.numel() + 1, dtype=rank.dtype)
    half = HALF * (space.n_parts if own.shape == best.shape else own.numel())
    return (-2 * (rank / half).log()).view(own.shape)


def _scores(source: str, objective: Objective) -> Float[Tensor, "*E"]:
    """The scores of a method run on the same objective, or those of a saved circuit."""
    from circuits.discovery import METHODS
    from circuits.parts.circuit import load_circuit
    from circuits.parts.over import discovered

    names = [
        name for name, method in METHODS.items() if not issubclass(method.schema, MaskTraining)
    ]
    if source in names:
        return discovered(METHODS[source].schema(), objective).scores
    if not Path(source).exists():
        raise ValueError(
            f"warm_start={source!r} is no method that scores ({', '.join(names)}) and no run folder"
        )
    circuit, space = load_circuit(source), objective.space
    if circuit.space != space:
        theirs = circuit.space
        raise ValueError(
            f"warm_start={source!r} has scores of {theirs.n_parts} {theirs.noun}, of another model "
            f"than this with {space.n_parts} {space.noun}, or divided otherwise; take a run on the "
            "same model, with the same units and positions"
        )
    return circuit.scores
