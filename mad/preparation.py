"""What is known before a circuit is looked for: settings, model, prompts, splits and alpha.

Discovery may take hours; all that can be refused without it is refused here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from circuits.ablation import ABLATIONS
from circuits.discovery import METHODS, default_metric
from circuits.discovery.attribution import ByGradient, check_differentiable, check_slope
from circuits.engine import Engine
from circuits.engine.memory import parse_memory
from circuits.engine.rules import check_rule
from circuits.evaluation.agreement import check_sample
from circuits.metrics import Metric, metric_named
from circuits.model.load import LoadedModel, load_model
from circuits.parts.division import EDGES, divide
from circuits.parts.over import check_over
from circuits.prompts import Prompts
from circuits.space import Space
from mad.calibration import check_alpha, inputs_for
from mad.known_models import remember
from mad.trusted import one_length, trusted_splits

if TYPE_CHECKING:
    from mad.pipeline import RunConfig

log = logging.getLogger(__name__)

USUAL_ALPHA = 0.01


@dataclass(frozen=True)
class Prepared:
    """A model with the trusted prompts of each purpose, checked."""

    model: LoadedModel
    engine: Engine
    splits: Mapping[str, Prompts]
    alpha: float  # the false-alarm rate that calibration allows
    space: Space  # what a mask is over: edges, or units

    def about(self) -> dict[str, Any]:
        """What a dry check tells, by its name."""
        parts, calibration = self.splits.values(), len(self.splits["calibration"])
        lengths = [int(length) for prompts in parts for length in prompts.lengths]
        return {
            "model": f"{self.model.path}, weights {self.model.weight_hash[:16]}",
            "graph": f"{self.space.n_parts} {self.space.noun}",
            "prompts": ", ".join(f"{len(part)} {name}" for name, part in self.splits.items()),
            "tokens": f"{min(lengths)} to {max(lengths)} in a prompt",
            "alpha": f"{self.alpha:g}; calibration allows {smallest_alpha(calibration):g} or more",
        }


def check_settings(config: RunConfig) -> None:
    """Raises ValueError for settings that need no model to be refused."""
    if config.alpha is not None:
        check_alpha(config.alpha)
    parse_memory(config.memory)
    config.detector.check()
    _check_method(config.method, metric_named(metric_of(config)))
    check_sample(config.exact_sample)
    check_over(config.method.name, config.selection, config.units)
    if config.ablation.name not in ABLATIONS:
        raise ValueError(
            f"ablation={config.ablation.name!r}, but the ablations are {', '.join(ABLATIONS)}"
        )


def _check_method(method: Any, metric: Metric) -> None:
    """Raises ValueError for a metric that the method cannot go by, or an unknown rule."""
    if METHODS[method.name].needs_slope:
        check_slope(metric, method.name)
    if isinstance(method, ByGradient):
        check_differentiable(metric)
        check_rule(method.rule)


def metric_of(config: RunConfig) -> str:
    """What the circuit has to keep: what is asked for, or the method's own."""
    return config.metric or default_metric(config.method.name)


def prepare_run(config: RunConfig) -> Prepared:
    """The model and the prompts of a run whose settings are checked (`check_settings`).

    Raises:
        ValueError: the model or a prompt is refused, the prompts lack what metric or
            ablation need, or there are too few to calibrate for the alpha that is asked for.
    """
    model = load_model(config.model)
    remember(config.model.path, config.model.head)
    splits = trusted_splits(config.task, model, config.splits, config.seed)
    remember(getattr(config.task, "path", None))
    calibration = len(splits["calibration"])
    if config.units.name == EDGES:
        alpha = usable_alpha(config.alpha, calibration, "splits.calibration")
    else:  # nothing is calibrated
        alpha = config.alpha or max(USUAL_ALPHA, smallest_alpha(calibration))
    for name in ("discovery", "evaluation"):
        metric_named(metric_of(config)).require(splits[name])
        ABLATIONS[config.ablation.name].require(splits[name])
    engine = Engine(model, n_positions=one_length(splits) if config.positions else None)
    space = engine.graph
    if config.units.name != EDGES:
        space = divide(engine, config.units).units
    return Prepared(model, engine, splits, alpha, space)


def smallest_alpha(calibration: int) -> float:
    """The smallest false-alarm rate that so many calibration inputs allow, rounded up."""
    return math.ceil(10_000 / (calibration + 1)) / 10_000


def usable_alpha(asked: float | None, calibration: int, setting: str) -> float:
    """The false-alarm rate that is asked for; by default the usual one, or what can be had.

    Raises:
        ValueError: so few calibration inputs, whose number `setting` decides, cannot serve it.
    """
    alpha, smallest = USUAL_ALPHA if asked is None else asked, smallest_alpha(calibration)
    needed = inputs_for(alpha)
    if calibration >= needed:
        return alpha
    problem = (
        f"alpha={alpha:g} needs at least {needed} calibration inputs, but there will be "
        f"{calibration} ({setting}): give more trusted prompts, or raise alpha to {smallest:g}"
    )
    if asked is not None:
        raise ValueError(problem)
    log.warning("%s when you score", problem)
    return smallest
