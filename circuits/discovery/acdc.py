"""ACDC: a greedy sweep that removes every edge whose absence does not matter (Conmy et al. 2023,
arXiv 2304.14997, Algorithm 1).

All edges are present.  The sweep goes from the output to the input (`Graph.sweep_order`: layer
descending, logits > mlp > v > k > q, head descending, writer descending).  Edge e is removed for
good iff

    delta = cost(without e) - cost(now) < tau

and then cost(now) becomes cost(without e).  The cost is the negated, oriented metric: KL(model ||
run) in the paper.  A node that no kept edge reads loses all of its incoming edges unevaluated.

Metrics differ in size (a logit difference of 10 beside a KL of 2), so that by default tau is a
share of the gap between the model and the empty circuit.  The sweep starts from the run that keeps
all edges, which rounding sets apart from the model itself: in bfloat16 by more than a small tau.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.discovery.method import Found
from circuits.objective import Objective

log = logging.getLogger(__name__)


@dataclass
class ACDC:
    """Automatic circuit discovery (Conmy et al. 2023)."""

    name: str = "acdc"
    # an edge is removed iff the metric worsens by less than this, in its units; null: by `share`
    tau: float | None = None
    share: float = 0.01  # tau as a share of the metric's gap between model and empty circuit
    order: str = "sweep"  # sweep: the fixed order; shuffle: random within each reader, by `seed`
    seed: int = 0  # of the shuffled order


def acdc(config: ACDC, objective: Objective) -> Found:
    """Returns the circuit of the sweep; an edge's score is the delta at which it was judged.

    Raises:
        ValueError: tau or share is not above 0, the order is unknown, or tau would be a share of no
            gap because the empty circuit is as good as the model.
    """
    _check(config)
    _warn_of_memory(objective)
    graph = objective.engine.graph
    kept = graph.exists.clone()
    scores = torch.zeros(kept.shape)
    full, current = _cost(objective.full()), _cost(objective.measure(kept))
    tau = _tau(config, objective, full)
    _warn_of_noise(objective, abs(current - full), tau)
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
            without = _cost(objective.measure(kept, first_layer=layer))
            delta = without - current
            scores[edge] = delta
            evaluated += 1
            closest = min(closest, abs(delta - tau))
            if delta < tau:
                current = without
            else:
                kept[edge] = True
    progress.close()
    details = {"tau": tau, "runs": evaluated, "closest_to_tau": closest, "final_cost": current}
    return Found(scores=scores, kept=kept, details=details)


def _check(config: ACDC) -> None:
    for name in ("tau", "share"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(
                f"{name}={value}, but it must be above 0: with {name} <= 0 every harmless edge is "
                "kept"
            )
    if config.order not in ("sweep", "shuffle"):
        raise ValueError(f"order={config.order!r}, but the orders are sweep, shuffle")


def _cost(oriented: Float[Tensor, "N"]) -> float:
    return -oriented.double().mean().item()


def _tau(config: ACDC, objective: Objective, full: float) -> float:
    """The threshold in units of the metric; `full` is the model's cost."""
    if config.tau is not None:
        return config.tau
    empty = _cost(objective.empty())
    if not empty > full:
        raise ValueError(
            f"by {objective.metric.name} the empty circuit ({-empty:.3g}, higher is better) is as "
            f"good as the model ({-full:.3g}), so that method.share={config.share} of the gap is "
            "no threshold; give method.tau in units of the metric, or use another metric or "
            "ablation"
        )
    return config.share * (empty - full)


def _warn_of_memory(objective: Objective) -> None:
    batches = objective.batches
    if len(batches.kept) < len(batches):
        log.warning(
            "acdc passes over the prompts thousands of times, and memory keeps only %d of %d "
            "batches prepared, so that each pass prepares the others anew; raise memory, or use "
            "fewer prompts",
            len(batches.kept),
            len(batches),
        )


def _warn_of_noise(objective: Objective, noise: float, tau: float) -> None:
    """Warns where rounding alone changes the metric by a tenth of tau or more."""
    if noise >= tau / 10:
        log.warning(
            "in %s the run that keeps every edge is %.2g from the model by %s, beside tau=%.2g, so "
            "that edges near it are judged by rounding; use dtype=float32, or a higher method.tau",
            str(objective.engine.dtype).removeprefix("torch."),
            noise,
            objective.metric.name,
            tau,
        )
