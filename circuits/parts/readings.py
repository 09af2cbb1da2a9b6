"""How the numbers of a site's units are read of a value, and how a change of them is put back.

A site has numbers at every token, some for each of its units, and its value is linear in them.
`read` takes them from a value of a run, `changed` adds a change of them to it.

Shapes: units of the site u, its numbers n, d_model D, features F; `*B` batch and positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.model.architecture import Norm
from circuits.parts.dictionary import Dictionary


class Reading(ABC):
    """A site's numbers."""

    place: str  # in a run, see `circuits.engine.plain.Edit`

    @property
    @abstractmethod
    def numbers(self) -> int:
        """How many there are at a token."""

    @abstractmethod
    def read(self, value: Float[Tensor, "*B D"], given: Tensor) -> Float[Tensor, "*B n"]:
        """The numbers of a value."""

    @abstractmethod
    def changed(
        self, value: Float[Tensor, "*B D"], change: Float[Tensor, "*B n"]
    ) -> Float[Tensor, "*B D"]:
        """The value with its numbers changed."""

    @abstractmethod
    def spread(self, shares: Float[Tensor, "*B u"]) -> Float[Tensor, "*B n"]:
        """What each unit has, at each of its numbers."""

    @abstractmethod
    def gathered(self, products: Float[Tensor, "*B n"]) -> Float[Tensor, "*B u"]:
        """The sum over the numbers of each unit."""


@dataclass(frozen=True)
class Slices(Reading):
    """The value itself, cut into slices of equal width: heads, neurons, or the whole of it."""

    place: str
    count: int
    width: int

    @property
    def numbers(self) -> int:
        return self.count * self.width

    def read(self, value: Tensor, given: Tensor) -> Tensor:
        return value

    def changed(self, value: Tensor, change: Tensor) -> Tensor:
        return value + change

    def spread(self, shares: Tensor) -> Tensor:
        return shares[..., None].expand(*shares.shape, self.width).flatten(-2)

    def gathered(self, products: Tensor) -> Tensor:
        return products.unflatten(-1, (self.count, self.width)).sum(-1)


@dataclass(frozen=True)
class Decoded(Reading):
    """Features of a dictionary, and an error of D numbers: value - sum_f z_f d_f - b."""

    place: str
    dictionary: Dictionary
    norm: Norm | None = None  # of what is `given`, which is encoded then and not the value
    centred: bool = False  # the mean over D is taken off what is encoded

    @property
    def numbers(self) -> int:
        return self.dictionary.features + self.dictionary.decoder.shape[1]

    def read(self, value: Tensor, given: Tensor) -> Tensor:
        encoded = value if self.norm is None else self.norm(given)
        encoded = encoded - encoded.mean(-1, keepdim=True) if self.centred else encoded
        z = self.dictionary.encode(encoded)
        return torch.cat([z, value - self.dictionary.rebuilt(z)], -1)

    def changed(self, value: Tensor, change: Tensor) -> Tensor:
        features = self.dictionary.features
        return value + change[..., :features] @ self.dictionary.decoder + change[..., features:]

    def spread(self, shares: Tensor) -> Tensor:
        features, width = self.dictionary.decoder.shape
        error = shares[..., features:].expand(*shares.shape[:-1], width)
        return torch.cat([shares[..., :features], error], -1)

    def gathered(self, products: Tensor) -> Tensor:
        features = self.dictionary.features
        error = products[..., features:].sum(-1, keepdim=True)
        return torch.cat([products[..., :features], error], -1)
