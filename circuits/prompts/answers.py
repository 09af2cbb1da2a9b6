"""Answers as token ids, each in the place that it is asked for.

    answer = the id a with encode(text + answer) = encode(text) + [a]

An answer belongs to its place, since tokenizers cut text differently in different places:
SentencePiece has one token for "he" after a space and another one inside a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from circuits.prompts.errors import quote
from circuits.prompts.tokens import Encoder, check_token, encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Answers = tuple[tuple[int, ...], ...]  # for each scored position its acceptable token ids


@dataclass(frozen=True)
class Place:
    """A position of a prompt, at which answers are looked up."""

    encoder: Encoder
    clean: tuple[int, ...]
    source: str | list[int]
    position: int

    @cached_property
    def before(self) -> tuple[list[int], str]:
        """The tokens up to this position, without BOS, and their text."""
        first = 0 if self.encoder.bos is None else 1
        tokens = list(self.clean[first : self.position + 1])
        if isinstance(self.source, str) and self.position == len(self.clean) - 1:
            return tokens, self.source
        return tokens, _decode(self.encoder.tokenizer, tokens)


def answers_at(field: str, record: Mapping[str, Any], places: list[Place]) -> Answers | None:
    """Token ids, a tuple for each scored position; the same token named twice counts once."""
    answers = record.get(field)
    if answers is None or (field == "wrong_answers" and _is_empty(answers)):
        return None
    if not is_filled_list(answers):
        raise ValueError(
            f"{field}={quote(answers)} is no list of answers; list at least one, or leave {field} "
            "out"
        )
    flat = len(places) == 1 and not any(isinstance(answer, list | tuple) for answer in answers)
    rows = [answers] if flat or record.get("positions") is None else answers
    if len(rows) != len(places) or not all(map(is_filled_list, rows)):
        raise ValueError(
            f"{field}={quote(answers)} does not fit {len(places)} positions; give one list of "
            "answers, not empty, for each of them"
        )
    return tuple(_answers_in_place(field, row, place) for row, place in zip(rows, places))


def refuse_shared(answers: Answers | None, wrong_answers: Answers | None) -> None:
    """Raises ValueError where a token is right and wrong at the same position."""
    for right, wrong in zip(answers or (), wrong_answers or ()):
        if shared := set(right) & set(wrong):
            both = f"token {min(shared)} is in answers and in wrong_answers"
            raise ValueError(f"{both}; take it out of one of them")


def is_filled_list(value: Any) -> bool:
    """Whether it is a list with something in it."""
    return isinstance(value, list | tuple) and len(value) > 0


def _is_empty(answers: Any) -> bool:
    """Whether there is no answer at any position."""
    return isinstance(answers, list | tuple) and all(here in ([], ()) for here in answers)


def _answers_in_place(field: str, answers: Sequence[Any], place: Place) -> tuple[int, ...]:
    tokens = []
    for answer in answers:
        token = _answer_token(field, answer, place) if isinstance(answer, str) else answer
        check_token(field, token, place.encoder.outputs)
        tokens.append(token)
    return tuple(dict.fromkeys(tokens))


def _answer_token(field: str, answer: str, place: Place) -> int:
    """The one token that continues the tokens before a place with `answer`.

    Usually the tokenizer cuts their text and the answer in just this way.  Where it merges the two
    ("to the year 17" + "76" becomes one token, "so " + "he" gives " he"), the model still goes on
    from the tokens that it has read, so the token that adds `answer` to them is right.
    """
    tokenizer = place.encoder.tokenizer
    if tokenizer is None:
        raise ValueError(
            f"{field} holds the text {quote(answer)}, but there is no tokenizer; give a tokenizer "
            "or token ids"
        )
    tokens, text = place.before
    whole = encode_text(field, text + answer, tokenizer)
    kept, added = whole[: len(tokens)], whole[len(tokens) :]
    if kept == tokens and len(added) == 1 and added[0] != tokenizer.unk_token_id:
        return added[0]
    alone = encode_text(field, answer, tokenizer)
    token = _token_that_adds(answer, alone, tokens, tokenizer)
    if token is None:
        pieces = tokenizer.convert_ids_to_tokens(added if kept == tokens else alone)
        raise ValueError(
            f"{field} holds {quote(answer)}, which is not one token after {quote(text[-20:])} "
            f"but {quote(pieces)}; answers are single tokens, so reword it or give a token id"
        )
    return token


def _token_that_adds(
    answer: str, alone: list[int], tokens: list[int], tokenizer: PreTrainedTokenizerBase
) -> int | None:
    """The token whose text after `tokens` is `answer`; `alone` is the answer encoded by itself."""
    if not answer:
        return None
    continued = _decode(tokenizer, tokens) + answer
    named: Any = tokenizer.convert_tokens_to_ids(answer)
    for token in (*(alone if len(alone) == 1 else ()), named):
        if token is not None and token != tokenizer.unk_token_id:
            if _decode(tokenizer, [*tokens, token]) == continued:
                return token
    return None


def _decode(tokenizer: Any, tokens: list[int]) -> str:
    exactly = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode(tokens, **exactly))
