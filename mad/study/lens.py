"""A circuit to look at inputs through: how it is found on trusted prompts, and what new inputs are
compared under.

Shapes: readers R, writers W, positions S.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from circuits.ablation import Ablation, AblationConfig, fit_ablation
from circuits.discovery.acdc import ACDC, acdc
from circuits.engine import Engine
from circuits.metrics import metric_named
from circuits.objective import prepare
from circuits.prompts import Prompts
from circuits.selection import random_circuits
from mad.departure import Departure, departure
from mad.detectors.transplant import redrawn
from mad.study.plan import Recipe
from mad.study.subject import Subject


@dataclass(frozen=True)
class Lens:
    """A circuit, and the means over trusted prompts that edges off it carry when an input is
    scored.
    """

    subject: Subject
    engine: Engine
    mask: Bool[Tensor, "R W *S"]
    means: Ablation  # over the fit part: mean, or positional_mean where edges have positions
    _remembered: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def fit(self) -> Prompts:
        """The part that spreads are taken from."""
        return self.subject.trusted["fit"]

    def departure(self, prompts: Prompts, *, one_step: bool = False) -> Departure:
        """`mad.departure.departure` under the means; kept, since several scores read it."""
        make = partial(departure, self.engine, self.mask, self.means, one_step=one_step)
        return self.remember(f"departure {one_step}", prompts, make)

    def remember(self, name: str, prompts: Prompts, make: Callable[[Prompts], Any]) -> Any:
        """What is made of some prompts, made once for all scores that need it."""
        key = (name, id(prompts))
        if key not in self._remembered:
            self._remembered[key] = (
                prompts,
                make(prompts),
            )  # with the prompts, so that the id stays theirs
        return self._remembered[key][1]

    def through(self, mask: Bool[Tensor, "R W *S"]) -> Lens:
        """The same with another circuit."""
        return replace(self, mask=mask, _remembered={})


def engine_of(subject: Subject, recipe: Recipe) -> Engine:
    """The engine that a recipe's circuit belongs to."""
    return (
        subject.engine_by_position if recipe.by_position and subject.one_length else subject.engine
    )


def find(subject: Subject, recipe: Recipe) -> Bool[Tensor, "R W *S"]:
    """Returns the circuit that a recipe finds on the discovery part."""
    engine, prompts = engine_of(subject, recipe), subject.trusted["discovery"]
    if recipe.prompts is not None:
        prompts = prompts.select(range(min(recipe.prompts, len(prompts))))
    if recipe.bootstrap is not None:
        prompts = redrawn(prompts, len(prompts), recipe.bootstrap)
    ablation = fit_ablation(AblationConfig(recipe.ablation), engine, prompts)
    if recipe.ablation == "resample":  # the longest prompt has no donor as long as it is
        prompts = prompts.select(
            prompts.lengths <= prompts.deduplicated().lengths.sort().values[-2]
        )
    config = ACDC(tau=recipe.tau)
    if recipe.shuffled is not None:
        config = replace(config, order="shuffle", seed=recipe.shuffled)
    found = acdc(config, prepare(engine, prompts, metric_named("kl"), ablation))
    assert found.kept is not None
    return found.kept


def look(subject: Subject, recipe: Recipe, mask: Bool[Tensor, "R W *S"]) -> Lens:
    """Returns the lens of a circuit that `find` found."""
    engine = engine_of(subject, recipe)
    name = "positional_mean" if engine.graph.n_positions is not None else "mean"
    return Lens(
        subject, engine, mask, fit_ablation(AblationConfig(name), engine, subject.trusted["fit"])
    )


def controls(lens: Lens, count: int) -> list[Lens]:
    """Lenses of random circuits of the same size, connected as `circuits.selection.random_circuits`
    makes them.
    """
    drawn = random_circuits(lens.engine.graph, int(lens.mask.sum()), count, lens.subject.seed)
    return [lens.through(mask) for mask in drawn]
