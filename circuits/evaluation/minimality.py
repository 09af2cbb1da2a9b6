"""Minimality: what each edge of a circuit does by itself.

    effect(e) = f(C) - f(C without e)       above 0: the circuit needs the edge

An edge whose effect is within two standard errors of 0 is below noise: the prompts do not show that
the circuit needs it (Wang et al. 2022, arXiv 2211.00593, section 4, for nodes).

Shapes: edges E, prompts N; readers R, writers W; `*S` positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.evaluation.bootstrap import Resampled, figure
from circuits.faithfulness import FaithfulnessScale

ERRORS = 2.0  # standard errors that are noise


def minimality(
    scale: FaithfulnessScale,
    kept: Bool[Tensor, "R W *S"],
    chance: Sequence[Bool[Tensor, "R W *S"]],
    *,
    edges: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns the effect of each edge, and the shares that are below noise and that do harm.

    Args:
        chance: random circuits of the circuit's size; as many of their edges are tested in all.
        edges: so many of the circuit's edges at most are tested, drawn at random.
        seed: of the draws.
    """
    graph = scale.objective.engine.graph
    generator = torch.Generator().manual_seed(seed)
    tested = _some_edges(kept, edges, generator)
    chance = chance[: len(tested)]
    share = len(tested) // max(1, len(chance))
    others = [(mask, edge) for mask in chance for edge in _some_edges(mask, share, generator)]
    pairs = [(kept, edge) for edge in tested] + others
    whole = [kept, *(mask for mask, _ in others)]
    masks = [*whole, *(_without(mask, edge) for mask, edge in pairs)]
    found = scale.drawn(runs := scale.measure_each(masks, "edges"), Resampled.of(runs.shape[-1]))
    before = torch.cat([found[:1].expand(len(tested), -1), found[1 : len(whole)]])
    effects = [figure(drawn) for drawn in before - found[len(whole) :]]
    own, at_random = effects[: len(tested)], effects[len(tested) :]

    def share_of(figures: list[Any], sign: float) -> float | None:
        beyond = [sign * one.value > ERRORS * (one.error or 0.0) for one in figures]
        return sum(beyond) / len(beyond) if beyond else None

    def below_noise(figures: list[Any]) -> float | None:
        beyond = [share_of(figures, sign) for sign in (1.0, -1.0)]
        return None if beyond[0] is None else 1 - sum(part or 0.0 for part in beyond)

    return {
        "tested": len(tested),
        "edges_kept": int(kept.sum()),
        "needed": share_of(own, 1.0),
        "harmful": share_of(own, -1.0),
        "below_noise": below_noise(own),
        "below_noise_of_random_circuits": below_noise(at_random),
        "edges": [
            {"edge": graph.edge_name(*edge), "effect": one.value, "error": one.error}
            for edge, one in zip(tested, own, strict=True)
        ],
    }


def _some_edges(
    kept: Bool[Tensor, "R W *S"], count: int, generator: torch.Generator
) -> list[tuple[int, ...]]:
    """So many of a circuit's edges at most, in edge order."""
    edges = kept.nonzero()
    rows = torch.randperm(len(edges), generator=generator)[:count].sort().values
    return [tuple(edge) for edge in edges[rows].tolist()]


def _without(kept: Bool[Tensor, "R W *S"], edge: tuple[int, ...]) -> Bool[Tensor, "R W *S"]:
    mask = kept.clone()
    mask[edge] = False
    return mask
