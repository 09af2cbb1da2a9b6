"""Features of inputs: what a node of a hypothesis depends on, and inputs that agree in it.

A feature has a value for each prompt.  Names stand for

    exact, any           the prompt itself, and nothing at all
    answer               the right answers; wrong_answer those that are held against them
    token@5, token@-1    the token at a position, from the end where it is negative
    what the prompts bring (`features` of a prompt file), or the caller gives

Prompts are exchanged only for others of as many tokens, whatever the feature.

Shapes: n prompts, m references.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.prompts import Prompts

BUILT_IN = ("exact", "any", "answer", "wrong_answer", "token@POSITION")
Given = Mapping[str, Sequence[Hashable] | Tensor]


@dataclass(frozen=True)
class Classes:
    """Which prompts agree in a feature.

    `order` has the prompts of a class beside each other; a class starts at `first` there, and has
    `size` prompts.
    """

    of_prompt: Int[Tensor, " n"]
    order: Int[Tensor, " n"]
    first: Int[Tensor, " classes"]
    size: Int[Tensor, " classes"]

    @classmethod
    def of(cls, values: Sequence[Hashable]) -> Classes:
        """The classes of prompts with the same value."""
        numbers: dict[Hashable, int] = {}
        of_prompt = torch.tensor([numbers.setdefault(value, len(numbers)) for value in values])
        size = of_prompt.bincount()
        return cls(of_prompt, of_prompt.argsort(stable=True), size.cumsum(0) - size, size)

    @property
    def alone(self) -> Bool[Tensor, " n"]:
        """Which prompts agree with no other one."""
        return self.size[self.of_prompt] == 1

    def draw(
        self, references: Int[Tensor, " m"], generator: torch.Generator, *, exclude_self: bool
    ) -> Int[Tensor, " m"]:
        """For each reference a prompt that agrees with it, uniformly.

        With `exclude_self` not itself, unless it is alone in its class.
        """
        own = self.of_prompt[references]
        size, first = self.size[own], self.first[own]
        others = (size - 1).clamp(min=1) if exclude_self else size
        share = torch.rand(len(references), generator=generator, dtype=torch.float64)
        place = (share * others).long().clamp(max=others - 1)
        if exclude_self:
            place = torch.where(size > 1, place + (place >= self._rank[references] - first), place)
        return self.order[first + place]

    @property
    def _rank(self) -> Int[Tensor, " n"]:
        """Where each prompt is in `order`."""
        return torch.empty_like(self.order).scatter_(0, self.order, torch.arange(len(self.order)))


def classes(prompts: Prompts, features: Sequence[str], given: Given | None = None) -> Classes:
    """Which prompts agree in all of some features, and in how many tokens they have.

    Raises:
        ValueError: a feature that is not known, that the prompts lack, or of another number of
            prompts.
    """
    columns = [prompts.lengths.tolist()]
    columns += [_values(prompts, feature, given or {}) for feature in features]
    return Classes.of(list(zip(*columns, strict=True)))


def _values(prompts: Prompts, feature: str, given: Given) -> list[Hashable]:
    """A feature's value for each prompt."""
    if feature in given or feature in prompts.features:
        values = given[feature] if feature in given else prompts.features[feature]
        if len(values) != len(prompts):
            raise ValueError(
                f"feature {feature!r} has {len(values)} values, but there are {len(prompts)} "
                "prompts"
            )
        return values.tolist() if isinstance(values, Tensor) else list(values)
    if feature == "exact":
        return list(range(len(prompts)))
    if feature == "any":
        return [None] * len(prompts)
    if feature in ("answer", "wrong_answer"):
        tokens = prompts.answers if feature == "answer" else prompts.wrong_answers
        if tokens is None:
            raise ValueError(f"the prompts have no {feature}s, which feature {feature!r} asks for")
        rows = tokens.tolist()
        return [tuple(tuple(sorted(place)) for place in row) for row in rows]
    if match := re.fullmatch(r"token@(-?\d{1,9})", feature):
        return _tokens(prompts, feature, int(match[1]))
    known = [*given, *prompts.features, *BUILT_IN]
    raise ValueError(f"feature {feature!r} is unknown; known are {', '.join(known)}")


def _tokens(prompts: Prompts, feature: str, position: int) -> list[Hashable]:
    at, short = from_the_first(prompts, (position,))
    if short is not None:
        raise ValueError(
            f"feature {feature!r}: prompt {prompts.ids[short]!r} has only "
            f"{int(prompts.lengths[short])} tokens"
        )
    return prompts.clean.gather(1, at)[:, 0].tolist()


def from_the_first(
    prompts: Prompts, positions: Sequence[int]
) -> tuple[Int[Tensor, "n p"], int | None]:
    """Positions of prompts, negative ones counted from the end; and the first that lacks one."""
    given, lengths = torch.tensor(positions), prompts.lengths[:, None]
    at = torch.where(given < 0, given + lengths, given)
    short = ((at < 0) | (at >= lengths)).any(1).nonzero()[:, 0].tolist()
    return at, short[0] if short else None
