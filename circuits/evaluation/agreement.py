"""How well scores rank edges, or units, by what their removal does: checked on a sample.

    effect(e) = m(model) - m(model without e)       one run each (`circuits.discovery.exact`)

Two Spearman correlations are given: of scores with effects, and of |scores| with |effects|, which
is what a ranking by |score| rests on.  Scores that are all 0 have none.  The sample has the same
number of each kind of reader (q, k, v, mlp, logits; of each kind of unit), as far as there are so
many, so that rare kinds are seen; within a kind it is drawn uniformly.  Correlations are therefore
those of such a sample, not of all edges, unless all are in it.

Shapes: sampled parts n; `*E` the axes of a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.discovery.exact import effects
from circuits.graph import Graph
from circuits.names import parse_node, parse_unit, split_reader
from circuits.objective import Objective
from circuits.space import Space


def agreement(
    objective: Objective, scores: Float[Tensor, "*E"], sample: int, seed: int = 0
) -> dict[str, Any]:
    """Returns rank correlations of scores with exact effects, over a sample and by kind in it.

    Args:
        sample: how many edges or units; all where there are fewer.
        seed: of the draw.

    Raises:
        ValueError: the sample is not of 2 at least, which have no correlation.
    """
    check_sample(sample)
    space = objective.space
    parts = drawn(space, sample, seed)
    own = scores[tuple(parts.T)].double()
    exact = effects(objective, parts).double()
    told = {"sampled": len(parts), "seed": seed, **rank_correlations(own, exact)}
    for name, kind in _kinds(space).items():
        told[f"by_{name}"] = {
            one: {"sampled": len(rows), **rank_correlations(own[rows], exact[rows])}
            for one, rows in _rows_by_kind(space, parts, kind).items()
        }
    return told


def check_sample(sample: int) -> None:
    """Raises ValueError for a sample that is too small to be ranked; 0 is for none."""
    if sample < 0 or sample == 1:
        raise ValueError(
            f"exact_sample={sample}, but a rank correlation needs at least 2 exact effects; 0 is "
            "for none"
        )


def rank_correlations(
    scores: Float[Tensor, "n"], exact: Float[Tensor, "n"]
) -> dict[str, float | None]:
    """Returns Spearman's correlation, signed and absolute; None where either is constant.

    >>> rank_correlations(torch.tensor([1.0, 2.0, -3.0]), torch.tensor([1.0, 4.0, -9.0]))
    {'spearman': 1.0, 'spearman_absolute': 1.0}
    """
    return {
        "spearman": _spearman(scores, exact),
        "spearman_absolute": _spearman(scores.abs(), exact.abs()),
    }


def _spearman(one: Float[Tensor, "n"], other: Float[Tensor, "n"]) -> float | None:
    from scipy.stats import spearmanr

    if len(one) < 2 or bool((one == one[0]).all()) or bool((other == other[0]).all()):
        return None
    found: Any = spearmanr(one.numpy(), other.numpy())
    return round(float(found.statistic), 12)


def drawn(space: Space, sample: int, seed: int) -> Int[Tensor, "n axes"]:
    """Returns some edges or units, as many of each kind as there are, in order."""
    parts = space.exists.nonzero()
    if sample >= len(parts):
        return parts
    kind = next(iter(_kinds(space).values()))
    rows = _rows_by_kind(space, parts, kind)
    generator = torch.Generator().manual_seed(seed)
    chosen, left = [], sample
    for after, own in enumerate(sorted(rows.values(), key=len)):  # rare kinds first
        share = min(len(own), left // (len(rows) - after))
        chosen.append(own[torch.randperm(len(own), generator=generator)[:share]])
        left -= share
    return parts[torch.cat(chosen).sort().values]


def _rows_by_kind(
    space: Space, parts: Int[Tensor, "n axes"], kind: Callable[..., str]
) -> dict[str, Int[Tensor, "m"]]:
    """Which of the parts are of each kind."""
    kinds = [kind(space, *part) for part in parts.tolist()]
    return {
        one: torch.tensor([row for row, other in enumerate(kinds) if other == one])
        for one in sorted(set(kinds))
    }


def _reader_kind(graph: Graph, reader: int, writer: int, *position: int) -> str:
    node, port = split_reader(graph.readers[reader])
    return port or parse_node(node).kind


def _writer_kind(graph: Graph, reader: int, writer: int, *position: int) -> str:
    return parse_node(graph.writers[writer]).kind


def _unit_kind(space: Space, *index: int) -> str:
    return parse_unit(space.part_name(*index)).kind


def _kinds(space: Space) -> Mapping[str, Callable[..., str]]:
    """Ways to tell parts apart; the first is the one by which they are drawn."""
    if isinstance(space, Graph):
        return {"reader": _reader_kind, "writer": _writer_kind}
    return {"kind": _unit_kind}
