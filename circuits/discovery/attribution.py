"""Edge attribution patching: all edges scored by gradients, in a few passes.

EAP (Syed et al. 2023, arXiv 2310.10348) takes the gradient of the metric in the edge mask at all
ones,

    s(w -> r) = sum over pos, d of (a_w - ablated_w) . dm/dx_r

per prompt, then averaged; edges told apart by position have no sum over pos.  EAP-IG-inputs (Hanna
et al. 2024, arXiv 2403.17806) takes the mean of dm/dx_r over runs whose input embedding lies
k/steps of the way from the ablated to the clean one, k = 0 .. steps - 1; the difference in front
stays the full one.

`score(e)` estimates m(model) - m(model without e) with higher m better, so that positive supports
the behaviour.

Shapes: prompts B, positions S, d_model D, writers W, readers R.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from circuits.discovery.method import Found
from circuits.metrics import Metric
from circuits.objective import Batches, Objective


@dataclass
class EAP:
    """Edge attribution patching (Syed et al. 2023)."""

    name: str = "eap"


@dataclass
class EAPIG:
    """Edge attribution patching with integrated gradients along the inputs (Hanna et al. 2024)."""

    name: str = "eap_ig"
    steps: int = 5  # gradients from the ablated input towards the clean one; the paper's default


def eap(config: EAP, objective: Objective[Batches]) -> Found:
    """Returns the EAP score of every edge; ValueError for a metric flat at the clean run (KL)."""
    return Found(_attribute(objective, points_of(config, objective), "eap"))


def eap_ig(config: EAPIG, objective: Objective[Batches]) -> Found:
    """Returns the EAP-IG-inputs score of every edge; ValueError for fewer than 1 step."""
    return Found(_attribute(objective, points_of(config, objective), "eap-ig"))


def points_of(config: EAP | EAPIG, objective: Objective) -> tuple[float, ...]:
    """How far from the ablated to the clean input gradients are taken.

    Raises:
        ValueError: fewer than 1 step or, at the clean input alone, a metric flat there (KL).
    """
    if isinstance(config, EAP):
        if objective.metric.flat_at_model:
            raise ValueError(
                f"metric={objective.metric.name} has zero gradient at the clean run, so that plain "
                "EAP scores are all 0; use method=eap_ig, or metric=logit_diff"
            )
        return (1.0,)
    if config.steps < 1:
        raise ValueError(
            f"steps={config.steps}, but at least 1 is needed (5 is the published default)"
        )
    return tuple(k / config.steps for k in range(config.steps))


def check_differentiable(metric: Metric) -> None:
    """Raises ValueError for a metric without a gradient."""
    if not metric.differentiable:
        raise ValueError(
            f"metric={metric.name} has no gradient; use logit_diff, prob_diff or cross_entropy"
        )


def _attribute(
    objective: Objective[Batches], points: tuple[float, ...], label: str
) -> torch.Tensor:
    """Edge scores by gradients at `ablated + point * (clean - ablated)`, averaged over points."""
    engine, metric = objective.engine, objective.metric
    graph = engine.graph
    check_differentiable(metric)
    scores = torch.zeros(graph.exists.shape, dtype=torch.float32, device=engine.device)
    n_prompts, batches = 0, objective.batches
    progress = {"total": len(batches), "desc": label, "unit": "batch", "disable": None}
    for batch in tqdm(batches.contrasts(), **progress):
        prompts, flat = batch.prompts, batch.values.flatten(1)
        n_prompts += len(prompts)
        difference = batch.values[: graph.n_inputs].sum(0)

        def scalar(logits: torch.Tensor, batch=batch) -> torch.Tensor:
            return metric.oriented(logits, batch.prompts, batch.logits).sum()

        for point in points:
            at = batch.embedded - (1.0 - point) * difference
            for first, gradients in engine.reader_gradients(prompts, at, scalar):
                upstream = graph.upstream[first]
                if graph.n_positions is None:
                    products = gradients.flatten(1) @ flat[:upstream].T
                else:
                    products = torch.einsum("rbsd,wbsd->rws", gradients, batch.values[:upstream])
                scores[first : first + len(gradients), :upstream] += products
    return (scores / (n_prompts * len(points))).cpu()
