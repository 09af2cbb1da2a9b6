"""Records as one set of prompts: each is encoded and checked, then all are padded to tensors.

Shapes: n prompts, pos tokens in the longest of them, scored positions, answers at each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from circuits.prompts.encoding import EncodedPrompt, encode_record
from circuits.prompts.errors import quote
from circuits.prompts.prompts import NONE, Prompts
from circuits.prompts.tokens import begins_with_bos, vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN_PADDING = 0


def prompts_from_records(
    records: Iterable[Mapping[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    vocabulary: int | None = None,
    outputs: int | None = None,
) -> Prompts:
    """The records as one set of prompts; arguments as in `encode_record`.

    `LoadedModel.prompts` gives what the model itself needs.

    >>> prompts_from_records([{"clean": [5, 7, 5], "answers": [7]}]).answers.tolist()
    [[[7]]]

    Raises:
        ValueError: a bad record, named by its id or else by its number (its line in a file).
    """
    encode = partial(
        encode_record,
        tokenizer=tokenizer,
        prepend_bos=begins_with_bos(tokenizer) if prepend_bos is None else prepend_bos,
        max_length=max_length,
        vocabulary=vocabulary_of(tokenizer) if vocabulary is None else vocabulary,
        outputs=outputs,
    )
    encoded = []
    for number, record in enumerate(records, start=1):
        try:
            encoded.append(encode(record, default_id=f"record {number}"))
        except ValueError as error:
            raise ValueError(f"{_record_name(record, number)}: {error}") from None
    return collate(encoded)


def collate(encoded: Sequence[EncodedPrompt]) -> Prompts:
    """The encoded prompts as one set, on the CPU.

    Raises:
        ValueError: there are none, or a field that only some of them have.
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
        features=_features(encoded),
    )


def _features(encoded: Sequence[EncodedPrompt]) -> dict[str, tuple[str | int, ...]]:
    """Each feature of all prompts; ValueError for one that only some of them have."""
    given = _all_or_none(encoded, "features")
    if given is None:
        return {}
    for prompt, features in zip(encoded, given, strict=True):
        if other := sorted(set(features) ^ set(given[0])):
            has = "has" if other[0] in features else "lacks"
            raise ValueError(
                f"{prompt.id!r} {has} the feature {other[0]!r}, unlike {encoded[0].id!r}; give all "
                "prompts the same features"
            )
    return {name: tuple(features[name] for features in given) for name in given[0]}


def _all_or_none(encoded: Sequence[EncodedPrompt], field: str) -> list[Any] | None:
    """The field of each prompt; None where no prompt has it."""
    lacking = [prompt.id for prompt in encoded if getattr(prompt, field) is None]
    if len(lacking) == len(encoded):
        return None
    if lacking:
        raise ValueError(
            f"{lacking[0]!r} has no {field}, which {len(encoded) - len(lacking)} of {len(encoded)} "
            f"prompts have; give {field} to all prompts or to none"
        )
    return [getattr(prompt, field) for prompt in encoded]


def _record_name(record: Any, number: int) -> str:
    identifier = record.get("id") if isinstance(record, Mapping) else None
    return f"record {number}" if identifier is None else f"record {number}, id {quote(identifier)}"


def _pad(rows: Sequence[Sequence[int]], value: int) -> Int[Tensor, "n longest"]:
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value)


def _pad_answers(answers: Sequence[Sequence[Sequence[int]]]) -> Int[Tensor, "n scored answer"]:
    scored, widest = max(map(len, answers)), max(len(here) for row in answers for here in row)
    padded = torch.full((len(answers), scored, widest), NONE)
    for prompt, row in enumerate(answers):
        for place, here in enumerate(row):
            padded[prompt, place, : len(here)] = torch.tensor(here)
    return padded
