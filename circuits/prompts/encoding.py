"""One record, as read from a file or made by a task, to checked token ids.

    clean = BOS? + encode(text)                                   text is tokenised here, without special tokens
    answer = the id a with encode(text + answer) = encode(text) + [a]

A *record* is a dict of the JSONL schema:

    clean (or text)   str or list of token ids
    corrupt           the same, with as many tokens; optional
    answers           acceptable tokens (strings or ids) at the last token or, with positions, a list of them for each
    wrong_answers     tokens to hold against them, in the same form; optional
    positions         positions whose logits are scored; negative ones count from the last token; optional
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
from typing import TYPE_CHECKING, Any

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

    Raises: ValueError: anything wrong with the record; the message is one line and leaves the
        record's name to the caller.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f'{_quote(record)} is no object; write {{"clean": ...}}')
    bos = _bos(tokenizer, prepend_bos)
    vocabulary = LARGEST_VOCABULARY if vocabulary is None else vocabulary
    source = _clean_source(record)
    clean = _encode_prompt("clean", source, tokenizer, bos, vocabulary)
    if max_length is not None and len(clean) > max_length:
        raise ValueError(
            f"clean has {len(clean)} tokens{' with BOS' if bos is not None else ''}, but "
            f"max_length={max_length}; "
            "shorten it or take a model with a longer context"
        )
    corrupt = None
    if record.get("corrupt") is not None:
        corrupt = _encode_prompt("corrupt", record["corrupt"], tokenizer, bos, vocabulary)
        if len(corrupt) != len(clean):
            raise ValueError(
                f"clean has {len(clean)} tokens and corrupt has {len(corrupt)}; a corrupt prompt "
                "needs as many tokens "
                "as its clean one, so reword one of them"
            )
    positions = _positions(record.get("positions"), len(clean))
    outputs = vocabulary if outputs is None else outputs
    places = [_Place(tokenizer, clean, source, position, bos, outputs) for position in positions]
    by_position = record.get("positions") is not None
    answers = _answers("answers", record.get("answers"), places, by_position)
    wrong_answers = _answers("wrong_answers", record.get("wrong_answers"), places, by_position)
    for right, wrong in zip(answers or (), wrong_answers or ()):
        if shared := set(right) & set(wrong):
            raise ValueError(
                f"token {min(shared)} is in answers and in wrong_answers; take it out of one of "
                "them"
            )
    return EncodedPrompt(
        id=_record_id(record.get("id"), default_id),
        clean=clean,
        corrupt=corrupt,
        positions=positions,
        answers=answers,
        wrong_answers=wrong_answers,
        label=_label(record.get("label")),
    )


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
    bos: Any = tokenizer.bos_token_id  # transformers declares it as id or list or text
    return bos


def _clean_source(record: Mapping[str, Any]) -> Any:
    clean, text = record.get("clean"), record.get("text")
    if clean is not None and text is not None:
        raise ValueError("both clean and text are given, which mean the same; keep one")
    if clean is None and text is None:
        raise ValueError(
            f"clean is missing among {_quote(sorted(map(str, record)))}; give clean or text"
        )
    return text if clean is None else clean


def _encode_prompt(
    field: str,
    source: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    bos: int | None,
    vocabulary: int,
) -> tuple[int, ...]:
    if isinstance(source, str):
        tokens = _encode_text(field, source, tokenizer)
    elif isinstance(source, list | tuple):
        tokens = list(source)
    else:
        raise ValueError(
            f"{field}={_quote(source)} is neither text nor a list of token ids; give one of these"
        )
    if not tokens:
        raise ValueError(f"{field} is empty; give at least one token")
    for token in tokens:
        _check_token(field, token, vocabulary)
    if bos is None or tokens[0] == bos:
        return tuple(tokens)
    if not isinstance(source, str):
        raise ValueError(
            f"{field} begins with token {tokens[0]}, but prepend_bos=True and token ids are taken "
            "as they are; "
            f"begin with BOS, {bos}"
        )
    return (bos, *tokens)


def _encode_text(field: str, text: str, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    if tokenizer is None:
        raise ValueError(
            f"{field}={_quote(text)} is text, but there is no tokenizer; give a tokenizer or token "
            "ids"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{field}={_quote(text)} is no valid Unicode; remove the lone surrogates"
        ) from None
    return tokenizer.encode(text, add_special_tokens=False)


def _check_token(field: str, token: Any, vocabulary: int) -> None:
    if type(token) is not int:
        raise ValueError(
            f"{field} holds {_quote(token)}, which is no token id; token ids are whole numbers"
        )
    if not 0 <= token < vocabulary:
        raise ValueError(
            f"{field} holds token {token}, but token ids run from 0 to {vocabulary - 1}"
        )


def _positions(positions: Any, length: int) -> tuple[int, ...]:
    """Positions counted from the first token; the last token where none are given."""
    if positions is None:
        return (length - 1,)
    if not isinstance(positions, list | tuple) or not positions:
        raise ValueError(
            f"positions={_quote(positions)} is no list of positions; leave it out to score the "
            "last token"
        )
    for position in positions:
        if type(position) is not int:
            raise ValueError(f"positions holds {_quote(position)}; positions are whole numbers")
        if not -length <= position < length:
            raise ValueError(
                f"positions holds {position}, but the prompt has {length} tokens; stay within "
                f"{-length} to {length - 1}"
            )
    absolute = tuple(position % length for position in positions)
    if len(set(absolute)) != len(absolute):
        raise ValueError(
            f"positions={_quote(positions)} names a token of this prompt twice; keep one of each"
        )
    return absolute


@dataclass(frozen=True)
class _Place:
    """A position of a prompt, at which answers are looked up."""

    tokenizer: PreTrainedTokenizerBase | None
    clean: tuple[int, ...]
    source: str | list[int]
    position: int
    bos: int | None
    outputs: int

    def before(self) -> tuple[list[int], str]:
        """The tokens up to this position, without BOS, and their text."""
        tokens = list(self.clean[: self.position + 1])
        if self.bos is not None:
            tokens = tokens[1:]
        if isinstance(self.source, str) and self.position == len(self.clean) - 1:
            return tokens, self.source
        return tokens, _decode(self.tokenizer, tokens)


def _answers(field: str, answers: Any, places: list[_Place], by_position: bool) -> Answers | None:
    """Token ids, a tuple for each scored position; the same token named twice counts once."""
    if answers is None:
        return None
    if not isinstance(answers, list | tuple) or not answers:
        raise ValueError(
            f"{field}={_quote(answers)} is no list of answers; list at least one, or leave {field} "
            "out"
        )
    if not by_position:
        answers = [answers]
    elif len(answers) != len(places) or not all(
        isinstance(here, list | tuple) and here for here in answers
    ):
        raise ValueError(
            f"{field}={_quote(answers)} does not fit {len(places)} positions; give one list of "
            "answers, not empty, "
            "for each of them"
        )
    return tuple(
        tuple(_answers_in_place(field, here, place)) for here, place in zip(answers, places)
    )


def _answers_in_place(field: str, answers: Sequence[Any], place: _Place) -> dict[int, None]:
    tokens, before = {}, None
    for answer in answers:
        if isinstance(answer, str):
            if place.tokenizer is None:
                raise ValueError(
                    f"{field} holds the text {_quote(answer)}, but there is no tokenizer; give a "
                    "tokenizer or token ids"
                )
            before = before or place.before()
            answer = _answer_token(field, answer, place.tokenizer, *before)
        _check_token(field, answer, place.outputs)
        tokens[answer] = None
    return tokens


def _answer_token(
    field: str, answer: str, tokenizer: PreTrainedTokenizerBase, tokens: list[int], text: str
) -> int:
    """The one token that continues `tokens`, whose text is `text`, with `answer`.

    Usually the tokenizer cuts `text + answer` in just this way.  Where it merges the two ("to the
    year 17" + "76" becomes one token, "so " + "he" gives " he"), the model still goes on from the
    tokens that it has read, so the token that adds `answer` to them is right.
    """
    whole = _encode_text(field, text + answer, tokenizer)
    if (
        len(whole) == len(tokens) + 1
        and whole[:-1] == tokens
        and whole[-1] != tokenizer.unk_token_id
    ):
        return whole[-1]
    alone = _encode_text(field, answer, tokenizer)
    candidates = alone if len(alone) == 1 else []
    if answer:
        candidates = [*candidates, tokenizer.convert_tokens_to_ids(answer)]
    if answer and candidates:
        continued = _decode(tokenizer, tokens) + answer
        for candidate in candidates:
            if candidate is not None and candidate != tokenizer.unk_token_id:
                if _decode(tokenizer, [*tokens, candidate]) == continued:
                    return candidate
    added = tokenizer.convert_ids_to_tokens(
        whole[len(tokens) :] if whole[: len(tokens)] == tokens else alone
    )
    raise ValueError(
        f"{field} holds {_quote(answer)}, which is not one token after {_quote(text[-20:])} but "
        f"{_quote(added)}; "
        "answers are single tokens, so reword it or give a token id"
    )


def _decode(tokenizer: PreTrainedTokenizerBase | None, tokens: list[int]) -> str:
    if tokenizer is None:
        return ""
    return str(
        tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


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
