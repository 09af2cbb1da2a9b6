"""ACDC: a greedy sweep that removes every edge whose absence does not matter (Conmy et al. 2023,
arXiv 2304.14997, Algorithm 1).

All edges are present.  The sweep goes from the output to the input (`Graph.sweep_order`: layer
descending, logits > mlp > v > k > q, head descending, writer descending).  Edge e is removed for
good iff

    delta = cost(without e) - cost(now) < tau

and then cost(now) becomes cost(without e).  The cost is the negated, oriented metric: KL(model ||
run) in the paper.  A node that no kept edge reads loses all of its incoming edges unevaluated.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from circuits.discovery.method import Found
from circuits.objective import Objective

log = logging.getLogger(__name__)


@dataclass
class ACDC:
    """Automatic circuit discovery (Conmy et al. 2023)."""

    name: str = "acdc"
    tau: float = 0.01  # an edge is removed iff the metric worsens by less than this
    order: str = "sweep"  # sweep: the fixed order; shuffle: random within each reader, by `seed`
    seed: int = 0  # of the shuffled order


def acdc(config: ACDC, objective: Objective) -> Found:
    """Returns the circuit of the sweep; an edge's score is the delta at which it was judged.

    Raises:
        ValueError: tau is not above 0, or the order is unknown.
    """
    if not config.tau > 0:
        raise ValueError(
            f"tau={config.tau}, but it must be above 0: with tau <= 0 every harmless edge is kept"
        )
    if config.order not in ("sweep", "shuffle"):
        raise ValueError(f"order={config.order!r}, but the orders are sweep, shuffle")
    if len(objective.batches.kept) < len(objective.batches):
        log.warning(
            "acdc passes over the prompts thousands of times, and memory keeps only %d of %d "
            "batches prepared, so that each pass prepares the others anew; raise memory, or use "
            "fewer prompts",
            len(objective.batches.kept),
            len(objective.batches),
        )
    graph = objective.engine.graph
    kept = graph.exists.clone()
    scores = torch.zeros(kept.shape)
    current = -objective.full().double().mean().item()
    evaluated, closest = 0, float("inf")
    generator = np.random.default_rng(config.seed)
    progress = tqdm(total=graph.n_edges, desc="acdc", unit="edge", disable=None)
    for reader, group in itertools.groupby(graph.sweep_order(), key=lambda edge: edge[0]):
        edges = list(group)
        progress.update(len(edges))
        _, read = graph.read(kept[None])
        kept[reader] &= read[0, reader].view(kept.shape[2:])  # unread nodes need no input
        edges = [edge for edge in edges if kept[edge]]
        layer = min(reader // graph.readers_per_block, graph.n_layers)  # what is before is whole
        if config.order == "shuffle":
            generator.shuffle(edges)
        for edge in edges:
            kept[edge] = False
            without = -objective.measure(kept, first_layer=layer).double().mean().item()
            delta = without - current
            scores[edge] = delta
            evaluated += 1
            closest = min(closest, abs(delta - config.tau))
            if delta < config.tau:
                current = without
            else:
                kept[edge] = True
    progress.close()
    details = {"runs": evaluated, "closest_to_tau": closest, "final_cost": current}
    return Found(scores=scores, kept=kept, details=details)
