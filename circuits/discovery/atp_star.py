"""AtP* for edges: attribution in which the attention pattern is recomputed, not linearised.

A saturated softmax has no slope, so that EAP gives edges into its queries and keys a score of 0,
whatever they do.  AtP* (Kramar et al. 2024, arXiv 2403.00745) computes for each of them what its
head would attend to without it (the paper's QK fix), and takes a gradient only from there on:

    s(w -> r) = sum over pos, d of (z - z') . dm/dz,   z' = softmax(q' . k) v or softmax(q . k') v

with q' (or k') from x_r - (a_w - ablated_w), through the norm and, where there is one, the soft-cap
as they are.  All other readers (values, MLPs, logits) have the score of EAP.  An edge to keys
changes the keys of all positions at once, as it does when it is removed; one at a position, those
of that position; one to keys that several heads share, what each of them attends to.

Of the paper's AtP* this is the QK fix, carried over from nodes to edges.  GradDrop is left out: it
takes the mean of absolute scores over as many backward passes as there are layers, in each of which
one layer has no gradient; that makes scores without signs.  So are the bounds on false negatives,
which the rank correlation with exact effects (`circuits.evaluation.agreement`) stands in for.

Cost: EAP's pass and, for each layer, queries, keys and two patterns for each writer before it.

Shapes: prompts B, positions S, d_model D, head width E, writers W, readers R, heads H, key-value
heads G; c writers at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.discovery.attribution import (
    ByGradient,
    add_products,
    check_differentiable,
    check_slope,
    over_contrasts,
    scalar_of,
)
from circuits.discovery.method import Found
from circuits.engine.engine import Engine
from circuits.model.attention import attend
from circuits.objective import Batches, Contrast, Objective


@dataclass
class AtPStar(ByGradient):
    """EAP with attention patterns recomputed for queries and keys (AtP*; Kramar et al. 2024)."""

    name: str = "atp_star"


@dataclass
class Seen:
    """Of each layer in a clean run: the stream that attention reads, and dm/dz."""

    residual: dict[int, Float[Tensor, "B S D"]]
    gradient: dict[int, Float[Tensor, "B S HE"]]

    def edit(self, place: str, value: Tensor, given: Tensor) -> Tensor:
        """Keeps both on their way."""
        if place.startswith("r"):
            self.residual[int(place[1:])] = value.detach()
        if place.startswith("a") and place.endswith(".z"):
            layer = int(place[1:].removesuffix(".z"))
            value.register_hook(lambda gradient: self.gradient.update({layer: gradient}))
        return value


def atp_star(config: AtPStar, objective: Objective[Batches]) -> Found:
    """Returns the AtP* score of every edge; ValueError as `eap`."""
    check_slope(objective.metric, config.name)
    check_differentiable(objective.metric)
    engine, batches = objective.engine, objective.batches
    graph = engine.graph

    def work(batch: Contrast, scores: Tensor) -> None:
        seen, scalar = Seen({}, {}), scalar_of(objective.metric, batch)
        own = torch.zeros_like(scores)
        gradients = engine.reader_gradients(
            batch.prompts, batch.embedded, scalar, rule=config.rule, edit=seen.edit
        )
        add_products(own, graph, gradients, batch.values)
        each = batches.footprint.recomputed * len(batch.prompts)
        most = max(1, (batches.work - batch.values.nbytes) // each)
        for layer in range(graph.n_layers):
            first, n_sides = graph.first_reader(layer), graph.n_heads + graph.kv_heads
            for writers, found in _recomputed(engine, batch, seen, layer, most):
                own[first : first + n_sides, writers] = found.to(own.dtype)
        scores += own

    return Found(over_contrasts(objective, config.name, work))


@torch.no_grad()
def _recomputed(
    engine: Engine, batch: Contrast, seen: Seen, layer: int, most: int
) -> Iterator[tuple[slice, Float[Tensor, "r c *S"]]]:
    """Yields some writers, and the scores of their edges to queries, then keys, of a layer."""
    graph, architecture = engine.graph, engine.architecture
    block = architecture.blocks[layer]
    attention, x = block.attention, seen.residual[layer]
    at_z = seen.gradient[layer].unflatten(-1, (graph.n_heads, -1)).movedim(-2, 0)  # [H, B, S, E]
    q, k, v = architecture.sides(attention, block.norm1(x))
    mask = None if graph.causal else batch.prompts.key_mask
    z = attend(architecture, attention, q, k, v, mask)

    def effects(q: Tensor, k: Tensor, count: int) -> Float[Tensor, "H c S"]:
        """At each query, of `count` sets of queries and keys [heads, c * B, S, E]."""
        keys = None if mask is None else mask.repeat(count, 1)
        moved = attend(architecture, attention, q, k, _times(v, count), keys)
        gone = z[:, None] - moved.unflatten(1, (count, -1))  # [H, c, B, S, E]
        return torch.einsum("hcbse,hbse->hcs", gone, at_z)

    before = graph.upstream[graph.first_reader(layer)]
    for start in range(0, before, most):
        writers = slice(start, min(start + most, before))
        count = writers.stop - writers.start
        without = block.norm1(x - batch.values[writers]).flatten(0, 1)  # [c B, S, D]
        other_q, other_k, _ = architecture.sides(attention, without)
        by_query = effects(other_q, _times(k, count), count)
        if graph.n_positions is None:
            by_query = by_query.sum(-1)
            by_key = effects(_times(q, count), other_k, count).sum(-1)
        else:
            by_key = torch.stack(
                [
                    effects(_times(q, count), _at(other_k, _times(k, count), place), count).sum(-1)
                    for place in range(graph.n_positions)
                ],
                -1,
            )
        by_key = by_key.unflatten(0, (graph.kv_heads, graph.kv_group)).sum(1)
        yield writers, torch.cat([by_query, by_key])


def _times(side: Float[Tensor, "heads B S E"], count: int) -> Float[Tensor, "heads cB S E"]:
    return side.repeat(1, count, 1, 1)


def _at(other: Tensor, own: Tensor, place: int) -> Float[Tensor, "heads cB S E"]:
    """Own keys, and other ones at one position."""
    mixed = own.clone()
    mixed[:, :, place] = other[:, :, place]
    return mixed
