"""One record, as read from a file or made by a task, to checked token ids.

    clean = BOS? + encode(text)                                   encoded without special tokens
    answer = the id a with encode(text + answer) = encode(text) + [a]

A *record* is a dict of the JSONL schema:

    clean (or text)   str or list of token ids
    corrupt           the same, with as many tokens; optional
    answers           acceptable tokens (strings or ids) of the last one, or lists by position
    wrong_answers     tokens to hold against them, in the same form; optional
    positions         whose logits are scored; negative ones count from the last token; optional
    label             0 normal, 1 anomalous; optional
    id                str or int; optional

Null stands for "not there", and keys not listed are ignored.  Token ids are the model's exact
input: nothing is put in front of them.  An answer belongs to the place it is asked for, since
tokenizers cut text differently in different places: SentencePiece has one token for "he" after a
space and another one inside a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGEST_VOCABULARY = 2**31  # the bound on token ids where the model's own is not given
LONGEST_QUOTE = 60  # characters of a value that a message repeats

Answers = tuple[tuple[int, ...], ...]  # for each scored position its acceptable token ids


@dataclass(frozen=True)
class EncodedPrompt:
    """A record as token ids: checked, and with positions counted from the first token."""

    id: str
    clean: tuple[int, ...]
    corrupt: tuple[int, ...] | None
    positions: tuple[int, ...]
    answers: Answers | None
    wrong_answers: Answers | None
    label: int | None


def encode_record(
    record: Any,
    *,
    default_id: str = "",
    tokenizer: PreTrainedTokenizerBase | None = None,
    prepend_bos: bool = False,
    max_length: int | None = None,
    vocabulary: int | None = None,
    outputs: int | None = None,
) -> EncodedPrompt:
    """`record` as token ids.

    Args:
        default_id: the id of a record that has none.
        tokenizer: needed for text, and for BOS.
        prepend_bos: whether the model reads BOS first.  Texts get it; token ids must bring it.
        max_length: tokens that fit into the model, BOS included.
        vocabulary: token ids are below this.
        outputs: answers are below this; as many as the vocabulary unless said otherwise.

    Raises:
        ValueError: anything wrong with the record; the message is one line and leaves the record's
            name to the caller.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f'{_quote(record)} is no object; write {{"clean": ...}}')
    vocabulary = LARGEST_VOCABULARY if vocabulary is None else vocabulary
    outputs = vocabulary if outputs is None else outputs
    encoder = _Encoder(tokenizer, _bos(tokenizer, prepend_bos), vocabulary, outputs)
    source = _clean_source(record)
    clean = encoder.prompt("clean", source)
    if max_length is not None and len(clean) > max_length:
        raise ValueError(
            f"clean has {len(clean)} tokens{' with BOS' if encoder.bos is not None else ''}, but "
            f"max_length={max_length}; shorten it or take a model with a longer context"
        )
    corrupt = _corrupt(record.get("corrupt"), len(clean), encoder)
    positions = _positions(record.get("positions"), len(clean))
    places = [_Place(encoder, clean, source, position) for position in positions]
    answers = _answers("answers", record, places)
    wrong_answers = _answers("wrong_answers", record, places)
    _refuse_shared(answers, wrong_answers)
    identifier, label = _record_id(record.get("id"), default_id), _label(record.get("label"))
    return EncodedPrompt(identifier, clean, corrupt, positions, answers, wrong_answers, label)


def _bos(tokenizer: PreTrainedTokenizerBase | None, prepend_bos: bool) -> int | None:
    """The id to put first; None where nothing is put there."""
    if not prepend_bos:
        return None
    if tokenizer is None:
        raise ValueError(
            "prepend_bos=True, but there is no tokenizer to name BOS; set prepend_bos=False or "
            "give one"
        )
    if tokenizer.bos_token_id is None:
        raise ValueError(
            "prepend_bos=True, but the tokenizer has no BOS token; set prepend_bos=False"
        )
    return cast(int, tokenizer.bos_token_id)  # transformers declares it as id or list or text


def _clean_source(record: Mapping[str, Any]) -> Any:
    given = [record[key] for key in ("clean", "text") if record.get(key) is not None]
    if len(given) == 2:
        raise ValueError("both clean and text are given, which mean the same; keep one")
    if not given:
        raise ValueError(
            f"clean is missing among {_quote(sorted(map(str, record)))}; give clean or text"
        )
    return given[0]


@dataclass(frozen=True)
class _Encoder:
    """What a model reads: its tokenizer, the BOS to put first, and the bounds on token ids."""

    tokenizer: PreTrainedTokenizerBase | None
    bos: int | None
    vocabulary: int
    outputs: int  # the bound on answers

    def prompt(self, field: str, source: Any) -> tuple[int, ...]:
        """The checked token ids of a prompt, BOS included."""
        tokens = self._tokens(field, source)
        if not tokens:
            raise ValueError(f"{field} is empty; give at least one token")
        for token in tokens:
            _check_token(field, token, self.vocabulary)
        if self.bos is None or tokens[0] == self.bos:
            return tuple(tokens)
        if not isinstance(source, str):
            raise ValueError(
                f"{field} begins with token {tokens[0]}, but prepend_bos=True and token ids are "
                f"taken as they are; begin with BOS, {self.bos}"
            )
        return (self.bos, *tokens)

    def _tokens(self, field: str, source: Any) -> list[Any]:
        if isinstance(source, str):
            if self.tokenizer is None:
                raise ValueError(
                    f"{field}={_quote(source)} is text, but there is no tokenizer; give a "
                    "tokenizer or token ids"
                )
            return _encode_text(field, source, self.tokenizer)
        if isinstance(source, list | tuple):
            return list(source)
        raise ValueError(
            f"{field}={_quote(source)} is neither text nor a list of token ids; give one of these"
        )


def _encode_text(field: str, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{field}={_quote(text)} is no valid Unicode; remove the lone surrogates"
        ) from None
    return tokenizer.encode(text, add_special_tokens=False)


def _check_token(field: str, token: Any, bound: int) -> None:
    if type(token) is not int:
        raise ValueError(
            f"{field} holds {_quote(token)}, which is no token id; token ids are whole numbers"
        )
    if not 0 <= token < bound:
        raise ValueError(f"{field} holds token {token}, but token ids run from 0 to {bound - 1}")


def _corrupt(source: Any, length: int, encoder: _Encoder) -> tuple[int, ...] | None:
    if source is None:
        return None
    corrupt = encoder.prompt("corrupt", source)
    if len(corrupt) != length:
        raise ValueError(
            f"clean has {length} tokens and corrupt has {len(corrupt)}; a corrupt prompt needs as "
            "many tokens as its clean one, so reword one of them"
        )
    return corrupt


def _positions(positions: Any, length: int) -> tuple[int, ...]:
    """Positions counted from the first token; the last token where none are given."""
    if positions is None:
        return (length - 1,)
    if not _is_filled_list(positions):
        raise ValueError(
            f"positions={_quote(positions)} is no list of positions; leave it out to score the "
            "last token"
        )
    absolute = tuple(_position(position, length) for position in positions)
    if len(set(absolute)) != len(absolute):
        raise ValueError(
            f"positions={_quote(positions)} names a token of this prompt twice; keep one of each"
        )
    return absolute


def _position(position: Any, length: int) -> int:
    if type(position) is not int:
        raise ValueError(f"positions holds {_quote(position)}; positions are whole numbers")
    if not -length <= position < length:
        raise ValueError(
            f"positions holds {position}, but the prompt has {length} tokens; stay within "
            f"{-length} to {length - 1}"
        )
    return position % length


@dataclass(frozen=True)
class _Place:
    """A position of a prompt, at which answers are looked up."""

    encoder: _Encoder
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


def _answers(field: str, record: Mapping[str, Any], places: list[_Place]) -> Answers | None:
    """Token ids, a tuple for each scored position; the same token named twice counts once."""
    answers = record.get(field)
    if answers is None:
        return None
    if not _is_filled_list(answers):
        raise ValueError(
            f"{field}={_quote(answers)} is no list of answers; list at least one, or leave {field} "
            "out"
        )
    rows = [answers] if record.get("positions") is None else answers
    if len(rows) != len(places) or not all(map(_is_filled_list, rows)):
        raise ValueError(
            f"{field}={_quote(answers)} does not fit {len(places)} positions; give one list of "
            "answers, not empty, for each of them"
        )
    return tuple(_answers_in_place(field, row, place) for row, place in zip(rows, places))


def _refuse_shared(answers: Answers | None, wrong_answers: Answers | None) -> None:
    for right, wrong in zip(answers or (), wrong_answers or ()):
        if shared := set(right) & set(wrong):
            both = f"token {min(shared)} is in answers and in wrong_answers"
            raise ValueError(f"{both}; take it out of one of them")


def _is_filled_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0


def _answers_in_place(field: str, answers: Sequence[Any], place: _Place) -> tuple[int, ...]:
    tokens = []
    for answer in answers:
        token = _answer_token(field, answer, place) if isinstance(answer, str) else answer
        _check_token(field, token, place.encoder.outputs)
        tokens.append(token)
    return tuple(dict.fromkeys(tokens))


def _answer_token(field: str, answer: str, place: _Place) -> int:
    """The one token that continues the tokens before a place with `answer`.

    Usually the tokenizer cuts their text and the answer in just this way.  Where it merges the two
    ("to the year 17" + "76" becomes one token, "so " + "he" gives " he"), the model still goes on
    from the tokens that it has read, so the token that adds `answer` to them is right.
    """
    tokenizer = place.encoder.tokenizer
    if tokenizer is None:
        raise ValueError(
            f"{field} holds the text {_quote(answer)}, but there is no tokenizer; give a tokenizer "
            "or token ids"
        )
    tokens, text = place.before
    whole = _encode_text(field, text + answer, tokenizer)
    kept, added = whole[: len(tokens)], whole[len(tokens) :]
    if kept == tokens and len(added) == 1 and added[0] != tokenizer.unk_token_id:
        return added[0]
    alone = _encode_text(field, answer, tokenizer)
    token = _token_that_adds(answer, alone, tokens, tokenizer)
    if token is None:
        pieces = tokenizer.convert_ids_to_tokens(added if kept == tokens else alone)
        raise ValueError(
            f"{field} holds {_quote(answer)}, which is not one token after {_quote(text[-20:])} "
            f"but {_quote(pieces)}; answers are single tokens, so reword it or give a token id"
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


def _label(label: Any) -> int | None:
    if label is not None and (type(label) is not int or label not in (0, 1)):
        raise ValueError(
            f"label={_quote(label)} is neither 0 (normal) nor 1 (anomalous); give one of these"
        )
    return label


def _record_id(identifier: Any, default: str) -> str:
    if identifier is None:
        return default
    if type(identifier) not in (str, int):
        raise ValueError(
            f"id={_quote(identifier)} is neither text nor a whole number; give one of these"
        )
    return str(identifier)


def _quote(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_QUOTE else text[: LONGEST_QUOTE - 3] + "..."
