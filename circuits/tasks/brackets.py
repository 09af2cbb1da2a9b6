"""Balanced brackets: after "( [ ] {" comes "}", which closes the last one that is open.

Sequences of `kinds` kinds of brackets, well nested, of which some are still open at the end; the
answer closes the innermost of them, the wrong answers are the closing brackets of the other kinds.
In the corrupt prompt that bracket is opened as another kind, all else is as it was.

Text where the model has a tokenizer (brackets apart by spaces, of which each must be one token),
else token ids: 0 .. kinds - 1 open, kinds .. 2 kinds - 1 close.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from circuits.tasks.task import Task, drawn
from circuits.tasks.words import Lexicon

PAIRS = ("()", "[]", "{}", "<>")
START = "="  # before the first bracket of a text


@dataclass
class Brackets:
    """Prompts of brackets of which one is to be closed."""

    name: str = "brackets"
    form: str | None = None  # text or tokens; null: text where the model has a tokenizer
    kinds: int = 3  # kinds of brackets, 2 to 4 in text
    length: int = 9  # brackets in a prompt
    deepest: int = 4  # brackets that are open at once, at most

    def fitted(self, tokenizer: Any) -> Brackets:
        """In the form that a tokenizer serves; ValueError where not all kinds are one token."""
        if tokenizer is None or self.form == "tokens":
            return replace(self, form=self.form or "tokens")
        lexicon = Lexicon.of(self.name, tokenizer)
        wanted = [*PAIRS[: self.kinds]]
        served = [pair for pair in wanted if all(lexicon.is_one(f" {b}", START) for b in pair)]
        if len(served) < len(wanted):
            first = next(n for n, pair in enumerate(wanted) if pair not in served)
            remedy = f"lower task.kinds to {first}" if first > 1 else "use another model"
            raise ValueError(
                f"task=brackets needs {len(wanted)} kinds of brackets of one token each, but with "
                f"this model's tokenizer {len(served)} are ({' '.join(served) or 'none'}); "
                f"{remedy}, or use task.form=tokens"
            )
        return replace(self, form="text")


def generate(config: Brackets, count: int, seed: int) -> list[dict]:
    """`count` different prompts with their counterfactuals.

    Raises:
        ValueError: another form, too few or too many kinds, a length or depth that leaves no
            bracket open, or `count` outside what they give.
    """
    _check(config)
    text = config.form == "text"

    def draw(generator: random.Random) -> dict:
        sequence, opened = _sequence(config, generator)
        kind = sequence[opened]
        twin = list(sequence)
        twin[opened] = generator.choice([other for other in range(config.kinds) if other != kind])
        closing = [config.kinds + other for other in range(config.kinds)]
        return {
            "clean": _text(sequence, config) if text else sequence,
            "corrupt": _text(twin, config) if text else twin,
            "answers": [_name(closing[kind], config) if text else closing[kind]],
            "wrong_answers": [
                _name(other, config) if text else other
                for other in closing
                if other != closing[kind]
            ],
        }

    about = f"kinds={config.kinds} and length={config.length}"
    return drawn("brackets", count, seed, draw, about)


def _check(config: Brackets) -> None:
    if config.form not in (None, "text", "tokens"):
        raise ValueError(f"form={config.form!r} is none of text, tokens; choose one of them")
    most = len(PAIRS) if config.form == "text" else 1000
    if not 2 <= config.kinds <= most:
        raise ValueError(f"kinds={config.kinds}, but form={config.form} has 2 to {most}")
    for field, lowest in (("length", 1), ("deepest", 1)):
        if getattr(config, field) < lowest:
            raise ValueError(f"{field}={getattr(config, field)}, but it must be at least {lowest}")
    if config.deepest == 1 and config.length % 2 == 0:
        raise ValueError(
            f"length={config.length} with deepest=1 leaves no bracket open; make the length odd "
            "or raise deepest"
        )


def _sequence(config: Brackets, generator: random.Random) -> tuple[list[int], int]:
    """Brackets, of which at least one is open, and where the innermost open one is."""
    while True:
        sequence: list[int] = []
        stack: list[int] = []  # where the open ones are
        for place in range(config.length):
            may_open = len(stack) < config.deepest
            if not stack or (may_open and generator.random() < 0.5):
                stack.append(place)
                sequence.append(generator.randrange(config.kinds))
            else:
                sequence.append(config.kinds + sequence[stack.pop()])
        if stack:
            return sequence, stack[-1]


def _name(bracket: int, config: Brackets) -> str:
    closes, kind = divmod(bracket, config.kinds)
    return f" {PAIRS[kind][closes]}"


def _text(sequence: list[int], config: Brackets) -> str:
    return START + "".join(_name(bracket, config) for bracket in sequence)


TASK = Task("brackets", Brackets, generate)
