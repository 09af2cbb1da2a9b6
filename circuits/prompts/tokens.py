"""What a model reads: its tokenizer, the BOS it wants first, and the bounds on token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from circuits.prompts.errors import quote

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGEST_VOCABULARY = 2**31  # the bound on token ids where nothing tells it


def begins_with_bos(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether the tokenizer itself puts BOS before a text; False where there is none."""
    if tokenizer is None:
        return False
    tokens = tokenizer.encode("a")
    return len(tokens) > 1 and tokens[0] == tokenizer.bos_token_id


def vocabulary_of(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The bound on token ids where the model's own is not given."""
    return LARGEST_VOCABULARY if tokenizer is None else len(tokenizer)


def bos_to_prepend(tokenizer: PreTrainedTokenizerBase | None, prepend_bos: bool) -> int | None:
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


@dataclass(frozen=True)
class Encoder:
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
            check_token(field, token, self.vocabulary)
        if self.bos is None or tokens[0] == self.bos:
            return tuple(tokens)
        if not isinstance(source, str):
            raise ValueError(
                f"{field} begins with token {tokens[0]}, but prepend_bos=True and token ids are "
                f"taken as they are; begin with BOS, {self.bos}, or set prepend_bos=False"
            )
        return (self.bos, *tokens)

    def _tokens(self, field: str, source: Any) -> list[Any]:
        if isinstance(source, str):
            if self.tokenizer is None:
                raise ValueError(
                    f"{field}={quote(source)} is text, but there is no tokenizer; give a "
                    "tokenizer or token ids"
                )
            return encode_text(field, source, self.tokenizer)
        if isinstance(source, list | tuple):
            return list(source)
        raise ValueError(
            f"{field}={quote(source)} is neither text nor a list of token ids; give one of these"
        )


def encode_text(field: str, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text, without special tokens; ValueError for lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{field}={quote(text)} is no valid Unicode; remove the lone surrogates"
        ) from None
    return tokenizer.encode(text, add_special_tokens=False)


def check_token(field: str, token: Any, bound: int) -> None:
    """Raises ValueError for what is no token id under the bound."""
    if type(token) is not int:
        raise ValueError(
            f"{field} holds {quote(token)}, which is no token id; token ids are whole numbers"
        )
    if not 0 <= token < bound:
        raise ValueError(
            f"{field} holds token {quote(token)}, but token ids run from 0 to {bound - 1}"
        )
