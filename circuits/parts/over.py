"""What circuits are made of, edges or units, as an extraction needs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from circuits.ablation.source import WRITERS, Source
from circuits.circuit import Circuit
from circuits.discovery import METHODS, Found
from circuits.engine.engine import Engine
from circuits.graph import Graph
from circuits.objective import Objective, prepare
from circuits.parts.circuit import UnitCircuit
from circuits.parts.division import EDGES, UnitsConfig, check_units, divide
from circuits.parts.objective import prepare_units
from circuits.selection import Selection


@dataclass(frozen=True)
class Over:
    """What circuits are made of."""

    source: Source  # of ablations
    prepare: Callable[..., Objective]  # (prompts, metric, ablation, memory=) -> objective
    circuit: Callable[..., Circuit | UnitCircuit]  # (kept, scores, about) -> circuit


def over(engine: Engine, units: UnitsConfig | None) -> Over:
    """Returns what circuits of edges, or of units, are made with.

    Raises:
        FileNotFoundError: there is no such dictionary.
        ValueError: as `divide`.
    """
    if units is None or units.name == EDGES:
        return Over(WRITERS, partial(prepare, engine), partial(Circuit, engine.graph))
    divided = divide(engine, units)
    return Over(divided, partial(prepare_units, divided), partial(UnitCircuit, divided.units))


def discovered(method: Any, objective: Objective) -> Found:
    """Returns what a method finds; ValueError where it has no form over units."""
    known = METHODS[method.name]
    if isinstance(objective.space, Graph):
        return known.run(method, objective)
    check_method(method.name)
    assert known.over_units is not None
    return known.over_units(method, objective)


def check_method(name: str) -> None:
    """Raises ValueError for a method that finds circuits of edges only."""
    if METHODS[name].over_units is None:
        able = ", ".join(other for other, method in METHODS.items() if method.over_units)
        raise ValueError(
            f"method={name} finds circuits of edges only; use units=edges, or one of {able}"
        )


def selection_of(selection: Selection, units: UnitsConfig | None) -> Selection:
    """The selection as circuits of edges, or of units, take it.

    Raises:
        ValueError: it counts edges where there are units, or units where there are edges.
    """
    if units is None or units.name == EDGES:
        if selection.units is not None:
            raise ValueError(
                f"selection.units={selection.units}, but the circuit is of edges; give "
                f"selection.edges={selection.units}, or units=nodes, neurons or features"
            )
        return selection
    if selection.edges is not None:
        raise ValueError(
            f"selection.edges={selection.edges}, but the circuit is of units ({units.name}); give "
            f"selection.units={selection.edges}"
        )
    # units have no edges to grow along, and the best of them are taken
    return replace(selection, how="top_n") if selection.how == "greedy" else selection


def check_over(method: str, selection: Selection, units: UnitsConfig) -> None:
    """Raises ValueError for settings that need no model to be refused."""
    check_units(units)
    if units.name != EDGES:
        check_method(method)
    selection_of(selection, units)
