"""What circuits are made of, edges or units, as an extraction needs it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from circuits.ablation.source import WRITERS, Source
from circuits.circuit import Circuit
from circuits.discovery import METHODS, Found
from circuits.engine.engine import Engine
from circuits.graph import Graph
from circuits.mask_distribution import MaskDistribution
from circuits.objective import Objective, prepare
from circuits.parts.circuit import UnitCircuit
from circuits.parts.divided import Divided
from circuits.parts.division import EDGES, UnitsConfig, check_units, divide
from circuits.parts.objective import prepare_units
from circuits.parts.readings import Decoded
from circuits.parts.units import Units
from circuits.prompts import Prompts
from circuits.selection import Selection

log = logging.getLogger(__name__)

FEW = 16  # prompts on which dictionaries are checked


@dataclass(frozen=True)
class Over:
    """What circuits are made of."""

    source: Source  # of ablations
    prepare: Callable[..., Objective]  # (prompts, metric, ablation, memory=) -> objective
    circuit: Callable[..., Circuit | UnitCircuit]  # (kept, found, about) -> circuit
    about: Mapping[str, Any] = field(default_factory=dict)  # for `circuit.json`


def over(engine: Engine, units: UnitsConfig | None, prompts: Prompts) -> Over:
    """Returns what circuits of edges, or of units, are made with.

    Of each dictionary it is measured on some of the prompts how much of its site's value it leaves
    to the error; where that is more than a constant would, there is a warning.

    Raises:
        FileNotFoundError: there is no such dictionary.
        ValueError: as `divide`.
    """
    if units is None or units.name == EDGES:
        return Over(WRITERS, partial(prepare, engine), partial(_of_edges, engine.graph))
    divided = divide(engine, units)
    shares = _unexplained(divided, prompts)
    about = {"of": {**asdict(units), "unexplained": shares}}
    circuit = partial(_of_units, divided.units)
    return Over(divided, partial(prepare_units, divided), circuit, about)


def _of_edges(graph: Graph, kept: Tensor, found: Found, about: Mapping[str, Any]) -> Circuit:
    return Circuit(graph, kept, found.scores, about, _trained(kept, found))


def _of_units(units: Units, kept: Tensor, found: Found, about: Mapping[str, Any]) -> UnitCircuit:
    return UnitCircuit(units, kept, found.scores, about, _trained(kept, found))


def _trained(kept: Tensor, found: Found) -> MaskDistribution | None:
    """The mask that a circuit of so many parts was taken from, if one was learned."""
    return None if found.trained is None else found.trained(int(kept.sum()))


def _unexplained(divided: Divided, prompts: Prompts) -> dict[str, float]:
    """Of each site with a dictionary the share of variance that its error holds."""
    few = prompts.select(slice(0, FEW)).to(divided.engine.device)
    if not any(isinstance(reading, Decoded) for reading in divided.readings):
        return {}
    shares = dict(divided.unexplained(divided.read(divided.engine, few)[0], few))
    for site, share in shares.items():
        if not share < 1:
            log.warning(
                "the dictionary of %s leaves %.2f of the variance there to its error, more than a "
                "constant would: it is of another model or site, or wants another scale",
                site,
                share,
            )
    return shares


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
