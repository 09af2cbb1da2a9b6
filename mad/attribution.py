"""Which edges off a circuit a score comes from: integrated gradients along the mask.

A score that is 0 for the model itself is shared out over the edges off the circuit, from the
circuit (alpha = 0) to the model (alpha = 1):

    part(e) = - integral over alpha of dscore / dm_e    at mask  circuit + alpha (1 - circuit)

(Sundararajan et al. 2017, arXiv 1703.01365).  By completeness the parts sum to the score; the
integral is a midpoint sum, and what it misses is the residual.  Where a score is a mean over runs,
each run can have points of its own between those of the others: one midpoint sum for all of them.

What is 0 is computed as a difference of nearly equal numbers: the score with every edge kept says
how much of a score is rounding, and a score of that size has no parts.

Shapes: rows n (prompts, or pairs of a prompt and a host), readers R, writers W; `*S` positions,
where edges are told apart by position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.engine import Engine
from circuits.engine.memory import Footprint
from circuits.graph import Graph
from mad.detector import Explained


def off_circuit(engine: Engine, kept: Float[Tensor, "R W *S"]) -> Bool[Tensor, "R W *S"]:
    """Returns which edges a circuit lacks, on the engine's device."""
    return engine.graph.exists.to(engine.device) & (kept.to(engine.device) == 0)


def integrated(
    engine: Engine,
    kept: Float[Tensor, "R W *S"],
    points: Float[Tensor, "steps n"],
    measure: Callable[[Float[Tensor, "n R W *S"]], Float[Tensor, "n"]],
) -> Float[Tensor, "n R W *S"]:
    """Returns the parts of all edges, 0 on the circuit, for each row, from its values of alpha.

    `measure` takes one mask per row and runs under all of them.
    """
    kept, off = kept.to(engine.device), off_circuit(engine, kept)
    total = torch.zeros(points.shape[1], *kept.shape, device=engine.device)
    for alphas in points.to(kept.device):
        masks = (kept + alphas.view(-1, *(1 for _ in kept.shape)) * off).requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(measure(masks).sum(), masks)
        total -= gradient * off / len(points)
    return total


def midpoints(steps: int, places: Float[Tensor, "n"]) -> Float[Tensor, "steps n"]:
    """Returns one alpha in each of `steps` equal parts of 0 to 1, at each row's place in the part.

    >>> midpoints(2, torch.tensor([0.5, 0.25])).tolist()
    [[0.25, 0.125], [0.75, 0.625]]
    """
    return (torch.arange(steps, device=places.device)[:, None] + places) / steps


def halfway(rows: int) -> Float[Tensor, "n"]:
    """Returns the places of rows that have the same points."""
    return torch.full((rows,), 0.5)


def explanation_bytes(size: Footprint) -> int:
    """What it takes to integrate over one row and to hold its parts beside the others'."""
    return size.explanation + size.mask


def rounding(engine: Engine, measured: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Returns how much of a score is rounding, given what is measured with every edge kept.

    That is 0 but for rounding, and may be so by chance: at least the spacing of numbers at 1, in
    the precision that scores are computed in, is rounding.
    """
    wide = torch.float64 if engine.dtype == torch.float64 else torch.float32
    return measured.abs().clamp(min=torch.finfo(wide).eps)


def shares(
    parts: Float[Tensor, "B R W *S"], scores: Float[Tensor, "B"], noise: Float[Tensor, "B"]
) -> Explained:
    """Returns the parts as shares of their scores, on the CPU; a score of 0 has none."""
    least = torch.finfo(scores.dtype).tiny
    flat = parts.flatten(1) / scores.clamp(min=least)[:, None]
    return Explained(flat.view(parts.shape).cpu(), (1 - flat.sum(1)).cpu(), noise.float().cpu())


def largest_shares(
    shares: Float[Tensor, "R W *S"], graph: Graph, count: int, least: float
) -> list[dict[str, Any]]:
    """Returns the edges with the largest |share|, of those above `least`, and their shares."""
    order = shares.flatten().abs().argsort(descending=True, stable=True)[:count]
    edges = zip(*(axis.tolist() for axis in torch.unravel_index(order, shares.shape)), strict=True)
    return [
        {"edge": graph.edge_name(*edge), "share": shares[edge].item()}
        for edge in edges
        if abs(shares[edge].item()) > least
    ]
