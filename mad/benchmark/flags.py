"""Whom a detector flags: prompts with a conformal p-value of at most alpha.

Shapes: prompts B.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from mad.benchmark.results import ANOMALY, CALIBRATION, Place, Results, Scorer
from mad.calibration import Calibration

ALPHAS = (0.01, 0.05)


@dataclass(frozen=True)
class Flag:
    """The share of a stratum that is flagged at alpha: of normals, false alarms."""

    scorer: Scorer
    place: Place
    alpha: float
    share: float
    prompts: int

    @property
    def benign(self) -> bool:
        """Whether to flag here is a false alarm."""
        return self.place.group != ANOMALY


def flagged(
    calibration: Calibration, scores: Float[Tensor, "B"], alpha: float
) -> Bool[Tensor, "B"]:
    """Returns which prompts are flagged.

    Raises:
        ValueError: the calibration is too small for alpha.
    """
    if problem := calibration.problem(alpha):
        raise ValueError(problem)
    return calibration.p_values(scores) <= alpha


def share(flagged: Bool[Tensor, "B"]) -> float:
    """Returns the share that is flagged; NaN of no prompts."""
    return flagged.double().mean().item()


def flags(results: Results, alphas: Sequence[float] = ALPHAS) -> tuple[Flag, ...]:
    """Who is flagged by every score, but for those through random circuits.

    Raises:
        ValueError: an alpha that a calibration is too small for.
    """
    return tuple(_flags(results, alphas))


def _flags(results: Results, alphas: Sequence[float]) -> Iterator[Flag]:
    for subject in results.subjects:
        rows = {group: subject.rows(group) for group in subject.strata}
        for scorer, parts in sorted(subject.parts.items()):
            if scorer.random:
                continue
            calibration = Calibration.of(parts[CALIBRATION])
            for group, strata in rows.items():
                try:
                    hits = {a: flagged(calibration, parts[group], a) for a in alphas}
                except ValueError as error:
                    raise ValueError(f"{scorer} on {subject.name}: {error}") from error
                for stratum, own in strata.items():
                    place = Place(subject.task, subject.seed, group, stratum)
                    for alpha in alphas:
                        yield Flag(scorer, place, alpha, share(hits[alpha][own]), len(own))


def worst_false_alarms(found: Sequence[Flag], alpha: float) -> dict[Scorer, Flag]:
    """Each scorer's benign stratum of which the largest share is flagged; the first of several."""
    worst: dict[Scorer, Flag] = {}
    for flag in found:
        if flag.benign and flag.alpha == alpha:
            held = worst.setdefault(flag.scorer, flag)
            worst[flag.scorer] = flag if flag.share > held.share else held
    return worst
