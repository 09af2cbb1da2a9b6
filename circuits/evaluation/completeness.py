"""Completeness: whether a circuit breaks as the model breaks, and what it leaves out does nothing.

    gap(K) = |f(C without K) - f(M without K)|      K: some nodes of the circuit, drawn at random

Every edge out of the nodes of K is removed, from the circuit and from the model (Wang et al. 2022,
arXiv 2211.00593, section 4).  A circuit that leaves out a back-up breaks where the model does not.

    f(M without C)          what the edges off the circuit do by themselves: 0 where it is complete
    f(M without half)       without a random half of the edges off the circuit: 1

Shapes: circuits K, prompts N; readers R, writers W; `*S` positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.evaluation.bootstrap import Resampled, figure
from circuits.faithfulness import FaithfulnessScale
from circuits.graph import Graph


def completeness(
    scale: FaithfulnessScale,
    kept: Bool[Tensor, "R W *S"],
    chance: Sequence[Bool[Tensor, "R W *S"]],
    *,
    knockouts: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns the gaps of knock-outs, the figures of the complement, and those of random circuits.

    Args:
        chance: random circuits of the circuit's size, each of which is knocked out once.
        knockouts: how many sets of nodes are drawn; each has 1 node to half of them.
        seed: of the draws.
    """
    graph = scale.objective.engine.graph
    generator = torch.Generator().manual_seed(seed)
    drawn = [_some_nodes(graph, kept, generator) for _ in range(knockouts)]
    others = [_some_nodes(graph, mask, generator) for mask in chance[:knockouts]]
    pairs = [(kept, names) for names in drawn] + list(zip(chance, others))
    masks = [part for mask, names in pairs for part in _knocked_out(graph, mask, names)]
    masks += [graph.exists & ~kept, *(graph.exists & ~mask for mask in chance[:knockouts])]
    masks += [_without_half(graph, kept, generator) for _ in range(knockouts)]
    runs = scale.measure_each(masks, "knock-outs")
    found = scale.drawn(runs, Resampled.of(runs.shape[-1], seed))
    n_own, n_chance = len(drawn), len(others)
    broken, rest, halves = found.split([2 * (n_own + n_chance), 1 + n_chance, knockouts])
    gaps = (broken[0::2] - broken[1::2]).abs()
    return {
        "knockouts": [
            {
                "nodes": names,
                "circuit": broken[2 * place, 0].item(),
                "model": broken[2 * place + 1, 0].item(),
                "gap": asdict(figure(gaps[place])),
            }
            for place, names in enumerate(drawn)
        ],
        "gap": asdict(figure(gaps[:n_own].mean(0))) if n_own else None,
        "gap_of_random_circuits": gaps[n_own:, 0].mean().item() if n_chance else None,
        "without_circuit": asdict(figure(rest[0])),
        "without_random_circuits": rest[1:, 0].mean().item() if n_chance else None,
        "without_half_of_the_rest": asdict(figure(halves.mean(0))) if knockouts else None,
    }


def _some_nodes(
    graph: Graph, kept: Bool[Tensor, "R W *S"], generator: torch.Generator
) -> list[str]:
    """Some heads and MLPs of a circuit, at most half of them; all where there are one or none."""
    writes = kept.reshape(*kept.shape[:2], -1).any(-1).any(0)
    nodes = [n for n, name in enumerate(graph.writers) if writes[n] and n >= graph.n_inputs]
    most = max(1, len(nodes) // 2)
    count = int(torch.randint(1, most + 1, (), generator=generator))
    order = torch.randperm(len(nodes), generator=generator)[:count].sort().values
    return [graph.writers[nodes[place]] for place in order.tolist()]


def _knocked_out(
    graph: Graph, kept: Bool[Tensor, "R W *S"], nodes: list[str]
) -> tuple[Bool[Tensor, "R W *S"], Bool[Tensor, "R W *S"]]:
    """The circuit and the model, without the edges out of some nodes."""
    circuit, model = kept.clone(), graph.exists.clone()
    for name in nodes:
        circuit[:, graph.writer_index[name]] = False
        model[:, graph.writer_index[name]] = False
    return circuit, model


def _without_half(
    graph: Graph, kept: Bool[Tensor, "R W *S"], generator: torch.Generator
) -> Bool[Tensor, "R W *S"]:
    """The model without a random half of the edges off the circuit."""
    return kept | (graph.exists & (torch.rand(kept.shape, generator=generator) < 0.5))
