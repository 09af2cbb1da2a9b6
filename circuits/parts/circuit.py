"""A circuit of units: the kept ones, the scores of all of them, and how they were found.

On disk it is a folder like that of a circuit of edges (`circuits.circuit`): `circuit.json` with the
kept units, `scores.safetensors` with the scores of all and, of a learned mask, the parameters of
its gates.  Nothing in either can run code.

Shapes: units U; `*S` positions, where units are told apart by position.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.circuit import FORMAT, MOST_SCORE, Circuit
from circuits.circuit_files import (
    check_finite,
    circuit_file,
    drawn_masks,
    said,
    told_mask,
    with_stored,
)
from circuits.files import read_json, write_tensors, write_text
from circuits.mask_distribution import MaskDistribution
from circuits.parts.units import Units


@dataclass(frozen=True, eq=False)
class UnitCircuit:
    """Kept units with their scores; `about` says which model, task, method, ... gave them.

    >>> from circuits.parts.units import Site
    >>> units = Units((Site("heads", 0, 2), Site("mlp", 0)))
    >>> circuit = UnitCircuit(units, kept=units.exists, scores=torch.tensor([0.5, -1.0, 2.0]))
    >>> circuit, circuit.units[0]
    (UnitCircuit(3 of 3 units), ('a0.h0', 0.5))
    """

    space: Units
    kept: Bool[Tensor, "U *S"]
    scores: Float[Tensor, "U *S"]
    about: Mapping[str, Any] = field(default_factory=dict)
    trained: MaskDistribution | None = None  # the mask that it was taken from, if one was learned

    def __len__(self) -> int:
        """Number of kept units."""
        return int(self.kept.sum())

    def __repr__(self) -> str:
        told = [(name, self.says(name)) for name in ("method", "metric", "ablation")]
        parts = [f"{name}={value}" for name, value in told if value]
        whole = f"{len(self)} of {self.space.n_parts} units"
        return f"UnitCircuit({', '.join([whole, *parts])})"

    def says(self, field_name: str) -> str:
        """The name of its task, method, metric or ablation; empty where it does not say."""
        return said(self.about, field_name)

    @property
    def units(self) -> list[tuple[str, float]]:
        """Names and scores of the kept units, in forward order."""
        names = (self.space.part_name(*unit) for unit in self.kept.nonzero().tolist())
        return list(zip(names, self.scores[self.kept].tolist(), strict=True))

    @property
    def over_positions(self) -> UnitCircuit:
        """It without positions: each unit that is kept at any has the sum of its kept scores."""
        if self.space.n_positions is None:
            return self
        space = replace(self.space, n_positions=None)
        return replace(
            self,
            space=space,
            kept=self.kept.any(-1),
            scores=(self.scores * self.kept).sum(-1),
        )

    @property
    def mask(self) -> Float[Tensor, "U *S"]:
        """1 where a unit is kept, else 0."""
        return self.kept.float()

    def sample(self, n: int, seed: int) -> list[UnitCircuit]:
        """Draws circuits from the trained mask; all should do what this one does.

        Raises:
            ValueError: it was found by no learned mask, or n is under 1.
        """
        drawn = drawn_masks(self, n, seed)
        return [replace(self, kept=kept, about=about) for kept, about in drawn]

    def save(self, folder: str | Path) -> None:
        """Writes a folder, made if need be; ValueError where a kept unit's score is not finite."""
        check_finite("unit", self.units)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        mask, gates = told_mask(self.trained)
        data = {
            "format": FORMAT,
            **self.about,
            "space": self.space.to_json(),
            "units": [{"unit": name, "score": score} for name, score in self.units],
        } | {"format": FORMAT, **mask}  # whatever `about` says
        text = json.dumps(data, indent=1, allow_nan=False) + "\n"
        write_text(folder / "circuit.json", text)
        write_tensors(folder / "scores.safetensors", {"scores": self.scores, **gates})

    @classmethod
    def load(cls, path: str | Path) -> UnitCircuit:
        """Reads a circuit from its folder or `circuit.json`; scores left out there are 0.

        Raises:
            FileNotFoundError: there is no circuit.json.
            ValueError: it is broken, of another format, of edges, names units that it has not, or
                `scores.safetensors` beside it has other scores, or no mask that fits.
        """
        path = circuit_file(path)
        try:
            circuit = cls._from_json(read_json(path))
        except KeyError as error:
            raise ValueError(
                f"{path} is no circuit file that can be read: it lacks {error}"
            ) from error
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no circuit file that can be read: {error}") from error
        return with_stored(circuit, path)

    @classmethod
    def _from_json(cls, data: Any) -> UnitCircuit:
        if not isinstance(data, dict):
            raise TypeError("it holds no mapping")
        version = data.pop("format")
        if version != FORMAT:
            raise ValueError(f"it has format {version}, but this version reads format {FORMAT}")
        space = Units.from_json(data.pop("space"))
        kept, scores = torch.zeros(space.shape, dtype=torch.bool), torch.zeros(space.shape)
        for entry in data.pop("units"):
            name, score = entry["unit"], entry["score"]
            index = space.index(name)
            if kept[index]:
                raise ValueError(f"unit {name!r} is there twice")
            if not abs(score) <= MOST_SCORE:
                raise ValueError(f"unit {name!r} has score {score!r}; scores must be finite")
            kept[index], scores[index] = True, score
        return cls(space, kept, scores, data)


def load_circuit(path: str | Path) -> Circuit | UnitCircuit:
    """Reads a circuit of edges or of units; raises as `Circuit.load` and `UnitCircuit.load`.

    >>> from tempfile import TemporaryDirectory
    >>> from circuits.parts.units import Site
    >>> units = Units((Site("heads", 0, 2),))
    >>> with TemporaryDirectory() as folder:
    ...     UnitCircuit(units, units.exists, torch.ones(2)).save(folder)
    ...     load_circuit(folder)
    UnitCircuit(2 of 2 units)
    """
    try:
        data = read_json(circuit_file(path))
    except ValueError:
        return Circuit.load(path)  # which says what is wrong
    of_units = isinstance(data, dict) and "units" in data
    return UnitCircuit.load(path) if of_units else Circuit.load(path)
