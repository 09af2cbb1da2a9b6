"""A set of prompts as tensors: what the engine takes.

Records and their schema: `circuits.prompts.encoding`; files: `circuits.prompts.files`; generators:
`circuits.tasks`.

Shapes: n prompts, pos tokens in the longest of them, scored positions, answer and wrong answers at
each.  Token rows are padded on the right with 0 (`key_mask` tells padding from tokens), all other
rows with -1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.prompts.errors import InputError

NONE = -1  # no position, no answer


@dataclass(frozen=True, eq=False)
class Prompts:
    """A set of prompts.

    Either all of them have a corrupt prompt, answers, wrong answers, a label, or none has.

    >>> prompts = Prompts.from_tokens(torch.tensor([[5, 7, 5]]))
    >>> len(prompts), prompts.positions.tolist()
    (1, [[0, 1, 2]])
    """

    clean: Int[Tensor, "n pos"]  # right-padded with 0
    lengths: Int[Tensor, " n"]
    corrupt: Int[Tensor, "n pos"] | None  # as long as clean, prompt by prompt
    positions: Int[Tensor, "n scored"]  # counted from the first token; -1 = none
    answers: Int[Tensor, "n scored answer"] | None  # -1 = none
    wrong_answers: Int[Tensor, "n scored wrong"] | None  # -1 = none
    labels: Int[Tensor, " n"] | None  # 0 normal, 1 anomalous
    ids: tuple[str, ...]
    # what a prompt is about, in the user's own words: a value for each prompt by name
    features: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)

    @classmethod
    def from_tokens(
        cls,
        tokens: Int[Tensor, "n pos"],
        *,
        lengths: Int[Tensor, " n"] | None = None,
        positions: Int[Tensor, "n scored"] | None = None,
    ) -> Prompts:
        """Token ids as prompts without answers.

        Args:
            tokens: padded on the right.
            lengths: how many of them are real; None: all.
            positions: which are scored, -1 = none; None: all real ones.
        """
        rows, width = tokens.shape
        lengths = tokens.new_full((rows,), width) if lengths is None else lengths
        if positions is None:
            everywhere = torch.arange(width, device=tokens.device).expand(rows, -1)
            positions = everywhere.masked_fill(everywhere >= lengths[:, None], NONE)
        return cls(
            clean=tokens,
            lengths=lengths,
            corrupt=None,
            positions=positions,
            answers=None,
            wrong_answers=None,
            labels=None,
            ids=tuple(f"prompt {row}" for row in range(1, rows + 1)),
        )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def key_mask(self) -> Bool[Tensor, "n pos"]:
        """True on tokens, False on padding."""
        return torch.arange(self.clean.shape[1], device=self.clean.device) < self.lengths[:, None]

    def at_scored(self, values: Float[Tensor, "*k n pos d"]) -> Float[Tensor, "*k n scored d"]:
        """Values at the scored positions; absent ones (-1) give some position, to be left out."""
        index = self.positions.clamp(min=0)[..., None]
        return values.gather(-2, index.expand(*values.shape[:-2], -1, values.shape[-1]))

    def mean_over_scored(self, values: Float[Tensor, "*k n scored"]) -> Float[Tensor, "*k n"]:
        """The mean over each prompt's scored positions."""
        scored = (self.positions >= 0).to(values.dtype)
        return (values * scored).sum(-1) / scored.sum(-1)

    def check_length(self, n_positions: int | None) -> None:
        """Raises InputError for prompts of other than `n_positions` tokens; None allows any."""
        if n_positions is None:
            return
        if others := sorted(set(self.lengths.tolist()) - {n_positions}):
            raise InputError(
                f"prompts of {others[0]} tokens, but edges are told apart by position for prompts "
                f"of exactly {n_positions}"
            )

    def corrupted(self) -> Prompts:
        """The corrupt prompts, without answers; ValueError where there are none."""
        if self.corrupt is None:
            raise ValueError("the prompts have no corrupt prompt; add `corrupt` to each")
        return replace(self, clean=self.corrupt, corrupt=None, answers=None, wrong_answers=None)

    def cut(self, width: int) -> Prompts:
        """The prompts up to a position, without answers; scored at their first tokens."""
        return replace(
            self.bare(),
            clean=self.clean[:, :width],
            lengths=self.lengths.clamp(max=width),
            positions=torch.zeros_like(self.positions[:, :1]),
        )

    def bare(self) -> Prompts:
        """Only the tokens and the scored positions."""
        return replace(self, corrupt=None, answers=None, wrong_answers=None, labels=None)

    def select(self, indices: Tensor | Sequence[int] | slice) -> Prompts:
        """The prompts at `indices`, numbers or a boolean mask, padded no more than they need."""
        rows = self._rows(indices)
        positions = _trim(self.positions[rows], NONE)  # n scored
        scored = positions.shape[1]
        lengths = self.lengths[rows]
        width = int(lengths.max()) if len(rows) else 0

        def at_positions(answers: Tensor | None) -> Tensor | None:
            return None if answers is None else _trim(answers[rows, :scored], NONE)

        return Prompts(
            clean=self.clean[rows, :width],
            lengths=lengths,
            corrupt=None if self.corrupt is None else self.corrupt[rows, :width],
            positions=positions,
            answers=at_positions(self.answers),
            wrong_answers=at_positions(self.wrong_answers),
            labels=None if self.labels is None else self.labels[rows],
            ids=tuple(self.ids[row] for row in rows.tolist()),
            features={
                name: tuple(values[row] for row in rows.tolist())
                for name, values in self.features.items()
            },
        )

    def batches(self, size: int) -> Iterator[Prompts]:
        """The prompts in order, `size` (at least 1) at a time; the last batch may be smaller."""
        if size < 1:
            raise ValueError(f"size={size}, but a batch needs at least 1 prompt; raise it")
        return (self.select(slice(start, start + size)) for start in range(0, len(self), size))

    def to(self, device: torch.device | str) -> Prompts:
        """The same prompts on `device`."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def sequences(self) -> list[tuple[int, ...]]:
        """The clean token ids of each prompt, without padding."""
        return _rows_without_padding(self.clean, self.lengths)

    def hash(self) -> str:
        """A hex SHA-256 of the set; order, padding, ids and device do not matter."""
        nothing: list = [None] * len(self)
        labels = nothing if self.labels is None else self.labels.tolist()
        corrupt = nothing
        if self.corrupt is not None:
            corrupt = _rows_without_padding(self.corrupt, self.lengths)
        scored = self._scored()
        contents = {json.dumps(parts) for parts in zip(self.sequences(), corrupt, scored, labels)}
        return hashlib.sha256("\n".join(sorted(contents)).encode()).hexdigest()

    def deduplicated(self) -> Prompts:
        """The first prompt of each clean token sequence, in order; later answers are left out."""
        first: dict[tuple[int, ...], int] = {}
        for row, sequence in enumerate(self.sequences()):
            first.setdefault(sequence, row)
        return self.select(list(first.values()))

    def overlap(self, other: Prompts) -> int:
        """How many different clean token sequences both sets hold."""
        return len(set(self.sequences()) & set(other.sequences()))

    def split(self, sizes: Mapping[str, int], seed: int) -> dict[str, Prompts]:
        """Shuffled parts of the given sizes, no two of which share a clean token sequence.

        Raises:
            ValueError: a size under 1, or fewer different prompts than the sizes add up to.
        """
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(
                    f"{name}={size}, but a part needs at least 1 prompt; raise it or leave it out"
                )
        distinct, total = self.deduplicated(), sum(sizes.values())
        if total > len(distinct):
            wanted = ", ".join(f"{name}={size}" for name, size in sizes.items())
            raise ValueError(
                f"{wanted} make {total} prompts, but only {len(distinct)} of {len(self)} are "
                "different; lower the sizes or give more prompts"
            )
        order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))
        parts = torch.split(order[:total], list(sizes.values()))
        return {name: distinct.select(part) for name, part in zip(sizes, parts)}

    def _rows(self, indices: Tensor | Sequence[int] | slice) -> Int[Tensor, " m"]:
        if isinstance(indices, slice):
            indices = range(len(self))[indices]
        rows = indices if isinstance(indices, Tensor) else torch.tensor(list(indices))
        if rows.dtype == torch.bool:
            if rows.shape != (len(self),):
                raise ValueError(
                    f"a mask of shape {tuple(rows.shape)}, but there are {len(self)} prompts"
                )
            rows = rows.nonzero()[:, 0]
        rows = rows.to(device=self.clean.device, dtype=torch.long)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise ValueError(
                f"indices from {int(rows.min())} to {int(rows.max())}, but there are {len(self)} "
                f"prompts; stay within 0 to {len(self) - 1}"
            )
        return rows

    def _scored(self) -> list[list]:
        """Each prompt's scored positions, ascending, with sorted answers and wrong answers."""
        positions = self.positions.tolist()
        nothing = [[None] * len(row) for row in positions]
        answers = nothing if self.answers is None else _real(self.answers)
        wrong = nothing if self.wrong_answers is None else _real(self.wrong_answers)
        return [
            sorted((place for place in zip(*row) if place[0] != NONE), key=lambda place: place[0])
            for row in zip(positions, answers, wrong)
        ]


def _trim(padded: Tensor, value: int) -> Tensor:
    """`padded` without the columns of its last axis that hold nothing but `value`."""
    if not padded.numel():
        return padded[..., :0]
    used = (padded != value).flatten(end_dim=-2).any(dim=0)
    return padded[..., : int(used.sum())]  # used columns come first


def _rows_without_padding(tokens: Tensor, lengths: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row[:length]) for row, length in zip(tokens.tolist(), lengths.tolist())]


def _real(answers: Tensor) -> list[list[list[int]]]:
    def real(tokens: list[int]) -> list[int]:
        return sorted(token for token in tokens if token != NONE)

    return [list(map(real, row)) for row in answers.tolist()]
