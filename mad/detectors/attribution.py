"""Squared Mahalanobis distance of the vector of all edges' attributions, which needs no circuit.

    s(w -> r) = sum over positions of (a_w - mean_w) . dm/dx_r

with m the logit of the model's first choice less that of its second, averaged over scored positions
(the attributions of EAP, Syed et al. 2023, arXiv 2310.10348).  A difference of log-probabilities
would saturate.

Shapes: prompts B, scored positions P, vocabulary V, positions S, d_model D, edges E, readers r of
one group, writers W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.batches import over_batches
from circuits.prompts import Prompts
from mad.detectors.measured import Instrument, chosen_or_means, measuring
from mad.detectors.settings import check_ablation, check_shrinkage
from mad.statistics import distance


@dataclass
class AttributionMahalanobis:
    """Distance of all edges' attributions from trusted ones."""

    name: str = "attribution_mahalanobis"
    # what writers are compared with: mean, positional_mean or zero
    ablation: str = "mean"
    # of the standardised covariance towards the identity: there may be more edges than prompts
    shrinkage: float = 0.1

    def check(self) -> None:
        """Raises ValueError when a setting is out of range."""
        check_ablation(self.ablation)
        check_shrinkage(self.shrinkage)


def attributions(instrument: Instrument, prompts: Prompts, memory: str) -> Float[Tensor, "B E"]:
    """Returns each prompt's attribution of each edge, in forward order; float32, on the CPU.

    One forward pass for what writers write, and one forward and one backward pass for the
    gradients.  Positions are summed over where edges are told apart by position, too.
    """
    return over_batches(
        lambda batch: _attributions(instrument, batch),
        instrument.engine,
        prompts,
        lambda size: 2 * size.attribution,  # the products are made from copies
        memory=memory,
    )


@torch.no_grad()
def _attributions(instrument: Instrument, prompts: Prompts) -> Float[Tensor, "B E"]:
    engine, graph, means = instrument.engine, instrument.engine.graph, instrument.ablation
    assert means is not None
    clean = engine.clean(prompts)
    embedded = clean.writers[: graph.n_inputs].sum(0)
    difference = clean.writers.sub_(means.writers(engine, prompts))
    exists = graph.exists if graph.n_positions is None else graph.exists.any(-1)
    products = difference.new_zeros(len(prompts), *exists.shape)

    def lead(logits: Float[Tensor, "B P V"]) -> Float[Tensor, ""]:
        first, second = logits.topk(2).values.unbind(-1)  # [B, P] each
        return prompts.mean_over_scored(first - second).sum()

    for first, gradients in engine.reader_gradients(prompts, embedded, lead):
        upstream = graph.upstream[first]
        products[:, first : first + len(gradients), :upstream] = torch.einsum(
            "rbsd,wbsd->brw", gradients, difference[:upstream]
        )
    return products[:, exists.to(engine.device)].float().cpu()


ATTRIBUTION_MAHALANOBIS = measuring(
    AttributionMahalanobis,
    attributions,
    lambda config: distance(config.shrinkage),
    ablation=chosen_or_means,
)
