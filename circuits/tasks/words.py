"""Which words a tokenizer reads as one token, so that prompts made of them have one shape.

A task of texts swaps words for others: the corrupt twin of a prompt, and its answer, are sound only
where each of them is one token.  Tokenizers differ in which words are; a task keeps those that this
one serves, and says how many it would need.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from circuits.prompts.tokens import encode_text


@dataclass(frozen=True)
class Lexicon:
    """A tokenizer, asked about words on behalf of a task."""

    task: str
    tokenizer: Any

    @classmethod
    def of(cls, task: str, tokenizer: Any) -> Lexicon:
        """Raises ValueError where there is no tokenizer to read text with."""
        if tokenizer is None:
            raise ValueError(
                f"task={task} is made of text, but this model has no tokenizer; use a task of "
                "token ids (induction, recall), or a model with a tokenizer"
            )
        return cls(task, tokenizer)

    def tokens(self, text: str) -> list[int]:
        """The token ids of a text, without special ones."""
        return encode_text("prompt", text, self.tokenizer)

    def is_one(self, word: str, before: str = "It is") -> bool:
        """Whether a word is one token, and a known one, after a text."""
        ahead, whole = self.tokens(before), self.tokens(before + word)
        one_more = len(whole) == len(ahead) + 1 and whole[:-1] == ahead
        return one_more and whole[-1] != self.tokenizer.unk_token_id

    def kept(
        self, field: str, words: Sequence[str], needed: int, before: str = "It is"
    ) -> list[str]:
        """The words that are one token after a space.

        Args:
            field: the setting that holds them, which their user can change.
            needed: how many there must be.

        Raises:
            ValueError: fewer are.
        """
        found = [word for word in words if self.is_one(f" {word}", before)]
        self.require(field, found, words, needed)
        return found

    def require(self, field: str, found: Sequence[Any], among: Sequence[Any], needed: int) -> None:
        """Raises ValueError where too few are found, naming the first of those that are not."""
        if len(found) >= needed:
            return
        out = [str(one) for one in among if one not in found]
        raise ValueError(
            f"task={self.task} needs at least {needed} {field} of one token each, but with this "
            f"model's tokenizer {len(found)} of {len(among)} are (not {_listed(out)}); give others "
            f"in task.{field}, or use another model or task"
        )


def _listed(words: Iterable[str]) -> str:
    few = list(words)
    return ", ".join(few[:5]) + (", ..." if len(few) > 5 else "")
