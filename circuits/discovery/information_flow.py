"""Information flow routes: how much of what a reader reads comes from each writer.

With y the residual stream that a reader reads at a position, the sum of all writers and biases
before it, the proximity of writer w is

    max(|y|_1 - |y - a_w|_1, 0)

and its score the share of that in the sum over writers, averaged over positions and prompts
(Ferrando and Voita 2024, arXiv 2403.00824, equation 3, as MIB carries it over to edges).  It needs
no gradient, no metric and no corrupt input: one clean run.  All readers of one layer's attention
read the same, and have the same scores.

What `logits` reads counts at scored positions only, everything else at every token of a prompt.
Scores of a reader add up to 1 (0 where no writer is near), so that they compare writers of one
reader; they estimate no effect and know no sign.

Shapes: prompts B, positions S, d_model D, writers W, readers R, scored positions P.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.discovery.method import Found
from circuits.graph import Graph
from circuits.objective import Batches, Objective
from circuits.prompts import Prompts


@dataclass
class InformationFlow:
    """Information flow routes: nearness of writers to what is read (Ferrando and Voita 2024)."""

    name: str = "information_flow"


@torch.no_grad()
def information_flow(config: InformationFlow, objective: Objective[Batches]) -> Found:
    """Returns the mean share of each writer in what each reader reads."""
    engine, batches, n_prompts = objective.engine, objective.batches, 0
    graph = engine.graph
    scores = torch.zeros(graph.exists.shape, dtype=torch.float32, device=engine.device)
    progress = {"total": len(batches), "desc": config.name, "unit": "batch", "disable": None}
    for prompts in tqdm(batches.prompts, **progress):
        prompts = prompts.to(engine.device)
        n_prompts += len(prompts)
        real, scored = prompts.key_mask, _scored(prompts)
        writers = engine.clean(prompts).writers
        levels = engine.ablated(writers).base
        for first, last, level in _levels(graph):
            count, y = graph.upstream[first], levels[level]
            counted = scored if first == len(graph.readers) - 1 else real
            shares = _shares(writers[:count], y) * counted
            if graph.n_positions is None:
                shares = shares.sum(-1) / counted.sum(-1)
            scores[first:last, :count] += shares.sum(1)
    return Found((scores / n_prompts).cpu())


def _shares(writers: Float[Tensor, "w B S D"], y: Float[Tensor, "B S D"]) -> Float[Tensor, "w B S"]:
    size = y.abs().sum(-1)
    near = torch.stack([size - (y - written).abs().sum(-1) for written in writers]).clamp(min=0)
    return near / near.sum(0).clamp(min=torch.finfo(near.dtype).tiny)


def _scored(prompts: Prompts) -> Bool[Tensor, "B S"]:
    """Where a prompt is scored."""
    there = torch.arange(prompts.clean.shape[1], device=prompts.clean.device)
    return (prompts.positions[..., None] == there).any(1)


def _levels(graph: Graph) -> list[tuple[int, int, int]]:
    """Readers that read the same, from one to before another, and their level of `Ablated.base`."""
    levels = []
    for layer in range(graph.n_layers):
        first, after = graph.first_reader(layer), graph.first_reader(layer + 1)
        mlp = after - (not graph.attention_only)
        levels.append((first, mlp, 2 * layer))
        if mlp < after:
            levels.append((mlp, after, 2 * layer + 1))
    return [*levels, (len(graph.readers) - 1, len(graph.readers), 2 * graph.n_layers)]
