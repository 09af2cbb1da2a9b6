"""What figures say against a circuit, or against each other.

A circuit that is worse than none by another metric is refused; all else is a warning: a line that
names the figures and what to do.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from circuits.metrics import METRICS
from circuits.selection import Selection

log = logging.getLogger(__name__)

APART = 0.5  # faithfulness under two metrics contradicts where it differs by more
ERRORS = 2.0  # standard errors that are noise


def refuse_worse_than_none(figures: Mapping[str, Any]) -> None:
    """Raises ValueError where a circuit is worse than the empty one by some metric."""
    for name in figures["worse_than_none"]:
        raise ValueError(
            f"{_worse(figures, name)}; "
            f"discover by metric={name if METRICS[name].differentiable else 'kl'}, with other "
            "settings (method.share, selection), or take it as it is: accept_worse=true"
        )


def warnings(figures: Mapping[str, Any], target: float | None = None) -> list[str]:
    """Returns what figures say against a circuit, or against each other, a line each.

    Args:
        figures: as `circuits.evaluation.figures.figures` returns them.
        target: the faithfulness that it was selected to reach on the discovery prompts.
    """
    lines = [f"{_worse(figures, name)}; do not rely on it" for name in figures["worse_than_none"]]
    return [
        *lines,
        *_contradictions(figures),
        *_explains_nothing(figures),
        *_short_of_target(figures, target),
    ]


def target_of(selection: Selection | None) -> float | None:
    """The faithfulness that a selection asks for; None where it asks for a number of edges.

    >>> target_of(Selection()), target_of(Selection(edges=20))
    (0.9, None)
    """
    if selection is None or selection.given() or selection.how == "threshold":
        return None
    return selection.faithfulness


def noun_of(figures: Mapping[str, Any]) -> str:
    """What figures count: edges, or units.

    >>> noun_of({"units_kept": 3})
    'units'
    """
    return "units" if "units_kept" in figures else "edges"


def _worse(figures: Mapping[str, Any], name: str) -> str:
    noun = noun_of(figures)
    own, chosen = figures["by_metric"][name], figures["faithfulness_detail"]["metric"]
    numbers = f"{own['circuit']:.3g}; empty {own['empty']:.3g}, model {own['model']:.3g}"
    return (
        f"by {name} the circuit of {figures[f'{noun}_kept']} {noun} ({numbers}) is worse than the "
        f"empty one, though it keeps {figures['faithfulness']:.2f} of {chosen}"
    )


def _contradictions(figures: Mapping[str, Any]) -> list[str]:
    """Metrics under which faithfulness is far from that under the one it was found by."""
    chosen, kept = figures["faithfulness_detail"]["metric"], figures["by_metric"]
    if chosen not in kept:
        return []
    own, apart = kept[chosen], []
    for name, other in kept.items():
        noise = ERRORS * ((own["error"] or 0.0) ** 2 + (other["error"] or 0.0) ** 2) ** 0.5
        gap = abs(own["value"] - other["value"])
        if gap > max(APART, noise) and name not in figures["worse_than_none"]:
            numbers = f"{other['circuit']:.3g}; model {other['model']:.3g}"
            apart.append(f"{other['value']:.2f} of {name} ({numbers})")
    if not apart:
        return []
    return [
        f"the circuit keeps {own['value']:.2f} of {chosen}, but {', '.join(apart)}: it does not do "
        "what the model does; keep more edges, or discover by another metric, such as kl"
    ]


def _explains_nothing(figures: Mapping[str, Any]) -> list[str]:
    noun = noun_of(figures)
    kept, total = figures[f"{noun}_kept"], figures[f"{noun}_total"]
    chance = figures["random_circuits"]["percentile_95"]
    if kept == total:
        return [
            f"all {total} {noun} are kept, so that this circuit explains nothing and no input "
            f"departs from it; ask for fewer (selection.{noun}, a lower selection.faithfulness, a "
            "higher method.tau) or use another method"
        ]
    if chance is not None and figures["faithfulness"] <= chance:
        return [
            f"the circuit's faithfulness, {figures['faithfulness']:.3f}, is no better than that "
            f"of random circuits of its size (95th percentile {chance:.3f})"
        ]
    return []


def _short_of_target(figures: Mapping[str, Any], target: float | None) -> list[str]:
    """A target that was reached on the discovery prompts alone."""
    detail = figures["faithfulness_detail"]
    told = figures["by_metric"].get(detail["metric"])
    if target is None or told is None or told["error"] is None:
        return []
    value, error = figures["faithfulness"], told["error"]
    if value + ERRORS * error >= target:
        return []
    return [
        f"selection.faithfulness={target:g} was reached on the discovery prompts, but on "
        f"{detail['n_prompts']} held-out ones faithfulness is {value:.2f} (standard error "
        f"{error:.2f}): give more discovery prompts (splits.discovery), or ask for more "
        f"{noun_of(figures)}"
    ]
