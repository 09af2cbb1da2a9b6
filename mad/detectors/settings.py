"""Checks of settings that several detectors have."""

from __future__ import annotations

from collections.abc import Iterable

MOST_STEPS = 10_000
WITHOUT_TWIN = ("mean", "positional_mean", "optimal", "zero")  # ablations that new inputs can have


def check_ablation(name: str | None) -> None:
    """Raises ValueError when new inputs cannot have an ablation; None leaves it open."""
    if name is not None and name not in WITHOUT_TWIN:
        raise ValueError(
            f"detector.ablation={name!r}, but new inputs have no corrupt twin: use mean, "
            "positional_mean, optimal or zero"
        )


def check_at_least_one(config: object, *names: str) -> None:
    """Raises ValueError when one of some numbers of a configuration is under 1."""
    for name in names:
        if (value := vars(config)[name]) < 1:
            raise ValueError(f"{name}={value}, but at least 1 is needed")


def check_steps(config: object, name: str) -> None:
    """Raises ValueError when a number of points of an integral is under 1, or absurd."""
    check_at_least_one(config, name)
    if (value := vars(config)[name]) > MOST_STEPS:
        raise ValueError(f"{name}={value}, but at most {MOST_STEPS} can be waited for")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises ValueError when a setting is none of its choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}, but the choices are {', '.join(choices)}")


def check_shrinkage(shrinkage: float) -> None:
    """Raises ValueError when a shrinkage is no share."""
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage={shrinkage}, but it must be from 0 to 1")
