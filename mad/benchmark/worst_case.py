"""Worst cases: a detector is as good as its smallest AUROC over all places.

A place is one task, model, group of normals and stratum of anomalies.

Shapes: bootstrap draws D.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from mad.benchmark.auroc import BOUNDS, DRAWS, Separation, auroc_draws, redraw, separations
from mad.benchmark.results import ANOMALY, FOUND, NORMALS, ORACLE, Place, Results, Scorer

Key = TypeVar("Key", bound=Hashable)


def grouped(
    found: Iterable[Separation], key: Callable[[Separation], Key]
) -> dict[Key, list[Separation]]:
    """Separations by what they have in common."""
    groups: dict[Key, list[Separation]] = {}
    for one in found:
        groups.setdefault(key(one), []).append(one)
    return groups


def worst_cases(found: Iterable[Separation]) -> dict[Scorer, Separation]:
    """Each scorer's smallest AUROC; the first place of several."""
    return {
        scorer: min(own, key=lambda one: (one.auroc, one.place))
        for scorer, own in grouped(found, lambda one: one.scorer).items()
    }


def best_baseline(found: Sequence[Separation]) -> Scorer | None:
    """The baseline whose worst case is best; None: no baseline was computed everywhere.

    Distances at one layer and oracle rows, which pick the layer by looking at anomalies, do not
    count.  The choice among baselines is itself made by looking, which favours the baselines.
    """
    everywhere = len({one.place for one in found})
    own, worst = grouped(found, lambda one: one.scorer), worst_cases(found)
    complete = sorted(s for s in worst if s.baseline and len(own[s]) == everywhere)
    return max(complete, key=lambda scorer: worst[scorer].auroc, default=None)


@dataclass(frozen=True)
class Difference:
    """One detector's worst case less another's: above 0 the first is better."""

    ours: Separation
    theirs: Separation
    difference: float
    low: float
    high: float
    above: float  # share of draws in which it is above 0
    draws: int


def difference(
    results: Results, ours: Scorer, theirs: Scorer, *, draws: int = DRAWS, seed: int = 0
) -> Difference:
    """Returns the difference of two worst cases with its 95 % bootstrap interval.

    Each draw redraws every subject's prompts once, for both scores, and takes both worst cases:
    they may stand in other places than the worst cases of all prompts.  The models are not redrawn:
    the interval says nothing of other seeds.

    Raises:
        ValueError: fewer than 2 draws, no anomalies, or a subject with anomalies on which one of
            the two is missing.
    """
    if draws < 2:
        raise ValueError(f"draws={draws}, but an interval needs at least 2")
    both = Results(tuple(s for s in results.subjects if s.anomalous)).of([ours, theirs])
    if not both.subjects:
        raise ValueError("0 subjects with anomalies; a worst case needs at least one")
    for subject in both.subjects:
        if missing := [scorer for scorer in (ours, theirs) if scorer not in subject.parts]:
            raise ValueError(
                f"{missing[0]} has no scores on {subject.name}; compare over subjects that both "
                "have"
            )
    differences = _worst_draws(both, ours, draws, seed) - _worst_draws(both, theirs, draws, seed)
    low, high = torch.quantile(differences, torch.tensor(BOUNDS)).tolist()
    worst = worst_cases(separations(both, draws=draws, seed=seed))
    return Difference(
        worst[ours],
        worst[theirs],
        worst[ours].auroc - worst[theirs].auroc,
        low,
        high,
        (differences > 0).float().mean().item(),
        draws,
    )


def _worst_draws(results: Results, scorer: Scorer, draws: int, seed: int) -> Float[Tensor, "D"]:
    """A scorer's smallest AUROC in each draw."""
    lowest = []
    for subject in results.subjects:
        parts, rows = subject.parts[scorer], subject.rows(ANOMALY)
        counts = redraw(subject, draws, seed)
        lowest += [auroc_draws(parts, group, rows, counts) for group in NORMALS]
    return torch.cat(lowest).amin(0)


def oracle(found: Iterable[Separation]) -> tuple[Separation, ...]:
    """What picking the layer in each place by its AUROC would reach: no detector, since it looks.

    One row for each family of baselines `FAMILY, layer 0`, `FAMILY, layer 1`, ..., with `oracle` as
    its circuit.
    """
    layers = grouped(
        (one for one in found if one.scorer.family), lambda one: (one.scorer.family, one.place)
    )
    return tuple(
        replace(max(own, key=lambda one: one.auroc), scorer=Scorer(f"{family}, best layer", ORACLE))
        for (family, _), own in sorted(layers.items())
    )


@dataclass(frozen=True)
class Control:
    """What random circuits of the same size reach: over draws of the circuit."""

    mean: float
    low: float
    high: float
    circuits: int


def controls(found: Iterable[Separation]) -> dict[tuple[Scorer, Place], Control]:
    """The random circuits of each scorer in each place."""
    return _controls(found, lambda one: (_extracted(one), one.place))


def worst_controls(found: Iterable[Separation]) -> dict[Scorer, Control]:
    """The worst cases of each scorer's random circuits: each of them has its own worst case."""
    return _controls(worst_cases(found).values(), _extracted)


def _extracted(one: Separation) -> Scorer:
    return Scorer(one.scorer.detector, FOUND)


def _controls(found: Iterable[Separation], key: Callable[[Separation], Key]) -> dict[Key, Control]:
    groups = grouped((one for one in found if one.scorer.random), key)
    values = {key: [one.auroc for one in own] for key, own in groups.items()}
    return {
        key: Control(sum(own) / len(own), min(own), max(own), len(own))
        for key, own in values.items()
    }
