"""Prompts: clean and corrupt tokens, the positions that are scored and the answers there.

    file or task  ->  records (dicts)  ->  EncodedPrompt (one checked record)  ->  Prompts (one batch of tensors)

Records and their schema: `circuits.prompts.encoding`; files: `circuits.prompts.files`; generators:
    `circuits.tasks`.

Shapes: n prompts, pos tokens in the longest of them, scored positions, answer and wrong answers at
each.  Token rows are padded on the right with 0 (`key_mask` tells padding from tokens), all other
rows with -1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from circuits.prompts.encoding import EncodedPrompt, encode_record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN_PADDING = 0
NONE = -1  # no position, no answer


@dataclass(frozen=True, eq=False)
class Prompts:
    """A set of prompts; either all of them have a corrupt prompt, answers, wrong answers, a label,
    or none has.
    """

    clean: Int[Tensor, "n pos"]  # right-padded with 0
    lengths: Int[Tensor, " n"]
    corrupt: Int[Tensor, "n pos"] | None  # as long as clean, prompt by prompt
    positions: Int[Tensor, "n scored"]  # counted from the first token; -1 = none
    answers: Int[Tensor, "n scored answer"] | None  # -1 = none
    wrong_answers: Int[Tensor, "n scored wrong"] | None  # -1 = none
    labels: Int[Tensor, " n"] | None  # 0 normal, 1 anomalous
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def key_mask(self) -> Bool[Tensor, "n pos"]:
        """True on tokens, False on padding."""
        return torch.arange(self.clean.shape[1], device=self.clean.device) < self.lengths[:, None]

    def select(self, indices: Tensor | Sequence[int] | slice) -> Prompts:
        """The prompts at `indices` (numbers, in this order, or a boolean mask), with no more
        padding than they need.

        Raises:
            ValueError: an index outside 0 .. n - 1, or a mask of another length.
        """
        rows = self._rows(indices)
        positions = _trim(self.positions[rows], NONE)  # n scored
        scored = positions.shape[1]
        lengths = self.lengths[rows]
        width = int(lengths.max()) if len(rows) else 0

        def at_positions(answers: Tensor | None) -> Tensor | None:
            return (
                None if answers is None else _trim(answers[rows, :scored], NONE)
            )  # n scored answer

        return Prompts(
            clean=self.clean[rows, :width],
            lengths=lengths,
            corrupt=None if self.corrupt is None else self.corrupt[rows, :width],
            positions=positions,
            answers=at_positions(self.answers),
            wrong_answers=at_positions(self.wrong_answers),
            labels=None if self.labels is None else self.labels[rows],
            ids=tuple(self.ids[row] for row in rows.tolist()),
        )

    def batches(self, size: int) -> Iterator[Prompts]:
        """The prompts in order, `size` at a time; the last batch may be smaller.

        Raises:
            ValueError: `size` is under 1.
        """
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
        """A hex SHA-256 of the set of prompts; their order, padding, ids and device do not matter."""
        corrupt = (
            [None] * len(self)
            if self.corrupt is None
            else _rows_without_padding(self.corrupt, self.lengths)
        )
        labels = [None] * len(self) if self.labels is None else self.labels.tolist()
        scored = self._scored()
        contents = {json.dumps(parts) for parts in zip(self.sequences(), corrupt, scored, labels)}
        return hashlib.sha256("\n".join(sorted(contents)).encode()).hexdigest()

    def deduplicated(self) -> Prompts:
        """The first prompt of each clean token sequence, in order, even where later ones have other
        answers.
        """
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
                "different; "
                "lower the sizes or give more prompts"
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
                "prompts; "
                f"stay within 0 to {len(self) - 1}"
            )
        return rows

    def _scored(self) -> list[list]:
        """For each prompt its scored positions, in ascending order, with sorted answers and wrong
        answers.
        """
        positions = self.positions.tolist()
        nothing = [[None] * len(row) for row in positions]
        answers = nothing if self.answers is None else _real(self.answers)
        wrong = nothing if self.wrong_answers is None else _real(self.wrong_answers)
        return [
            sorted((place for place in zip(*row) if place[0] != NONE), key=lambda place: place[0])
            for row in zip(positions, answers, wrong)
        ]


def prompts_from_records(
    records: Iterable[Mapping[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prepend_bos: bool = False,
    max_length: int | None = None,
    vocabulary: int | None = None,
    outputs: int | None = None,
) -> Prompts:
    """The records as one set of prompts; arguments as in `encode_record`.

    Raises: ValueError: a bad record, named by its id or, without one, by its number (its line in a
        JSONL file).
    """
    encoded = []
    for number, record in enumerate(records, start=1):
        try:
            encoded.append(
                encode_record(
                    record,
                    default_id=f"record {number}",
                    tokenizer=tokenizer,
                    prepend_bos=prepend_bos,
                    max_length=max_length,
                    vocabulary=vocabulary,
                    outputs=outputs,
                )
            )
        except ValueError as error:
            raise ValueError(f"{_record_name(record, number)}: {error}") from None
    return collate(encoded)


def collate(encoded: Sequence[EncodedPrompt]) -> Prompts:
    """The encoded prompts as one set, on the CPU.

    Raises: ValueError: no prompts at all, or some but not all have a corrupt prompt, answers, wrong
        answers or a label.
    """
    if not encoded:
        raise ValueError("there are no prompts; give at least one")
    corrupt, answers, wrong_answers, labels = (
        _all_or_none(encoded, field) for field in ("corrupt", "answers", "wrong_answers", "label")
    )
    return Prompts(
        clean=_pad([prompt.clean for prompt in encoded], TOKEN_PADDING),
        lengths=torch.tensor([len(prompt.clean) for prompt in encoded]),
        corrupt=None if corrupt is None else _pad(corrupt, TOKEN_PADDING),
        positions=_pad([prompt.positions for prompt in encoded], NONE),
        answers=None if answers is None else _pad_answers(answers),
        wrong_answers=None if wrong_answers is None else _pad_answers(wrong_answers),
        labels=None if labels is None else torch.tensor(labels),
        ids=tuple(prompt.id for prompt in encoded),
    )


def _all_or_none(encoded: Sequence[EncodedPrompt], field: str) -> list[Any] | None:
    """The field of each prompt; None where no prompt has it."""
    lacking = [prompt.id for prompt in encoded if getattr(prompt, field) is None]
    if len(lacking) == len(encoded):
        return None
    if lacking:
        raise ValueError(
            f"{lacking[0]!r} has no {field}, which {len(encoded) - len(lacking)} of {len(encoded)} "
            "prompts have; "
            f"give {field} to all prompts or to none"
        )
    return [getattr(prompt, field) for prompt in encoded]


def _record_name(record: Any, number: int) -> str:
    identifier = record.get("id") if isinstance(record, Mapping) else None
    return f"record {number}" if identifier is None else f"record {number}, id {identifier!r}"


def _pad(rows: Sequence[Sequence[int]], value: int) -> Int[Tensor, "n longest"]:
    return pad_sequence(
        [torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value
    )


def _pad_answers(answers: Sequence[Sequence[Sequence[int]]]) -> Int[Tensor, "n scored answer"]:
    scored, widest = max(map(len, answers)), max(len(here) for row in answers for here in row)
    padded = torch.full((len(answers), scored, widest), NONE)
    for prompt, row in enumerate(answers):
        for place, here in enumerate(row):
            padded[prompt, place, : len(here)] = torch.tensor(here)
    return padded


def _trim(padded: Tensor, value: int) -> Tensor:
    """`padded` without the columns of its last axis that hold nothing but `value`."""
    if not padded.numel():
        return padded[..., :0]
    used = (padded != value).flatten(end_dim=-2).any(dim=0)
    return padded[
        ..., : int(used.sum())
    ]  # rows are padded on the right, so used columns come first


def _rows_without_padding(tokens: Tensor, lengths: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row[:length]) for row, length in zip(tokens.tolist(), lengths.tolist())]


def _real(answers: Tensor) -> list[list[list[int]]]:
    return [
        [sorted(token for token in here if token != NONE) for here in row]
        for row in answers.tolist()
    ]
