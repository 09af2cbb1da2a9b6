"""Units: what a mask may act on besides edges, by name and by index.

A *site* is a place of a run whose value is made of parts; each part is a unit.

    kind                 site                                     its units
    input                what the input writers write             input
    heads                what the heads of a block have moved     a0.h0, a0.h1, ...
    mlp                  what an MLP writes                       m1
    neurons              what an MLP's last projection reads      m1.n0, m1.n1, ...
    mlp_features         what an MLP writes, by a dictionary      m1.f0, m1.f1, ..., m1.error
    residual_features    the residual stream before a block       r3.f0, r3.f1, ..., r3.error

`r3` is the stream between blocks 2 and 3, counted from 0; that after all L blocks is `rL`.  For
templated prompts units may be told apart by position, `m1.n37@5`, and masks have one more axis.

Shapes: units U; `*S` positions, or nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.files import restored
from circuits.names import INPUT, UnitName, mlp_name, parse_unit
from circuits.space import Space

SiteKind = Literal["input", "heads", "mlp", "neurons", "mlp_features", "residual_features"]
MOST_UNITS = 2**28  # entries of a mask that can be held

# of the units of each kind: what is before the number, "" where there is but one
_STEMS: Mapping[str, str] = {
    "heads": "a{layer}.h",
    "neurons": "m{layer}.n",
    "mlp_features": "m{layer}.f",
    "residual_features": "r{layer}.f",
}
_FEATURES = ("mlp_features", "residual_features")  # that have an error beside them


@dataclass(frozen=True)
class Site:
    """A site with as many heads, neurons or features as `count` says.

    >>> Site("mlp_features", layer=1, count=2).names
    ['m1.f0', 'm1.f1', 'm1.error']
    """

    kind: SiteKind
    layer: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.kind not in get_args(SiteKind):
            raise ValueError(
                f"a site of kind {self.kind!r}, but they are {', '.join(get_args(SiteKind))}"
            )
        least = {"layer": 0, "count": 1}
        for field, bound in least.items():
            if getattr(self, field) < bound:
                raise ValueError(
                    f"{field}={getattr(self, field)} of {self.kind}, but it must be at least "
                    f"{bound}"
                )

    def __len__(self) -> int:
        """How many units it has."""
        return self.count + (self.kind in _FEATURES)

    @property
    def name(self) -> str:
        """Of the site: `a0`, `m1`, `r3` or `input`."""
        if self.kind in ("input", "mlp"):
            return self.unit(0)
        return self.unit(0).partition(".")[0]

    @property
    def names(self) -> list[str]:
        """The names of its units."""
        return [self.unit(number) for number in range(len(self))]

    def unit(self, number: int) -> str:
        """The name of one of its units."""
        if self.kind == "input":
            return INPUT
        if self.kind == "mlp":
            return mlp_name(self.layer)
        stem = _STEMS[self.kind].format(layer=self.layer)
        if self.kind in _FEATURES and number == self.count:
            return f"{stem.removesuffix('f')}error"
        return f"{stem}{number}"

    def number(self, unit: UnitName) -> int | None:
        """The number of a unit; None where it is of another site, or there is none such."""
        number = self.count if unit.kind == "error" else unit.number
        told = number < len(self) and self.unit(number) == unit.name
        return number if told else None


@dataclass(frozen=True)
class Units(Space):
    """All units of some sites, in forward order.

    >>> units = Units((Site("heads", 0, 4), Site("neurons", 0, 20)))
    >>> units.n_parts, units.part_name(3), units.index("m0.n5")
    (24, 'a0.h3', (9,))

    Raises:
        ValueError: no site, a site twice, or more units than a mask can hold.
    """

    sites: tuple[Site, ...]
    n_positions: int | None = None  # units per position, for prompts of exactly this many tokens

    noun: ClassVar[str] = "units"

    def __post_init__(self) -> None:
        if not self.sites:
            raise ValueError("there is no site, and so no unit")
        if self.n_positions is not None and self.n_positions < 1:
            raise ValueError(
                f"n_positions={self.n_positions}, but units per position need at least 1"
            )
        names = [site.name for site in self.sites]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name} is divided twice; divide it once")
        if self.n_parts > MOST_UNITS:
            raise ValueError(
                f"{self.n_parts} units (at all positions), more than the {MOST_UNITS} that can be "
                "held"
            )

    @cached_property
    def n_units(self) -> int:
        """How many units there are, not told apart by position."""
        return sum(map(len, self.sites))

    @property
    def n_parts(self) -> int:
        """How many units there are, at all positions where they are told apart."""
        return self.n_units * (self.n_positions or 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a mask."""
        return (self.n_units,) if self.n_positions is None else (self.n_units, self.n_positions)

    @cached_property
    def exists(self) -> Bool[Tensor, "U *S"]:
        """True throughout: every unit can be kept."""
        return torch.ones(self.shape, dtype=torch.bool)

    def spans(self) -> Iterator[tuple[Site, slice]]:
        """Each site with the indices of its units."""
        start = 0
        for site in self.sites:
            yield site, slice(start, start + len(site))
            start += len(site)

    def part_name(self, *index: int) -> str:
        """The name of a unit by its index: its number and, where told apart, its position."""
        unit, *position = index
        site, span = next((s, at) for s, at in self.spans() if unit < at.stop)
        return site.unit(unit - span.start) + "".join(f"@{one}" for one in position)

    def index(self, name: str) -> tuple[int, ...]:
        """The index of a unit by its name; ValueError for none of these."""
        unit = parse_unit(name)
        positions = [None] if self.n_positions is None else range(self.n_positions)
        for site, span in self.spans():
            number = site.number(unit)
            if number is not None and unit.position in positions:
                index = span.start + number
                return (index,) if unit.position is None else (index, unit.position)
        example = self.part_name(0, *([0] if self.n_positions else []))
        raise ValueError(
            f"unit {name!r} is none of the {self.n_parts} units of "
            f"{', '.join(site.name for site in self.sites[:8])}; they look like {example!r}"
        )

    def without_dead_ends(self, kept: Bool[Tensor, "U *S"]) -> Bool[Tensor, "U *S"]:
        """The kept units, each of which the logits depend on by itself."""
        return kept

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, data: object) -> Units:
        """The units that `to_json` told; ValueError where it told something else."""
        if not isinstance(data, Mapping) or not isinstance(data.get("sites"), list):
            raise ValueError("space tells no sites")
        if unknown := sorted(map(str, set(data) - {"sites", "n_positions"})):
            raise ValueError(f"space.{unknown[0]} is unknown; the fields are sites, n_positions")
        sites = tuple(
            restored(Site, one, f"space.sites[{number}]")
            for number, one in enumerate(data["sites"])
        )
        positions = data.get("n_positions")
        if not (positions is None or type(positions) is int):
            raise ValueError(f"space.n_positions is {positions!r}, but it must be int | None")
        return cls(sites, positions)
