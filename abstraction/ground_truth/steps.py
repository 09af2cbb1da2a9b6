"""The steps of a program: what each computes, needs and refuses.

    Attend     v_i = value_j at the position j that i attends to, or the mean of number(value_j)
    Lookup     v_i = table[a_i, b_i, c_i]                 one to three categorical inputs
    Threshold  v_i = how many cuts lie below x_i          numerical to categorical
    Combine    v_i = sum w x_i + b                        numerical
    Switch     v_i = other_i where trigger_i is 1, else normal_i

Each has `name`, `mechanism`, its `parents`, and four methods: `categories`, how many it has
(None: it is numerical); `neurons`, how many it takes in an MLP; `function`, of the values of its
parents in their order; and `check`, which raises ValueError for what is wrong.

Shapes: batch B, positions S.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

NORMAL = "normal"
Sizes = Mapping[str, int | None]  # of all variables: how many categories; None: it is numerical


def equal(query: int, key: int) -> bool:
    """The default match: query and key have the same value."""
    return query == key


def category(sizes: Sizes, name: str) -> int:
    """The size of a categorical variable."""
    size = sizes[name]
    assert size is not None, f"{name} is numerical"
    return size


def require(where: str, sizes: Sizes, name: str, *, categorical: bool) -> None:
    """Raises ValueError unless a variable is categorical, or numerical."""
    if (sizes[name] is not None) != categorical:
        wanted, other = ("categorical", "a Threshold") if categorical else ("numerical", "numbers=")
        raise ValueError(f"{where}: {name!r} must be {wanted}; make it so with {other}")


@dataclass(frozen=True)
class Attend:
    """One head: fetches a value from, or averages numbers over, the positions whose key matches."""

    name: str
    value: str
    key: str | None = None  # None: every visible position matches
    query: str | None = None  # None: `match` looks at the key alone
    match: Callable[..., bool] = equal  # (query, key) -> bool, or (key) -> bool without a query
    ties: str = "last"  # several match: first, last, or their mean
    numbers: tuple[float, ...] | None = None  # carried in place of value, one per category
    mechanism: str = NORMAL

    @property
    def parents(self) -> tuple[str, ...]:
        position = None if self.ties == "mean" else "position"
        named = (self.value, self.key, self.query, position)
        return tuple(dict.fromkeys(name for name in named if name is not None))

    def categories(self, sizes: Sizes) -> int | None:
        return sizes[self.value] if self.numbers is None and self.ties != "mean" else None

    def neurons(self, sizes: Sizes) -> int:
        return 0

    def matches(self, sizes: Sizes) -> Bool[Tensor, "query key"]:
        """Which values match; one row without a query, one column without a key."""
        if self.key is None:
            return torch.ones(1, 1, dtype=torch.bool)
        keys = range(category(sizes, self.key))
        if self.query is None:
            return torch.tensor([[bool(self.match(key)) for key in keys]])
        queries = range(category(sizes, self.query))
        return torch.tensor([[bool(self.match(query, key)) for key in keys] for query in queries])

    def attended(
        self, sizes: Sizes, values: Mapping[str, Tensor], *, causal: bool
    ) -> Bool[Tensor, "B S S"]:
        """Which positions [key] each position [query] attends to; several only with ties="mean"."""
        like = values[self.value]
        visible = torch.ones(like.shape[1], like.shape[1], dtype=torch.bool)
        visible = visible.tril() if causal else visible
        nothing = torch.zeros_like(like)
        rows = nothing if self.query is None else values[self.query]
        columns = nothing if self.key is None else values[self.key]
        matching = self.matches(sizes)[rows[:, :, None], columns[:, None, :]] & visible
        chosen = torch.where(matching.any(-1, keepdim=True), matching, visible)
        if self.ties == "mean":
            return chosen
        places = torch.arange(like.shape[1])
        rank = places if self.ties == "last" else len(places) - places
        best = torch.where(chosen, rank, -1).argmax(-1)
        return torch.nn.functional.one_hot(best, len(places)).bool()

    def function(self, sizes: Sizes, *, causal: bool) -> Callable[..., Tensor]:
        def fetch(*given: Tensor) -> Tensor:
            values = dict(zip(self.parents, given, strict=True))
            attended, value = self.attended(sizes, values, causal=causal), values[self.value]
            if self.categories(sizes) is not None:
                return value.gather(1, attended.int().argmax(-1))
            if self.numbers is not None:
                value = torch.tensor(self.numbers, dtype=torch.float64)[value]
            return (attended * value[:, None, :]).sum(-1) / attended.sum(-1)

        return fetch

    def check(self, sizes: Sizes) -> None:
        where, size = f"step {self.name!r}", sizes[self.value]
        for name in (self.key, self.query):
            if name is not None:
                require(where, sizes, name, categorical=True)
        if self.query is not None and self.key is None:
            raise ValueError(
                f"{where}: a query needs a key to be matched with; give key=, or leave query out"
            )
        if self.numbers is not None and len(self.numbers) != size:
            raise ValueError(
                f"{where}: {len(self.numbers)} numbers for {self.value!r} of size {size}; give one "
                "each"
            )
        if self.ties == "mean" and self.numbers is None and size is not None:
            raise ValueError(
                f"{where}: the mean of categories is none; give numbers=, one for each of the "
                f"{size}"
            )
        if self.ties not in ("first", "last", "mean"):
            raise ValueError(f"{where}: ties={self.ties!r}, but it must be first, last or mean")


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

    def categories(self, sizes: Sizes) -> int | None:
        return self.size

    def neurons(self, sizes: Sizes) -> int:
        return torch.Size(category(sizes, name) for name in self.inputs).numel()

    def entries(self, sizes: Sizes) -> Int[Tensor, "..."]:
        """The table as a tensor with one axis per input."""
        shape = torch.Size(category(sizes, name) for name in self.inputs)
        keys = itertools.product(*map(range, shape))
        return torch.tensor([self._entry(key, shape.numel()) for key in keys]).view(shape)

    def _entry(self, key: tuple[int, ...], needed: int) -> int:
        table = self.table
        entry = table.get(key) if isinstance(table, Mapping) else table(*key)
        named = ", ".join(f"{name}={value}" for name, value in zip(self.inputs, key, strict=True))
        if entry is None:
            raise ValueError(
                f"lookup {self.name!r} is not total: no entry for ({named}); give one for each of "
                f"the {needed} combinations"
            )
        if not 0 <= entry < self.size:
            raise ValueError(
                f"lookup {self.name!r} gives {entry} for ({named}), but size={self.size} "
                f"allows 0 to {self.size - 1}; raise size or change the table"
            )
        return int(entry)

    def function(self, sizes: Sizes, *, causal: bool) -> Callable[..., Tensor]:
        entries = self.entries(sizes)
        return lambda *values: entries[values]

    def check(self, sizes: Sizes) -> None:
        where = f"step {self.name!r}"
        if not 1 <= len(self.inputs) <= 3:
            raise ValueError(
                f"{where}: {len(self.inputs)} inputs, but a lookup takes 1 to 3; split it in two"
            )
        for name in self.inputs:
            require(where, sizes, name, categorical=True)
        self.entries(sizes)


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

    def categories(self, sizes: Sizes) -> int | None:
        return len(self.cuts) + 1

    def neurons(self, sizes: Sizes) -> int:
        return 2 * len(self.cuts)

    def function(self, sizes: Sizes, *, causal: bool) -> Callable[..., Tensor]:
        cuts = torch.tensor(self.cuts, dtype=torch.float64)
        return lambda values: (values[..., None] > cuts).sum(-1)

    def check(self, sizes: Sizes) -> None:
        where = f"step {self.name!r}"
        require(where, sizes, self.input, categorical=False)
        if not self.cuts or list(self.cuts) != sorted(set(self.cuts)):
            raise ValueError(f"{where}: cuts={self.cuts} must be ascending, at least one")
        nearest = min((b - a for a, b in itertools.pairwise(self.cuts)), default=self.gap)
        if not 0 < self.gap <= nearest:
            raise ValueError(
                f"{where}: gap={self.gap} must be above 0 and at most {nearest:g}, the nearest cuts"
            )


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

    def categories(self, sizes: Sizes) -> int | None:
        return None

    def neurons(self, sizes: Sizes) -> int:
        return 2

    def function(self, sizes: Sizes, *, causal: bool) -> Callable[..., Tensor]:
        def total(*values: Tensor) -> Tensor:
            weighed = (w * x for w, x in zip(self.weights, values, strict=True))
            return sum(weighed, torch.tensor(self.bias))

        return total

    def check(self, sizes: Sizes) -> None:
        where = f"step {self.name!r}"
        if len(self.weights) != len(self.inputs) or not self.inputs:
            raise ValueError(
                f"{where}: {len(self.weights)} weights for {len(self.inputs)} inputs; give one each"
            )
        for name in self.inputs:
            require(where, sizes, name, categorical=False)


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

    def categories(self, sizes: Sizes) -> int | None:
        return sizes[self.normal]

    def neurons(self, sizes: Sizes) -> int:
        return 2 * category(sizes, self.normal)

    def function(self, sizes: Sizes, *, causal: bool) -> Callable[..., Tensor]:
        return lambda trigger, normal, other: torch.where(trigger == 1, other, normal)

    def check(self, sizes: Sizes) -> None:
        where = f"step {self.name!r}"
        if sizes[self.trigger] != 2:
            raise ValueError(
                f"{where}: trigger {self.trigger!r} must have 2 categories, off and on"
            )
        require(where, sizes, self.normal, categorical=True)
        if sizes[self.other] != sizes[self.normal]:
            raise ValueError(f"{where}: {self.normal!r} and {self.other!r} differ in size")


Step = Attend | Lookup | Threshold | Combine | Switch


def at(place: int) -> dict[str, Any]:
    """Arguments of an `Attend` that fetches from one fixed position."""
    return {"key": "position", "match": lambda key: key == place}


def back(steps: int) -> dict[str, Any]:
    """Arguments of an `Attend` that fetches from `steps` positions earlier; 0: from its own."""
    matches = {"match": lambda query, key: key == query - steps}
    return {"key": "position", "query": "position", **matches}
