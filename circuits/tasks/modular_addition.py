"""Modular addition: a, b, "=" is answered with (a + b) mod p.

Token ids for models that were trained on it (Nanda et al. 2023, arXiv 2301.05217): numbers are
0 .. p - 1, and p stands for "=".  Text where the model has a tokenizer, "(12 + 45) mod 50 =" and
" 7", which needs all numbers as single tokens; where digits are tokens of their own, p is at most
10.  The corrupt prompt has another second number; the wrong answer is its sum.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from circuits.tasks.task import Task, drawn
from circuits.tasks.words import Lexicon


@dataclass
class ModularAddition:
    """Prompts of sums modulo a number."""

    name: str = "modular_addition"
    form: str | None = None  # text or tokens; null: text where the model has a tokenizer
    modulus: int = 113  # numbers are 0 .. modulus - 1
    spaced: bool = True  # text: the space before an answer is part of its token

    def fitted(self, tokenizer: Any) -> ModularAddition:
        """In the form that a tokenizer serves; ValueError where not all numbers are one token."""
        if tokenizer is None or self.form == "tokens":
            return replace(self, form=self.form or "tokens")
        lexicon = Lexicon.of(self.name, tokenizer)
        numbers = [str(number) for number in range(max(self.modulus, 0))]
        served = {
            spaced: [n for n in numbers if _is_one(n, spaced, lexicon)] for spaced in (True, False)
        }
        spaced = len(served[True]) >= len(served[False])
        if len(served[spaced]) < len(numbers):
            first = next(n for n in numbers if n not in served[spaced])
            remedy = f"lower task.modulus to {first}" if int(first) > 1 else "use another model"
            raise ValueError(
                f"task=modular_addition needs the numbers 0 to {self.modulus - 1} as single "
                f"tokens, but with this model's tokenizer {len(served[spaced])} of {len(numbers)} "
                f"are, and {first} is not; {remedy}, or use task.form=tokens"
            )
        return replace(self, form="text", spaced=spaced)


def _is_one(number: str, spaced: bool, lexicon: Lexicon) -> bool:
    """Whether a number is one token as the answer, and in the sum as many as any other."""
    word, before = (f" {number}", "=") if spaced else (number, "= ")
    inside = len(lexicon.tokens(f"(1 + {number}) mod")) == len(lexicon.tokens("(1 + 1) mod"))
    return inside and lexicon.is_one(word, before)


def generate(config: ModularAddition, count: int, seed: int) -> list[dict]:
    """`count` different prompts with their counterfactuals.

    Raises:
        ValueError: another form, a modulus below 2, or `count` outside 1 to its square.
    """
    p = config.modulus
    if config.form not in (None, "text", "tokens"):
        raise ValueError(f"form={config.form!r} is none of text, tokens; choose one of them")
    if p < 2:
        raise ValueError(f"modulus={p}, but it must be at least 2")
    if not 1 <= count <= p * p:
        raise ValueError(
            f"count={count}, but modulus={p} gives 1 to {p * p} prompts; change count or modulus"
        )

    def draw(generator: random.Random) -> dict:
        one, other, twin = generator.randrange(p), generator.randrange(p), generator.randrange(p)
        twin = twin if twin != other else (twin + 1) % p
        if config.form == "text":
            return _text(one, other, twin, config)
        return {
            "clean": [one, other, p],
            "corrupt": [one, twin, p],
            "answers": [(one + other) % p],
            "wrong_answers": [(one + twin) % p],
        }

    return drawn("modular_addition", count, seed, draw, f"modulus={p}")


def _text(one: int, other: int, twin: int, config: ModularAddition) -> dict:
    p = config.modulus
    gap, space = ("", " ") if config.spaced else (" ", "")
    return {
        "clean": f"({one} + {other}) mod {p} ={gap}",
        "corrupt": f"({one} + {twin}) mod {p} ={gap}",
        "answers": [f"{space}{(one + other) % p}"],
        "wrong_answers": [f"{space}{(one + twin) % p}"],
    }


TASK = Task("modular_addition", ModularAddition, generate)
