"""Programs: steps that compute variables at every position of an input, in the few operations a
transformer has.

A program starts from the variables `token` and `position`.  Each step defines one more variable,
with a value at each position i: categorical (a whole number below its size) or numerical.

    Attend     v_i = value_j at the position j that i attends to, or the mean of number(value_j) over several j
    Lookup     v_i = table[a_i, b_i, c_i]                 one to three categorical inputs
    Threshold  v_i = how many cuts lie below x_i          numerical to categorical
    Combine    v_i = sum w x_i + b                        numerical
    Switch     v_i = other_i where trigger_i is 1, else normal_i

Position i attends, among the positions that it can see, to those j with match(query_i, key_j), and
where none matches to all of them; `ties` says what happens with several: the first, the last, or
their mean.  So every variable is defined everywhere, and a fetch without a match takes its own
position (ties="last", causal) or position 0 ("first").

Steps carry the name of the mechanism they belong to, so that a planted one can be told from the
normal one.

Shapes: batch B, positions S, categories n.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from abstraction.causal_model import CausalModel

NORMAL = "normal"
INPUTS = ("token", "position")
Sampler = Callable[[int, torch.Generator], Tensor]  # count, generator -> token ids [count, S]


def equal(query: int, key: int) -> bool:
    """The default match: query and key have the same value."""
    return query == key


@dataclass(frozen=True)
class Attend:
    """One head: fetches a value from, or averages numbers over, the positions whose key matches the
    query.
    """

    name: str
    value: str
    key: str | None = None  # None: every visible position matches
    query: str | None = None  # None: `match` looks at the key alone
    match: Callable[..., bool] = equal  # (query, key) -> bool, or (key) -> bool without a query
    ties: str = "last"  # several match: first, last, or their mean
    numbers: tuple[float, ...] | None = (
        None  # one per category of value: what is carried is this number
    )
    mechanism: str = NORMAL

    @property
    def parents(self) -> tuple[str, ...]:
        position = () if self.ties == "mean" else ("position",)
        named = (self.value, *(name for name in (self.key, self.query) if name is not None))
        return tuple(dict.fromkeys((*named, *position)))


@dataclass(frozen=True)
class Lookup:
    """A table over one to three categorical variables; total, or refused."""

    name: str
    inputs: tuple[str, ...]
    table: Callable[..., int | bool | None] | Mapping[tuple[int, ...], int]
    size: int  # categories of the result
    mechanism: str = NORMAL

    @property
    def parents(self) -> tuple[str, ...]:
        return self.inputs


@dataclass(frozen=True)
class Threshold:
    """Numerical to categorical: how many of the ascending cuts lie below the input."""

    name: str
    input: str
    cuts: tuple[float, ...]
    gap: float  # the input never comes within gap / 2 of a cut
    mechanism: str = NORMAL

    @property
    def parents(self) -> tuple[str, ...]:
        return (self.input,)


@dataclass(frozen=True)
class Combine:
    """A weighted sum of numerical variables."""

    name: str
    inputs: tuple[str, ...]
    weights: tuple[float, ...]
    bias: float = 0.0
    mechanism: str = NORMAL

    @property
    def parents(self) -> tuple[str, ...]:
        return self.inputs


@dataclass(frozen=True)
class Switch:
    """One of two variables of the same size: `other` where the trigger is 1, else `normal`."""

    name: str
    trigger: str
    normal: str
    other: str
    mechanism: str = NORMAL

    @property
    def parents(self) -> tuple[str, ...]:
        return (self.trigger, self.normal, self.other)


Step = Attend | Lookup | Threshold | Combine | Switch


def at(place: int) -> dict[str, Any]:
    """Arguments of an `Attend` that fetches from one fixed position."""
    return {"key": "position", "match": lambda key: key == place}


def back(steps: int) -> dict[str, Any]:
    """Arguments of an `Attend` that fetches from `steps` positions earlier; 0 copies from its own
    position.
    """
    return {
        "key": "position",
        "query": "position",
        "match": lambda query, key: key == query - steps,
    }


@dataclass(frozen=True)
class Program:
    """Steps, the tokens they work on, and which variable is the answer.

    Raises:
        ValueError: unknown or doubled names, a cycle, a table that is not total, inputs of the
            wrong kind.
    """

    name: str
    tokens: tuple[str, ...]  # their names; the id is the index
    length: int  # tokens in an input, at most
    steps: tuple[Step, ...]
    output: str  # the categorical variable that is the answer
    answers: tuple[str, ...]  # the token that stands for each of its categories
    sample: Sampler  # valid inputs of exactly `length` tokens
    scored: tuple[int, ...] = (-1,)  # positions at which the answer is read
    causal: bool = True  # a position sees itself and earlier ones; else all

    def __post_init__(self) -> None:
        from abstraction.ground_truth.program_checks import check

        check(self)

    @cached_property
    def by_name(self) -> Mapping[str, Step]:
        return {step.name: step for step in self.steps}

    @cached_property
    def scored_positions(self) -> tuple[int, ...]:
        return tuple(position % self.length for position in self.scored)

    @cached_property
    def ordered(self) -> tuple[Step, ...]:
        """The steps, each after those that it needs."""
        return tuple(self.by_name[name] for name in self.causal_model.order if name in self.by_name)

    @cached_property
    def sizes(self) -> Mapping[str, int | None]:
        """How many categories each variable has; None for numerical ones."""
        sizes: dict[str, int | None] = {"token": len(self.tokens), "position": self.length}
        for step in self.ordered:
            match step:
                case Attend():
                    sizes[step.name] = (
                        sizes[step.value] if step.numbers is None and step.ties != "mean" else None
                    )
                case Lookup():
                    sizes[step.name] = step.size
                case Threshold():
                    sizes[step.name] = len(step.cuts) + 1
                case Combine():
                    sizes[step.name] = None
                case Switch():
                    sizes[step.name] = sizes[step.normal]
        return sizes

    @cached_property
    def causal_model(self) -> CausalModel:
        """What the program means: input `token` [B, S]; every variable [B, S]; `answer`, the
        answer's token id.
        """
        ids = torch.tensor([self.tokens.index(name) for name in self.answers])
        steps = {
            step.name: (step.parents, lambda *values, step=step: self._value(step, values))
            for step in self.steps
        }
        return CausalModel(
            ("token",),
            {
                "position": (
                    ("token",),
                    lambda token: torch.arange(token.shape[1]).expand_as(token),
                ),
                **steps,
                "answer": ((self.output,), lambda output: ids[output]),
            },
        )

    def category(self, name: str) -> int:
        """The size of a categorical variable."""
        size = self.sizes[name]
        assert size is not None, f"{name} is numerical"
        return size

    # ---- what each step computes
    # ----------------------------------------------------------------------

    @cached_property
    def tables(self) -> Mapping[str, Int[Tensor, "..."]]:
        """The tables of all lookups."""
        return {step.name: self.table(step) for step in self.steps if isinstance(step, Lookup)}

    def table(self, step: Lookup) -> Int[Tensor, "..."]:
        """A lookup's table as a tensor with one axis per input."""
        shape = tuple(self.category(name) for name in step.inputs)
        function = (
            (lambda *key: step.table.get(key)) if isinstance(step.table, Mapping) else step.table
        )
        entries = []
        for key in itertools.product(*map(range, shape)):
            entry = function(*key)
            if entry is None:
                raise ValueError(
                    f"lookup {step.name!r} is not total: no entry for {_named(step.inputs, key)}; "
                    "give one for each of "
                    f"the {torch.Size(shape).numel()} combinations"
                )
            if not 0 <= entry < step.size:
                raise ValueError(
                    f"lookup {step.name!r} gives {entry} for {_named(step.inputs, key)}, but "
                    f"size={step.size} allows 0 "
                    f"to {step.size - 1}; raise size or change the table"
                )
            entries.append(int(entry))
        return torch.tensor(entries).view(shape)

    def matches(self, step: Attend) -> Bool[Tensor, "query key"]:
        """Which key values match which query values; one row without a query, one column without a
        key.
        """
        if step.key is None:
            return torch.ones(1, 1, dtype=torch.bool)
        keys = range(self.category(step.key))
        if step.query is None:
            return torch.tensor([[bool(step.match(key)) for key in keys]])
        return torch.tensor(
            [[bool(step.match(q, key)) for key in keys] for q in range(self.category(step.query))]
        )

    def attended(
        self, step: Attend, query: Tensor | None, key: Tensor | None, like: Tensor
    ) -> Bool[Tensor, "B S S"]:
        """Which positions [key] each position [query] attends to; several only with ties="mean"."""
        length = like.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool)
        visible = (visible.tril() if self.causal else visible).expand(len(like), -1, -1)
        rows = torch.zeros_like(like) if query is None else query
        columns = torch.zeros_like(like) if key is None else key
        matching = self.matches(step)[rows[:, :, None], columns[:, None, :]] & visible
        chosen = torch.where(matching.any(-1, keepdim=True), matching, visible)
        if step.ties == "mean":
            return chosen
        places = torch.arange(length)
        best = torch.where(chosen, places if step.ties == "last" else length - places, -1).argmax(
            -1
        )
        return torch.nn.functional.one_hot(best, length).bool()

    def _value(self, step: Step, values: tuple[Tensor, ...]) -> Tensor:
        of = dict(zip(step.parents, values, strict=True))
        match step:
            case Attend():
                query, key = (None if name is None else of[name] for name in (step.query, step.key))
                attended = self.attended(step, query, key, of[step.value])
                value = of[step.value]
                if self.sizes[step.name] is not None:
                    return value.gather(1, attended.int().argmax(-1))
                numbers = (
                    value
                    if step.numbers is None
                    else torch.tensor(step.numbers, dtype=torch.float64)[value]
                )
                return (attended * numbers[:, None, :]).sum(-1) / attended.sum(-1)
            case Lookup():
                return self.tables[step.name][values]
            case Threshold():
                return (values[0][..., None] > torch.tensor(step.cuts, dtype=torch.float64)).sum(-1)
            case Combine():
                return sum(
                    (w * x for w, x in zip(step.weights, values, strict=True)),
                    torch.tensor(step.bias),
                )
            case Switch():
                return torch.where(of[step.trigger] == 1, of[step.other], of[step.normal])


def _named(names: tuple[str, ...], key: tuple[int, ...]) -> str:
    return "(" + ", ".join(f"{name}={value}" for name, value in zip(names, key, strict=True)) + ")"
