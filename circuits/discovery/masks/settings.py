"""What all methods that learn a mask have in common, and what is refused of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from circuits.graph import Graph
from circuits.objective import Objective
from circuits.space import Space

DISTANCE = 20.0  # that theta can go in a training, at most


@dataclass
class MaskTraining:
    """How a mask is trained, whatever it is over."""

    name: str = ""
    # the size at which training ends, and which is then kept; null: training goes down to `down_to`
    # edges, and the selection chooses a size
    edges: int | None = None
    units: int | None = None  # the same of a circuit of units
    share: float | None = None  # the same as a share of all edges (or units)
    down_to: float = 0.01  # share of all edges (or units)
    steps: int = 600
    batch: int | None = None  # prompts a step; null: 32, or all where there are fewer
    # masks drawn for each prompt of a batch; 0: one for all of them
    masks_per_prompt: int = 1
    # of Adam; null: 20 / steps, so that a gate can go as far in few steps as in many
    learning_rate: float | None = None
    initial: float = 1.0  # theta of every gate: it is open with probability sigmoid(theta)
    # start from scores by rank instead: a method's name, or a run folder
    warm_start: str | None = None
    # the price of all edges, as a share of the metric's gap between model and empty circuit; null:
    # the mask is steered down to its size
    penalty: float | None = None
    checkpoint: str | None = None  # file to go on from, written during training
    checkpoint_every: int = 50  # steps
    seed: int = 0

    @property
    def decides(self) -> bool:
        """Whether a size is asked for, so that no selection follows."""
        return (self.edges, self.units, self.share) != (None, None, None)

    @property
    def rate(self) -> float:
        """The learning rate."""
        return DISTANCE / self.steps if self.learning_rate is None else self.learning_rate

    def elsewhere(self) -> MaskTraining:
        """The same for other prompts: no file is read or written."""
        from circuits.discovery import METHODS

        own = self.warm_start if self.warm_start in (None, *METHODS) else "eap_ig"
        return replace(self, checkpoint=None, warm_start=own)


def final_size(config: MaskTraining, space: Space) -> float:
    """The number of edges (or units) at which training ends.

    Raises:
        ValueError: out of range, told twice, or of edges where there are units, or the reverse.
    """
    sizes = ("edges", "units", "share", "penalty")
    told = [name for name in sizes if getattr(config, name) is not None]
    if len(told) > 1:
        values = " and ".join(f"method.{name}={getattr(config, name)}" for name in told)
        raise ValueError(f"{values} contradict each other; give one of them")
    noun, other = ("edges", "units") if isinstance(space, Graph) else ("units", "edges")
    if (count := getattr(config, other)) is not None:
        raise ValueError(
            f"method.{other}={count}, but the circuit is of {noun}; give method.{noun}={count}"
        )
    if (count := getattr(config, noun)) is not None:
        if not 1 <= count < space.n_parts:
            whole = "graph" if noun == "edges" else "model"
            raise ValueError(
                f"method.{noun}={count}, but it must be 1 to {space.n_parts - 1}: the {whole} has "
                f"{space.n_parts} {noun}"
            )
        return float(count)
    name = "share" if config.share is not None else "down_to"
    share = config.down_to if config.share is None else config.share
    if not 0 < share < 1:
        raise ValueError(f"method.{name}={share}, but a share of the {noun} is above 0 and below 1")
    return max(1.0, share * space.n_parts)


def batch_size(config: MaskTraining, objective: Objective) -> int:
    """How many prompts a step takes; ValueError where there are fewer."""
    available = len(objective.batches.whole)
    if config.batch is None:
        return min(32, available)
    if config.batch > available:
        raise ValueError(
            f"method.batch={config.batch}, but there are {available} discovery prompts; lower it, "
            "or give more prompts (splits.discovery)"
        )
    return config.batch


LEAST = {"steps": 1, "batch": 1, "masks_per_prompt": 0, "checkpoint_every": 1, "seed": 0}
ABOVE_0 = ("learning_rate", "penalty")


def check(config: MaskTraining, objective: Objective) -> None:
    """Raises ValueError for settings, or a metric, that no mask can be trained with."""
    metric = objective.metric
    if not metric.differentiable:
        raise ValueError(
            f"metric={metric.name} has no gradient, so that {config.name} cannot train a mask by "
            "it; use kl, logit_diff, prob_diff or cross_entropy"
        )
    _check_numbers(config)
    final_size(config, objective.space)
    batch_size(config, objective)


def _check_numbers(config: MaskTraining) -> None:
    for name, least in LEAST.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"method.{name}={value}, but it must be at least {least}")
    for name in ABOVE_0:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"method.{name}={value}, but it must be a number above 0")
    if not math.isfinite(config.initial):
        raise ValueError(f"method.initial={config.initial}, but it must be a number")
