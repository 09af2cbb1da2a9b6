"""ACDC: a greedy sweep that removes every edge whose absence does not matter (Conmy et al. 2023,
arXiv 2304.14997, Algorithm 1).

All edges are present.  The sweep goes from the output to the input (`Graph.sweep_order`: layer
descending, logits > mlp > v > k > q, head descending, writer descending).  Edge e is removed for
good iff

    delta = cost(without e) - cost(now) < tau

and then cost(now) becomes cost(without e).  The cost is the negated, oriented metric: KL(model ||
run) in the paper.  A node that no kept edge reads loses all of its incoming edges unevaluated.

Several edges ahead are run at once, each without those before it that are expected to be removed.
What is decided is right as far as expectations were: up to the first edge that the rule decides
otherwise.  So the circuit is that of a sweep with one run an edge (`sweeping`).

Metrics differ in size (a logit difference of 10 beside a KL of 2), so that by default tau is a
share of the gap between the model and the empty circuit.  The sweep starts from the run that keeps
all edges, which rounding sets apart from the model itself: in bfloat16 by more than a small tau.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.discovery.method import Found
from circuits.discovery.removals import Removals
from circuits.discovery.sweeping import Sweep, sweep_order
from circuits.engine.candidates import Edge
from circuits.objective import Objective

log = logging.getLogger(__name__)


@dataclass
class ACDC:
    """Automatic circuit discovery (Conmy et al. 2023)."""

    name: str = "acdc"
    # an edge is removed iff the metric worsens by less than this, in its units; null: by `share`
    tau: float | None = None
    share: float = 0.01  # tau as a share of the metric's gap between model and empty circuit
    # several thresholds, in its units, in place of one: each is swept, an edge's score is the
    # smallest at which it was removed, and the circuit is that of the first
    taus: list[float] | None = None
    order: str = "sweep"  # sweep: the fixed order; shuffle: random within each reader, by `seed`
    seed: int = 0  # of the shuffled order


def acdc(config: ACDC, objective: Objective) -> Found:
    """Returns the circuit of the sweep; an edge's score is the delta at which it was judged.

    With `taus` the circuit is that of the first, and an edge's score the smallest tau at which it
    was removed; of those that the largest one keeps it is the delta there, which is no less.

    Raises:
        ValueError: tau or share is not above 0, the order is unknown, or tau would be a share of no
            gap because the empty circuit is as good as the model.
    """
    _check(config)
    _warn_of_memory(objective)
    graph = objective.engine.graph
    order = sweep_order(graph, config.seed if config.order == "shuffle" else None)
    if config.taus is None:
        tau = _tau(config, objective, _cost(objective.full()))
        sweep, forwards = swept(objective, order, tau)
        deltas, kept = torch.from_numpy(sweep.deltas).float(), torch.from_numpy(sweep.kept)
        return Found(deltas, kept, _details(sweep, forwards))
    sweeps: dict[float, Sweep] = {}
    forecast, details = None, []
    for tau in sorted(config.taus):
        sweeps[tau], forwards = swept(objective, order, tau, forecast)
        forecast = sweeps[tau].judgements
        told = {"edges": int(sweeps[tau].kept.sum()), **_details(sweeps[tau], forwards)}
        details.append(told)
    first = torch.from_numpy(sweeps[config.taus[0]].kept)
    return Found(smallest_taus(sweeps), first, {"tau": config.taus[0], "taus": details})


def swept(
    objective: Objective,
    order: Sequence[Edge],
    tau: float,
    forecast: Float[np.ndarray, "R W *S"] | None = None,
) -> tuple[Sweep, float]:
    """Returns a sweep that is done, and what its runs took, in plain forwards.

    `forecast` are deltas that edges are expected to have: they cost or save runs, and change
    nothing else.
    """
    graph = objective.engine.graph
    removals = Removals(objective, graph.exists)
    sweep = Sweep(graph, order, tau, _cost(removals.present()), forecast)
    _warn_of_noise(objective, abs(sweep.cost - _cost(objective.full())), tau)
    with tqdm(total=graph.n_edges, desc="acdc", unit="edge", disable=None) as progress:
        while (window := sweep.ahead(removals.most)).edges:
            costs = -removals.without(window.edges, window.removed).double().mean(-1)
            last = sweep.judge(window, costs.tolist())
            if last is not None:
                removals.accept(last)
            progress.update(sweep.at - progress.n)
        progress.update(graph.n_edges - progress.n)
    return sweep, removals.forwards


def _details(sweep: Sweep, forwards: float) -> dict[str, float]:
    """What is told of a sweep."""
    return {
        "tau": sweep.tau,
        "runs": sweep.judged,  # that one run an edge would be
        "batched_runs": sweep.windows,
        "candidates": sweep.candidates,  # in them
        "forwards": forwards,
        "closest_to_tau": sweep.closest,
        "final_cost": sweep.cost,
    }


def smallest_taus(sweeps: Mapping[float, Sweep]) -> Float[Tensor, "R W *S"]:
    """The smallest tau at which each edge was removed; or its delta at the largest, if kept."""
    largest = sweeps[max(sweeps)]
    scores = np.where(largest.kept, largest.deltas, 0.0)
    for tau in sorted(sweeps, reverse=True):
        scores[~sweeps[tau].kept & largest.graph.exists.numpy()] = tau
    return torch.from_numpy(scores).float()


def _check(config: ACDC) -> None:
    if config.taus is not None and (config.tau is not None or not config.taus):
        raise ValueError(
            f"taus={list(config.taus)} and tau={config.tau}: give several taus, the circuit's "
            "first, or one tau"
        )
    given = {"tau": config.tau, "share": config.share}
    given |= {f"taus[{place}]": value for place, value in enumerate(config.taus or ())}
    for name, value in given.items():
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
