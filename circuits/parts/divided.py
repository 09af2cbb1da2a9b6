"""A model whose values are divided into units: plain runs, runs under a mask of units, gradients.

A run under a mask m is a plain run in which every site's numbers become

    n + (m - 1) (n - n_ablated)

with n the numbers of this very run, so that a unit with m = 1 keeps what it does here, one with
m = 0 does what it does in the ablation, and a mask of ones gives the model exactly.  It takes one
forward pass, and an encoder and a decoder at each site that has a dictionary.

Where a norm stands between a site and the residual stream (heads and neurons of Gemma 2, whose
norms are of all that attention or the MLP adds), its factor is that of the run under the mask.

Shapes: candidate masks K, batch B, pos S, scored positions P, d_model D, units U, numbers of all
sites Z (`circuits.parts.readings`), vocabulary V.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.ablation.source import Source
from circuits.engine.engine import Engine
from circuits.engine.memory import Footprint
from circuits.parts.readings import Decoded, Reading
from circuits.parts.units import Units
from circuits.prompts.prompts import Prompts


@dataclass(frozen=True)
class Divided(Source):
    """A model with its units; as a source of ablations one row, the numbers of all sites.

    The first reading is that of the input, whether or not it is a unit.
    """

    engine: Engine
    units: Units
    readings: tuple[Reading, ...]  # of the input, then of each other site in order

    @cached_property
    def _spans(self) -> dict[str, tuple[Reading, slice, slice]]:
        """By place: the reading, its numbers, and its units (none: an empty slice)."""
        spans, start = {}, 0
        own = {site.name: span for site, span in self.units.spans()}
        for reading in self.readings:
            numbers = slice(start, start + reading.numbers)
            spans[reading.place] = (reading, numbers, own.get(_site(reading.place), slice(0, 0)))
            start = numbers.stop
        return spans

    @property
    def numbers(self) -> int:
        """Z"""
        return sum(reading.numbers for reading in self.readings)

    @property
    def input_numbers(self) -> slice:
        """Those of the input, what its writers write."""
        return self._spans["input"][1]

    # ---- as a source of ablations ----------------------------------------------------------------

    def shape(self, engine: Engine) -> tuple[int, int]:
        return 1, self.numbers

    @torch.no_grad()
    def read(self, engine: Engine, prompts: Prompts) -> Float[Tensor, "1 B S Z"]:
        """The numbers of all sites in a plain run."""
        read = {}

        def keep(place: str, value: Tensor, given: Tensor) -> Tensor:
            if place in self._spans:
                read[place] = self._spans[place][0].read(value, given)
            return value

        engine.edited(prompts, keep)
        return torch.cat([read[place] for place in self._spans], -1)[None]

    def footprint(self, size: Footprint) -> int:
        return size.plain + 2 * self.token_bytes * size.tokens

    def space(self, engine: Engine) -> Units:
        return self.units

    def prepared(
        self, engine: Engine, values: Float[Tensor, "1 B S Z"]
    ) -> Float[Tensor, "B_or_1 S_or_1 Z"]:
        return values[0]

    def under(
        self, engine: Engine, prompts: Prompts, masks: Float[Tensor, "*B_U_S"], ablated: Tensor
    ) -> Float[Tensor, "B P V"]:
        each = masks.ndim > len(self.units.shape)
        return self.masked(prompts, masks, ablated, per_example=each)

    def gradient(self, size: Footprint) -> int:
        return max(size.plain, size.attribution) + 7 * self.token_bytes * size.tokens

    @property
    def token_bytes(self) -> int:
        """What the numbers of one token take."""
        return self.engine.dtype.itemsize * self.numbers

    # ---- runs under a mask -----------------------------------------------------------------------

    def masked(
        self,
        prompts: Prompts,
        mask: Float[Tensor, "*K U *S"],
        ablated: Float[Tensor, "B_or_1 S_or_1 Z"],
        *,
        embedded: Float[Tensor, "B S D"] | None = None,
        per_example: bool = False,
    ) -> Float[Tensor, "*KB P V"]:
        """Runs the model under a mask of units, or K masks at once; logits where it is scored.

        Differentiable in the mask, in `embedded`, in `ablated` and in the weights.

        Args:
            mask: share of each unit that is kept, [U] or [K, U] (with one more axis, of positions,
                where units are told apart by position).
            ablated: the numbers that units without a share have.
            embedded: what the run starts from; None: what the input writers write.
            per_example: mask k is for example k alone (K = B), and the result is [B, P, V].

        Raises:
            ValueError: the mask has another shape than the units', or prompts another length than
                units by position are told apart for.
        """
        prompts = prompts.to(self.engine.device)
        single = mask.ndim == len(self.units.shape)
        self._check_mask(prompts, mask, per_example)
        masks = (mask[None] if single else mask).to(self.engine.device, self.engine.dtype)
        masks = masks[..., None] if self.units.n_positions is None else masks
        shares = masks.mT - 1  # [K, S or 1, U]
        shares = shares[None] if per_example else shares[:, None]  # [K, B or 1, S or 1, U]
        runs, rows = len(shares), len(prompts)
        if embedded is None:
            embedded = self.engine.embed(prompts).sum(0)

        def mixed(place: str, value: Tensor, given: Tensor) -> Tensor:
            reading, numbers, own = self._spans.get(place, (None, slice(0), slice(0)))
            if reading is None or own.start == own.stop:
                return value
            away = reading.read(value, given).unflatten(0, (runs, rows)) - ablated[..., numbers]
            change = reading.spread(shares[..., own]) * away
            return reading.changed(value, change.flatten(0, 1))

        repeated = prompts.select(torch.arange(rows).repeat(runs)) if runs > 1 else prompts
        logits = self.engine.edited(repeated, mixed, embedded.repeat(runs, 1, 1))
        return logits if single or per_example else logits.unflatten(0, (runs, rows))

    def _check_mask(self, prompts: Prompts, mask: Tensor, per_example: bool) -> None:
        axes = len(self.units.shape)
        if mask.shape[-axes:] != self.units.shape:
            raise ValueError(
                f"mask of shape {tuple(mask.shape)}, but there are {self.units.n_units} units"
                + (f" at {self.units.n_positions} positions" if self.units.n_positions else "")
            )
        prompts.check_length(self.units.n_positions)
        if per_example and mask.shape[:-axes] != prompts.clean.shape[:1]:
            raise ValueError(
                f"per_example needs one mask per prompt: {tuple(mask.shape)} for "
                f"{len(prompts)} prompts"
            )

    # ---- gradients -------------------------------------------------------------------------------

    def gradients(
        self,
        prompts: Prompts,
        embedded: Float[Tensor, "B S D"],
        scalar: Callable[[Float[Tensor, "B P V"]], Float[Tensor, ""]],
        rule: str = "plain",
    ) -> Float[Tensor, "B S Z"]:
        """Gradients of `scalar(logits)` in a change of each number, in a run from `embedded`.

        `rule` says what the backward pass takes the model for (`circuits.engine.rules`).
        """
        changes: dict[str, Tensor] = {}

        def tap(place: str, value: Tensor, given: Tensor) -> Tensor:
            if place not in self._spans:
                return value
            reading = self._spans[place][0]
            shape = (*value.shape[:-1], reading.numbers)
            changes[place] = value.new_zeros(shape).requires_grad_()
            return reading.changed(value, changes[place])

        with torch.enable_grad():
            total = scalar(self.engine.edited(prompts, tap, embedded.detach(), rule=rule))
            found = torch.autograd.grad(total, [changes[place] for place in self._spans])
        return torch.cat(found, -1)

    def gathered(self, products: Float[Tensor, "*B S Z"]) -> Float[Tensor, "*B S U"]:
        """The sum over the numbers of each unit."""
        parts = {
            own.start: reading.gathered(products[..., numbers])
            for reading, numbers, own in self._spans.values()
            if own.start != own.stop
        }
        return torch.cat([parts[start] for start in sorted(parts)], -1)

    def unexplained(self, numbers: Float[Tensor, "B S Z"], prompts: Prompts) -> Mapping[str, float]:
        """Of each site with a dictionary: |error|^2 over what a constant value would leave."""
        shares, real = {}, prompts.key_mask.to(numbers.device)
        for reading, span, _ in self._spans.values():
            if isinstance(reading, Decoded):
                own, features = numbers[real][:, span].double(), reading.dictionary.features
                z, error = own[:, :features], own[:, features:]
                value = reading.dictionary.rebuilt(z.to(numbers.dtype)).double() + error
                spread = (value - value.mean(0)).square().sum()
                shares[reading.place] = (error.square().sum() / spread).item()
        return shares


def _site(place: str) -> str:
    """The site's name of a place in a run."""
    return place.removesuffix(".z")
