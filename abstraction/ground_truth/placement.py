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

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from abstraction.ground_truth.program import Program
from abstraction.ground_truth.steps import NORMAL, Attend, Step
from circuits.names import INPUT, LOGITS, edge_name, head_name, mlp_name, reader_name

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
        heads = tuple(head_name(self.layer, head) for head in self.heads)
        return heads or (mlp_name(self.layer),)

    @property
    def time(self) -> int:
        return 2 * self.layer + (not self.heads)


@dataclass(frozen=True)
class Group:
    """The edges (mostly one) that carry variables into a reader, or several that compute alike."""

    edges: tuple[str, ...]
    mechanism: str
    variables: tuple[str, ...]


def neurons(program: Program, step: Step, redundant: str | None) -> int:
    """How many neurons a step takes: counting votes for a redundant input takes twice as many."""
    return step.neurons(program.sizes) * (2 if redundant in step.parents else 1)


def place(
    program: Program,
    *,
    n_heads: int | None = None,
    d_mlp: int | None = None,
    redundant: str | None = None,
    copies: int = 1,
) -> Mapping[str, Place]:
    """Returns where each step goes, with so many heads a layer and neurons an MLP (None: no bound).

    Raises:
        ValueError: a single step needs more heads or neurons than a layer has.
    """
    places: dict[str, Place] = {}
    heads = _Rooms(n_heads, "heads in a layer, but n_heads leaves")
    mlps = _Rooms(d_mlp, "neurons in an MLP, but d_mlp leaves", one_mechanism=True)
    for step in program.ordered:
        after = max((places[name].time for name in step.parents if name in places), default=-1)
        if isinstance(step, Attend):
            count = copies if step.name == redundant else 1
            layer, first = heads.take(step, after // 2 + 1, count)
            places[step.name] = Place(layer, tuple(range(first, first + count)))
        else:
            layer, _ = mlps.take(step, (after + 1) // 2, neurons(program, step, redundant))
            places[step.name] = Place(layer)
    return places


@dataclass
class _Rooms:
    """What is taken of each layer's heads or neurons."""

    most: int | None  # in a layer
    what: str
    one_mechanism: bool = False  # only steps of one mechanism may share a layer
    taken: Counter[int] = field(default_factory=Counter)
    owner: dict[int, str] = field(default_factory=dict)

    def take(self, step: Step, layer: int, count: int) -> tuple[int, int]:
        """The first layer with room, from `layer` on, and how many were taken there before."""
        most = math.inf if self.most is None else self.most
        if count > most:
            raise ValueError(f"step {step.name!r} needs {count} {self.what} {most}")
        while self.taken[layer] + count > most or not self._may_share(step, layer):
            layer += 1
        before = self.taken[layer]
        self.taken[layer] += count
        self.owner[layer] = step.mechanism
        return layer, before

    def _may_share(self, step: Step, layer: int) -> bool:
        return not self.one_mechanism or self.owner.get(layer, step.mechanism) == step.mechanism


# ---- what is read, where, and through which edges ------------------------------------------------


def reads(program: Program) -> tuple[Read, ...]:
    """Returns what each step that the answer depends on reads, at the positions it depends on."""
    needed: dict[str, set[int]] = {name: set() for name in program.sizes}
    scored = tuple(sorted(set(program.scored_positions)))
    needed[program.output] |= set(scored)
    found = [Read("logits", "logits", program.output, scored)]
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
    seen = set(range(max(positions) + 1 if program.causal else program.length))
    ports: list[tuple[Port, str, set[int]]] = []
    if step.query is not None:
        ports.append(("q", step.query, positions))
    if step.key is not None:
        ports.append(("k", step.key, seen))
    if step.ties != "mean":
        ports.append(("k", "position", seen))
    by_position = {step.key, step.query} <= {None, "position"}  # the same on every input
    return [*ports, ("v", step.value, _attended(program, step, positions) if by_position else seen)]


def _attended(program: Program, step: Attend, positions: set[int]) -> set[int]:
    """Where an attention pattern that depends on positions alone takes its values from."""
    values = torch.arange(program.length)[None]
    given = {step.value: values, "position": values}
    attended = step.attended(program.sizes, given, causal=program.causal)[0]
    return set(attended[sorted(positions)].any(0).nonzero()[:, 0].tolist())


def nodes_of(variable: str, places: Mapping[str, Place], split_input: bool) -> tuple[str, ...]:
    """The nodes that write a variable."""
    if variable in places:
        return places[variable].nodes
    return (f"{INPUT}.{variable}" if split_input else INPUT,)


def groups(
    program: Program,
    places: Mapping[str, Place],
    *,
    split_input: bool = False,
    per_position: bool = False,
) -> tuple[Group, ...]:
    """Returns the edges of the program, in forward order of their readers; an edge is named once.

    An edge belongs to the mechanism of what it feeds, or of what it comes from if that is not the
    normal one.
    """
    found: dict[tuple[str, ...], list[Read]] = {}
    for read in reads(program):
        writers = nodes_of(read.variable, places, split_input)
        nodes = places[read.step].nodes if read.step in places else (LOGITS,)
        side = read.port if read.port in ("q", "k", "v") else ""
        readers = tuple(reader_name(node, side) for node in nodes)
        for at in read.positions if per_position else [None]:
            edges = tuple(edge_name(w, r, at) for r in readers for w in writers)
            found.setdefault(edges, []).append(read)
    return tuple(
        Group(edges, _mechanism(program, through[0]), tuple(read.variable for read in through))
        for edges, through in found.items()
    )


def _mechanism(program: Program, read: Read) -> str:
    ends = [program.by_name.get(name) for name in (read.step, read.variable)]
    named = (step.mechanism for step in ends if step is not None)
    return next((mechanism for mechanism in named if mechanism != NORMAL), NORMAL)
