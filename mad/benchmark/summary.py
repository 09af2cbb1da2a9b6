"""Results with all that tables and pictures are made of, computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from mad.benchmark.auroc import DRAWS, Separation, separations
from mad.benchmark.flags import Flag, flags, worst_false_alarms
from mad.benchmark.results import FOUND, ORACLE, Place, Results, Scorer
from mad.benchmark.worst_case import (
    Control,
    Difference,
    best_baseline,
    by_scorer,
    controls,
    difference,
    oracle,
    places,
    worst_cases,
    worst_controls,
)

ALARM = 0.01  # the false-alarm rate that the headline is at


@dataclass(frozen=True)
class Summary:
    """Results with all that the tables are made of."""

    results: Results
    separations: tuple[Separation, ...]  # through random circuits too, and oracle rows
    flags: tuple[Flag, ...]
    draws: int = DRAWS
    seed: int = 0
    missed: tuple[str, ...] = ()  # models that were trained and did not learn their task

    @cached_property
    def worst(self) -> Mapping[Scorer, Separation]:
        """Every scorer's worst case."""
        return worst_cases(self.separations)

    @cached_property
    def alarms(self) -> Mapping[Scorer, Flag]:
        """Every scorer's worst false alarms."""
        return worst_false_alarms(self.flags, ALARM)

    @cached_property
    def controls(self) -> Mapping[tuple[Scorer, Place], Control]:
        """Random circuits by place."""
        return controls(self.separations)

    @cached_property
    def worst_controls(self) -> Mapping[Scorer, Control]:
        """Random circuits' worst cases."""
        return worst_controls(self.separations)

    @cached_property
    def counts(self) -> Mapping[Scorer, int]:
        """In how many places each scorer was computed."""
        return {scorer: len(own) for scorer, own in by_scorer(self.separations).items()}

    @cached_property
    def everywhere(self) -> int:
        """How many places there are."""
        return len(places(self.separations))

    @cached_property
    def shown(self) -> tuple[Scorer, ...]:
        """All but random circuits and single layers: complete ones first, by worst case."""

        def rank(scorer: Scorer) -> tuple[bool, float, Scorer]:
            return self.counts[scorer] < self.everywhere, -self.worst[scorer].auroc, scorer

        return tuple(sorted((scorer for scorer in self.worst if scorer.shown), key=rank))

    @cached_property
    def flagging(self) -> tuple[Scorer, ...]:
        """Those that flag, also where they were computed only on tasks without anomalies."""
        more = [s for s in self.results.scorers if s.shown and s not in self.worst]
        return tuple(s for s in (*self.shown, *more) if s.circuit != ORACLE)

    @cached_property
    def best_baseline(self) -> Scorer | None:
        """The baseline to beat; None: none was computed everywhere."""
        return best_baseline(self.separations)

    @cached_property
    def differences(self) -> Mapping[Scorer, Difference]:
        """The worst case through a circuit less the best baseline's, where both are complete."""
        if (against := self.best_baseline) is None:
            return {}
        ours = [s for s in self.shown if s.circuit == FOUND and self.counts[s] == self.everywhere]
        return {
            s: difference(self.results, s, against, draws=self.draws, seed=self.seed) for s in ours
        }


def summarise(
    results: Results, *, draws: int = DRAWS, seed: int = 0, missed: Sequence[str] = ()
) -> Summary:
    """Computes every AUROC and every flag.

    Raises:
        ValueError: draws is under 2, or a calibration part is too small for an alpha of `ALPHAS`.
    """
    if draws < 2:
        raise ValueError(f"draws={draws}, but an interval needs at least 2")
    found = separations(results, draws=draws, seed=seed)
    return Summary(results, (*found, *oracle(found)), flags(results), draws, seed, tuple(missed))
