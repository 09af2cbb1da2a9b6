"""One record, as read from a file or made by a task, to checked token ids.

    clean = BOS? + encode(text)                                   encoded without special tokens

A *record* is a dict of the JSONL schema:

    clean (or text)   str or list of token ids
    corrupt           the same, with as many tokens; optional
    answers           acceptable tokens (strings or ids) at the one scored position; a list of such
                      lists, one for each position, where there are several
    wrong_answers     tokens to hold against them, in the same form; optional, and may be empty
    positions         whose logits are scored; negative ones count from the last token; optional:
                      the last token alone
    label             0 normal, 1 anomalous; optional
    id                str or int; optional
    features          what it is about, {name: str or int}, for hypotheses to speak of; optional

Null stands for "not there", and keys not listed are ignored.  Token ids are the model's exact
input: nothing is put in front of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from circuits.prompts.answers import Answers, Place, answers_at, is_filled_list, refuse_shared
from circuits.prompts.errors import quote
from circuits.prompts.tokens import Encoder, begins_with_bos, bos_to_prepend, vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    features: Mapping[str, str | int] | None = None


def encode_record(
    record: Any,
    *,
    default_id: str = "",
    tokenizer: PreTrainedTokenizerBase | None = None,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    vocabulary: int | None = None,
    outputs: int | None = None,
) -> EncodedPrompt:
    """`record` as token ids.

    Args:
        default_id: the id of a record that has none.
        tokenizer: needed for text, and for BOS.
        prepend_bos: whether the model reads BOS first; None: as the tokenizer itself does.  Texts
            get it; token ids must bring it.
        max_length: tokens that fit into the model, BOS included.
        vocabulary: token ids are below this; None: the tokenizer's.
        outputs: answers are below this; as many as the vocabulary unless said otherwise.

    Raises:
        ValueError: anything wrong with the record; the message is one line and leaves the record's
            name to the caller.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f'{quote(record)} is no object; write {{"clean": ...}}')
    prepend_bos = begins_with_bos(tokenizer) if prepend_bos is None else prepend_bos
    vocabulary = vocabulary_of(tokenizer) if vocabulary is None else vocabulary
    outputs = vocabulary if outputs is None else outputs
    encoder = Encoder(tokenizer, bos_to_prepend(tokenizer, prepend_bos), vocabulary, outputs)
    source = _clean_source(record)
    clean = encoder.prompt("clean", source)
    if max_length is not None and len(clean) > max_length:
        raise ValueError(
            f"clean has {len(clean)} tokens{' with BOS' if encoder.bos is not None else ''}, but "
            f"max_length={max_length}; shorten it or take a model with a longer context"
        )
    corrupt = _corrupt(record.get("corrupt"), len(clean), encoder)
    positions = _positions(record.get("positions"), len(clean))
    places = [Place(encoder, clean, source, position) for position in positions]
    answers = answers_at("answers", record, places)
    wrong_answers = answers_at("wrong_answers", record, places)
    refuse_shared(answers, wrong_answers)
    identifier, label = _record_id(record.get("id"), default_id), _label(record.get("label"))
    return EncodedPrompt(
        identifier,
        clean,
        corrupt,
        positions,
        answers,
        wrong_answers,
        label,
        _features(record.get("features")),
    )


def _clean_source(record: Mapping[str, Any]) -> Any:
    given = [record[key] for key in ("clean", "text") if record.get(key) is not None]
    if len(given) == 2:
        raise ValueError("both clean and text are given, which mean the same; keep one")
    if not given:
        raise ValueError(
            f"clean is missing among {quote(sorted(map(str, record)))}; give clean or text"
        )
    return given[0]


def _corrupt(source: Any, length: int, encoder: Encoder) -> tuple[int, ...] | None:
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
    if not is_filled_list(positions):
        raise ValueError(
            f"positions={quote(positions)} is no list of positions; leave it out to score the "
            "last token"
        )
    absolute = tuple(_position(position, length) for position in positions)
    if len(set(absolute)) != len(absolute):
        raise ValueError(
            f"positions={quote(positions)} names a token of this prompt twice; keep one of each"
        )
    return absolute


def _position(position: Any, length: int) -> int:
    if type(position) is not int:
        raise ValueError(f"positions holds {quote(position)}; positions are whole numbers")
    if not -length <= position < length:
        raise ValueError(
            f"positions holds {quote(position)}, but the prompt has {length} tokens; stay within "
            f"{-length} to {length - 1}"
        )
    return position % length


def _label(label: Any) -> int | None:
    if label is not None and (type(label) is not int or label not in (0, 1)):
        raise ValueError(
            f"label={quote(label)} is neither 0 (normal) nor 1 (anomalous); give one of these"
        )
    return label


def _features(features: Any) -> Mapping[str, str | int] | None:
    if features is None:
        return None
    if not isinstance(features, Mapping) or not all(isinstance(name, str) for name in features):
        raise ValueError(f"features={quote(features)} is no object {{name: text or whole number}}")
    for name, value in features.items():
        if type(value) not in (str, int):
            raise ValueError(
                f"features: {quote(name)} is {quote(value)}, which is neither text nor a whole "
                "number; give one of these"
            )
    return dict(features)


def _record_id(identifier: Any, default: str) -> str:
    if identifier is None:
        return default
    if type(identifier) not in (str, int):
        raise ValueError(
            f"id={quote(identifier)} is neither text nor a whole number; give one of these"
        )
    return str(identifier)
