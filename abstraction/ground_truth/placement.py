"""Where each step of a program goes: which head or MLP of which layer, and which edges that makes.

Attention of layer l runs at time 2l, its MLP at 2l + 1.  A step goes to the first head or MLP with
room that runs after all of its inputs have been written; `token` and `position` are there from the
start.  Steps of different mechanisms never share an MLP, so that every edge belongs to one
mechanism.

The edges of the program are what its steps read:  writer of the variable -> reader of the step.  A
variable that several heads compute alike (redundancy) makes one *group* of edges where it is read,
and one for each of its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from abstraction.ground_truth.program import (
    NORMAL,
    Attend,
    Combine,
    Lookup,
    Program,
    Step,
    Switch,
    Threshold,
)

Port = Literal["q", "k", "v", "mlp", "logits"]


@dataclass(frozen=True)
class Read:
    """A step takes a variable through a port, at some positions."""

    step: str  # or "logits"
    port: Port
    variable: str
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a step lives: a layer's MLP, or one head (several, if it is redundant)."""

    layer: int
    heads: tuple[int, ...] = ()  # empty: the MLP

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(f"a{self.layer}.h{head}" for head in self.heads) or (f"m{self.layer}",)

    @property
    def time(self) -> int:
        return 2 * self.layer + (not self.heads)


@dataclass(frozen=True)
class Group:
    """The edges that carry one variable into one reader, or into several that compute alike; mostly
    a single edge.
    """

    edges: tuple[str, ...]
    mechanism: str


def neurons(program: Program, step: Step, redundant: str | None = None) -> int:
    """How many neurons a step takes: 0 for attention."""
    match step:
        case Attend():
            return 0
        case Lookup():
            return program.tables[step.name].numel() * (2 if redundant in step.inputs else 1)
        case Threshold():
            return 2 * len(step.cuts)
        case Combine():
            return 2
        case Switch():
            return 2 * program.category(step.normal)


def place(
    program: Program, *, n_heads: int | None, d_mlp: int | None, redundant: str | None, copies: int
) -> Mapping[str, Place]:
    """Returns where each step goes, with at most so many heads a layer and neurons an MLP (None: no
    bound).

    Raises:
        ValueError: a single step needs more heads or neurons than a layer has.
    """
    places: dict[str, Place] = {}
    heads: dict[int, int] = {}  # per layer: heads taken
    used: dict[int, int] = {}  # per layer: neurons taken
    owner: dict[int, str] = {}  # per layer: whose MLP it is
    for step in program.ordered:
        after = max((places[name].time for name in step.parents if name in places), default=-1)
        size, count = neurons(program, step, redundant), copies if step.name == redundant else 1
        if isinstance(step, Attend):
            if n_heads is not None and count > n_heads:
                raise ValueError(
                    f"step {step.name!r} needs {count} heads in a layer, but n_heads leaves "
                    f"{n_heads}"
                )
            layer = after // 2 + 1
            while n_heads is not None and heads.get(layer, 0) + count > n_heads:
                layer += 1
            first = heads.get(layer, 0)
            places[step.name] = Place(layer, tuple(range(first, first + count)))
            heads[layer] = first + count
            continue
        if d_mlp is not None and size > d_mlp:
            raise ValueError(
                f"step {step.name!r} needs {size} neurons in an MLP, but d_mlp leaves {d_mlp}"
            )
        layer = (after + 1) // 2
        while owner.get(layer, step.mechanism) != step.mechanism or (
            d_mlp is not None and used.get(layer, 0) + size > d_mlp
        ):
            layer += 1
        places[step.name] = Place(layer)
        used[layer], owner[layer] = used.get(layer, 0) + size, step.mechanism
    return places


# ---- what is read, where, and through which edges
# -------------------------------------------------------------


def reads(program: Program) -> tuple[Read, ...]:
    """Returns what every step reads, at the positions that the answer depends on.

    Steps that the answer does not depend on are left out.
    """
    needed: dict[str, set[int]] = {name: set() for name in program.sizes}
    needed[program.output] |= set(program.scored_positions)
    found = [Read("logits", "logits", program.output, tuple(sorted(set(program.scored_positions))))]
    for step in reversed(program.ordered):
        positions = needed[step.name]
        if not positions:
            continue
        for port, variable, places in _ports(program, step, positions):
            needed[variable] |= places
            found.append(Read(step.name, port, variable, tuple(sorted(places))))
    return tuple(reversed(found))


def _ports(program: Program, step: Step, positions: set[int]) -> list[tuple[Port, str, set[int]]]:
    if not isinstance(step, Attend):
        return [("mlp", name, positions) for name in dict.fromkeys(step.parents)]
    seen = set(range(max(positions) + 1)) if program.causal else set(range(program.length))
    values = seen
    if step.key in (None, "position") and step.query in (
        None,
        "position",
    ):  # the same positions on every input
        values = _attended(program, step, positions)
    ports: list[tuple[Port, str, set[int]]] = []
    if step.query is not None:
        ports.append(("q", step.query, positions))
    if step.key is not None:
        ports.append(("k", step.key, seen))
    if step.ties != "mean":
        ports.append(("k", "position", seen))
    return [*ports, ("v", step.value, values)]


def _attended(program: Program, step: Attend, positions: set[int]) -> set[int]:
    """The positions that an attention pattern which depends on positions alone takes its values
    from.
    """
    values = torch.arange(program.length)[None]
    query, key = (None if name is None else values for name in (step.query, step.key))
    attended = program.attended(step, query, key, values)[0]
    return {
        place for position in positions for place in attended[position].nonzero()[:, 0].tolist()
    }


def nodes_of(variable: str, places: Mapping[str, Place], split_input: bool) -> tuple[str, ...]:
    """The nodes that write a variable."""
    if variable in places:
        return places[variable].nodes
    return (f"input.{variable}" if split_input else "input",)


def groups(
    program: Program, places: Mapping[str, Place], *, split_input: bool, per_position: bool
) -> tuple[Group, ...]:
    """Returns the edges of the program, in forward order of their readers; an edge is named once.

    An edge belongs to the mechanism of what it feeds, or of what it comes from if that is not the
    normal one.
    """
    found: dict[tuple[str, ...], str] = {}
    for read in reads(program):
        writers = nodes_of(read.variable, places, split_input)
        readers = places[read.step].nodes if read.step in places else ("logits",)
        port = f"<{read.port}>" if read.port in ("q", "k", "v") else ""
        ends = [
            step.mechanism
            for name in (read.step, read.variable)
            if (step := program.by_name.get(name))
        ]
        mechanism = next((name for name in ends if name != NORMAL), NORMAL)
        for position in read.positions if per_position else (None,):
            at = "" if position is None else f"@{position}"
            found.setdefault(
                tuple(f"{w}->{r}{port}{at}" for r in readers for w in writers), mechanism
            )
    return tuple(Group(edges, mechanism) for edges, mechanism in found.items())
