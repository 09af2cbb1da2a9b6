"""Whom a detector flags: prompts with a conformal p-value of at most alpha."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def flags(results: Results, alphas: Sequence[float] = ALPHAS) -> list[Flag]:
    """Who is flagged by every score, but for those through random circuits.

    Raises:
        ValueError: an alpha that a calibration is too small for.
    """
    found = []
    for subject in results.subjects:
        places = [
            (Place(subject.task, subject.seed, group, stratum), own)
            for group in subject.strata
            for stratum, own in subject.rows(group).items()
        ]
        for scorer, parts in sorted(subject.parts.items()):
            if scorer.random:
                continue
            calibration = Calibration.of(parts[CALIBRATION])
            for alpha in alphas:
                if problem := calibration.problem(alpha):
                    raise ValueError(f"{scorer} on {subject.name}: {problem}")
            p_values = {group: calibration.p_values(parts[group]) for group in subject.strata}
            for place, own in places:
                values = p_values[place.group][own]
                shares = {alpha: (values <= alpha).double().mean().item() for alpha in alphas}
                found += [Flag(scorer, place, *one, len(own)) for one in shares.items()]
    return found


def worst_false_alarms(found: Sequence[Flag], alpha: float) -> dict[Scorer, Flag]:
    """Each scorer's benign stratum of which the largest share is flagged; the first of several."""
    worst: dict[Scorer, Flag] = {}
    for flag in found:
        if flag.benign and flag.alpha == alpha:
            held = worst.setdefault(flag.scorer, flag)
            worst[flag.scorer] = flag if flag.share > held.share else held
    return worst
