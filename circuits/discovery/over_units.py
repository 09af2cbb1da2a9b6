"""Discovery over units: nodes, neurons and features (`circuits.parts`) in place of edges.

The score of a unit is the gradient of the metric in its mask at all ones,

    s(u) = sum over pos and the unit's numbers of (n - n_ablated) . dm/dn

per prompt, then averaged; units told apart by position have no sum over pos.  For a feature f,
with the site's value sum_f z_f d_f + ..., dm/dz_f = d_f . dm/dvalue: attribution of sparse features
(Marks et al. 2024, arXiv 2403.19647).  With integrated gradients dm/dn is the mean over runs whose
input embedding lies between the ablated and the clean one, as for edges (`.attribution`).

`score(u)` estimates m(model) - m(model without u) with higher m better.

Shapes: prompts B, positions S, units U; `*S` positions, where units are told apart by position.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from circuits.discovery.acdc import ACDC, _check, _cost, _tau, _warn_of_memory, _warn_of_noise
from circuits.discovery.attribution import (
    EAP,
    EAPIG,
    CleanCorrupt,
    check_differentiable,
    points_of,
)
from circuits.discovery.method import Found
from circuits.objective import Objective
from circuits.parts.objective import UnitBatches


def attribution_units(
    config: EAP | CleanCorrupt | EAPIG, objective: Objective[UnitBatches]
) -> Found:
    """Returns the attribution of every unit by gradients at some points along the input.

    Raises:
        ValueError: as `circuits.discovery.attribution.eap` and `eap_ig`.
    """
    points = points_of(config, objective)
    check_differentiable(objective.metric)
    batches, metric = objective.batches, objective.metric
    divided, units = batches.divided, batches.space
    scores = torch.zeros(units.shape, dtype=torch.float32, device=divided.engine.device)
    progress = {"total": len(batches), "desc": config.name, "unit": "batch", "disable": None}
    n_prompts = 0
    for batch in tqdm(batches.contrasts(), **progress):
        n_prompts += len(batch.prompts)
        difference = batch.values[..., divided.input_numbers]

        def scalar(logits: Tensor, batch=batch) -> Tensor:
            return metric.oriented(logits, batch.prompts, batch.logits).sum()

        for point in points:
            at = batch.embedded - (1.0 - point) * difference
            gradients = divided.gradients(batch.prompts, at, scalar, config.rule)
            by_unit = divided.gathered(gradients.mul_(batch.values)).sum(0)  # [S, U]
            scores += by_unit.sum(0) if units.n_positions is None else by_unit.T
    return Found((scores / (n_prompts * len(points))).cpu())


def acdc_units(config: ACDC, objective: Objective[UnitBatches]) -> Found:
    """Returns the circuit of a greedy sweep over units, from the last site to the first.

    The rule is that of edges (`circuits.discovery.acdc`): a unit is removed for good iff that
    worsens the metric by less than tau.  One run a unit.

    Raises:
        ValueError: as `acdc`, or several taus are given.
    """
    _check(config)
    if config.taus is not None:
        raise ValueError(
            f"method.taus={list(config.taus)} is for edges only; use units=edges, or one method.tau"
        )
    _warn_of_memory(objective)
    space = objective.batches.space
    kept, scores = space.exists.clone(), torch.zeros(space.shape)
    full, current = _cost(objective.full()), _cost(objective.measure(kept))
    tau = _tau(config, objective, full)
    _warn_of_noise(objective, abs(current - full), tau)
    closest = float("inf")
    for unit in tqdm(_sweep(config, objective), desc="acdc", unit="unit", disable=None):
        kept[unit] = False
        without = _cost(objective.measure(kept))
        delta = without - current
        scores[unit] = delta
        closest = min(closest, abs(delta - tau))
        kept[unit] = delta >= tau
        current = without if delta < tau else current
    details = {"tau": tau, "runs": space.n_parts, "closest_to_tau": closest, "final_cost": current}
    return Found(scores=scores, kept=kept, details=details)


def _sweep(config: ACDC, objective: Objective[UnitBatches]) -> list[tuple[int, ...]]:
    """Indices of units, last first; shuffled within each site where that is asked for."""
    space, generator = objective.batches.space, np.random.default_rng(config.seed)
    order = []
    for _, span in reversed(list(space.spans())):
        positions = range(space.n_positions or 1)
        site = list(itertools.product(range(span.start, span.stop), positions))[::-1]
        if config.order == "shuffle":
            generator.shuffle(site)
        order += [tuple(one) for one in site]
    return order if space.n_positions is not None else [unit[:1] for unit in order]
