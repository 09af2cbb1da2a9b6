"""Worst cases: a detector is as good as its smallest AUROC over all places.

A place is one task, model, group of normals and stratum of anomalies.

Shapes: bootstrap draws D.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mad.benchmark.auroc import BOUNDS, DRAWS, Separation, auroc_draws, redraw, separations
from mad.benchmark.results import ANOMALY, FOUND, NORMALS, ORACLE, Place, Results, Scorer, Scores


def places(found: Iterable[Separation]) -> set[Place]:
    """Every place that any score has."""
    return {one.place for one in found}


def by_scorer(found: Iterable[Separation]) -> dict[Scorer, list[Separation]]:
    """Each scorer's separations."""
    own: dict[Scorer, list[Separation]] = {}
    for one in found:
        own.setdefault(one.scorer, []).append(one)
    return own


def worst_cases(found: Iterable[Separation]) -> dict[Scorer, Separation]:
    """Each scorer's smallest AUROC; the first place of several."""
    return {
        scorer: min(own, key=lambda one: (one.auroc, one.place))
        for scorer, own in by_scorer(found).items()
    }


def best_baseline(found: Sequence[Separation]) -> Scorer | None:
    """The baseline whose worst case is best; None: no baseline was computed everywhere.

    Distances at one layer and oracle rows, which pick the layer by looking at anomalies, do not
    count.  The choice among baselines is itself made by looking, which favours the baselines.
    """
    everywhere, own, worst = len(places(found)), by_scorer(found), worst_cases(found)
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
    subjects = [subject for subject in results.subjects if subject.anomalous]
    if not subjects:
        raise ValueError("0 subjects with anomalies; a worst case needs at least one")
    both = dict.fromkeys((ours, theirs))
    for subject in subjects:
        if missing := [scorer for scorer in both if scorer not in subject.parts]:
            raise ValueError(
                f"{missing[0]} has no scores on {subject.name}; compare over subjects that both "
                "have"
            )
    lowest = {scorer: torch.full((draws,), torch.inf) for scorer in both}
    for subject in subjects:
        counts = redraw(subject, draws, seed)
        for scorer in both:
            samples = _worst_draws(subject, subject.parts[scorer], counts)
            lowest[scorer] = torch.minimum(lowest[scorer], samples)
    worst = worst_cases(separations(Results(tuple(subjects)).of([*both]), draws=draws, seed=seed))
    differences = lowest[ours] - lowest[theirs]
    low, high = torch.quantile(differences, torch.tensor(BOUNDS)).tolist()
    return Difference(
        worst[ours],
        worst[theirs],
        worst[ours].auroc - worst[theirs].auroc,
        low,
        high,
        (differences > 0).float().mean().item(),
        draws,
    )


def _worst_draws(
    subject: Scores, parts: Mapping[str, Tensor], counts: Mapping[str, Tensor]
) -> Float[Tensor, "D"]:
    """A score's smallest AUROC on a subject in each draw."""
    rows = subject.rows(ANOMALY)
    return torch.cat([auroc_draws(parts, group, rows, counts) for group in NORMALS]).amin(0)


def oracle(found: Iterable[Separation]) -> tuple[Separation, ...]:
    """What picking the layer in each place by its AUROC would reach: no detector, since it looks at
    anomalies.

    One row for each family of baselines `FAMILY, layer 0`, `FAMILY, layer 1`, ..., with `oracle` as
    its circuit.
    """
    best: dict[tuple[str, Place], Separation] = {}
    for one in found:
        if (family := one.scorer.family) is None:
            continue
        key = (family, one.place)
        if key not in best or one.auroc > best[key].auroc:
            best[key] = replace(one, scorer=Scorer(f"{family}, best layer", ORACLE))
    return tuple(best[key] for key in sorted(best))


@dataclass(frozen=True)
class Control:
    """What random circuits of the same size reach: over draws of the circuit."""

    mean: float
    low: float
    high: float
    circuits: int

    @classmethod
    def of(cls, aurocs: Sequence[float]) -> Control:
        """That of each circuit's AUROC."""
        return cls(sum(aurocs) / len(aurocs), min(aurocs), max(aurocs), len(aurocs))


def controls(found: Iterable[Separation]) -> dict[tuple[Scorer, Place], Control]:
    """The random circuits of each scorer in each place."""
    values: dict[tuple[Scorer, Place], list[float]] = {}
    for one in found:
        if one.scorer.random:
            scorer = Scorer(one.scorer.detector, FOUND)
            values.setdefault((scorer, one.place), []).append(one.auroc)
    return {key: Control.of(own) for key, own in values.items()}


def worst_controls(found: Iterable[Separation]) -> dict[Scorer, Control]:
    """The worst cases of each scorer's random circuits: each of them has its own worst case."""
    values: dict[Scorer, list[float]] = {}
    for scorer, one in worst_cases(found).items():
        if scorer.random:
            values.setdefault(Scorer(scorer.detector, FOUND), []).append(one.auroc)
    return {scorer: Control.of(own) for scorer, own in values.items()}
