"""Exact effects: m(model) - m(model without one edge, or unit), one run for each.

What attribution estimates.  A run for an edge starts at its reader's block, from the model's own
values before it, and several edges of a block are run at once, as many as fit in memory: on average
half a forward pass an edge.

Shapes: parts n, edges or units; `*E` the axes of a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from circuits.discovery.method import Found
from circuits.graph import Graph
from circuits.objective import Objective
from circuits.space import Space

MOST_RUNS = 20_000
MASKS = 64  # handed on at once; how many are run at once is for memory to say


@dataclass
class Exact:
    """The effect of each removal, measured: one run an edge (or unit); for small models."""

    name: str = "exact"


def exact(config: Exact, objective: Objective) -> Found:
    """Returns the effect of removing each edge (or unit) from the full model.

    Raises:
        ValueError: there are too many.
    """
    space = objective.space
    if space.n_parts > MOST_RUNS:
        raise ValueError(
            f"{space.n_parts} {space.noun} take as many runs, more than {MOST_RUNS}; use "
            f"method=eap_ig, or a smaller model or part of it"
        )
    parts = space.exists.nonzero()
    scores = torch.zeros(space.exists.shape)
    scores[tuple(parts.T)] = effects(objective, parts)
    return Found(scores)


def effects(objective: Objective, parts: Int[Tensor, "n axes"]) -> Float[Tensor, "n"]:
    """Returns m(model) - m(model without it), higher m better, of each edge or unit."""
    space = objective.space
    found = torch.zeros(len(parts))
    with tqdm(total=len(parts), desc="exact", unit="run", disable=None) as progress:
        layers = _layers(space, parts)
        for layer in layers.unique().tolist():
            rows = (layers == layer).nonzero()[:, 0]
            whole = objective.measure(space.exists.double(), first_layer=layer)
            full = whole.double().mean()  # a run under a mask, rounded as the others are
            for some in rows.split(MASKS):
                masks = space.exists.repeat(len(some), *(1 for _ in space.exists.shape))
                masks[(torch.arange(len(some)), *parts[some].T)] = False
                without = objective.measure(masks, first_layer=layer).double().mean(-1)
                found[some] = (full - without).float().cpu()
                progress.update(len(some))
    return found


def _layers(space: Space, parts: Int[Tensor, "n axes"]) -> Int[Tensor, "n"]:
    """The first block that a run without each part has to run."""
    if not isinstance(space, Graph):
        return torch.zeros(len(parts), dtype=torch.long)
    return (parts[:, 0] // space.readers_per_block).clamp(max=space.n_layers)
