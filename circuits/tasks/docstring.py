"""Docstrings: after two documented arguments of a function the third is to be named.

    def port(self, load, size, files, last):
        '''oil column piece

        :param load: crime population
        :param size: unit dark
        :param

is continued with " files" (Heimersheim & Janiak 2023, "A circuit for Python docstrings in a 4-layer
attention-only transformer"), with double quotes.  The corrupt prompt has other arguments in the
function's head, none of which is in the clean prompt, so that nothing tells which one is next.
Wrong answers are the other arguments of the clean head.  All words are ones that the model's
tokenizer reads as one token.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from circuits.tasks.task import Task, drawn
from circuits.tasks.words import Lexicon

WORDS = (
    "load size files last oil column piece crime population unit dark port name model image user "
    "value page group table index state color light water power city road field class point line "
    "word text list order price time year month week hour game team player ball house room door "
    "window street market bank money paper book letter story history music art film stage food "
    "plant tree river sea island mountain sun moon star energy force speed"
).split()
ARGUMENTS, DOCUMENTED = 4, 2
NEEDED = 16  # 4 arguments, 4 others, 3 and 4 words of description, a name


@dataclass
class Docstring:
    """Prompts of Python docstrings."""

    name: str = "docstring"
    words: list[str] | None = None  # of arguments and descriptions; null: 76 of ours

    def fitted(self, tokenizer: Any) -> Docstring:
        """With the words that are one token; ValueError where too few are."""
        lexicon = Lexicon.of(self.name, tokenizer)
        return replace(self, words=lexicon.kept("words", self.words or WORDS, NEEDED))


def generate(config: Docstring, count: int, seed: int) -> list[dict]:
    """`count` different prompts with their counterfactuals.

    Raises:
        ValueError: fewer than 16 words, or `count` outside what they give.
    """
    words = list(dict.fromkeys(config.words or WORDS))
    if len(words) < NEEDED:
        raise ValueError(
            f"{len(words)} different words, but a prompt needs {NEEDED}; give more in task.words"
        )

    def draw(generator: random.Random) -> dict:
        name, *rest = generator.sample(words, NEEDED)
        arguments, others, told = rest[:4], rest[4:8], rest[8:]
        body = [
            f'    """{told[0]} {told[1]} {told[2]}',
            "",
            *(
                f"    :param {arguments[n]}: {told[3 + 2 * n]} {told[4 + 2 * n]}"
                for n in range(DOCUMENTED)
            ),
            "    :param",
        ]
        texts = [
            "\n".join([f"def {name}(self, {', '.join(head)}):", *body])
            for head in (arguments, others)
        ]
        return {
            "clean": texts[0],
            "corrupt": texts[1],
            "answers": [f" {arguments[DOCUMENTED]}"],
            "wrong_answers": [f" {arguments[n]}" for n in range(ARGUMENTS) if n != DOCUMENTED],
        }

    return drawn("docstring", count, seed, draw, f"{len(words)} words")


TASK = Task("docstring", Docstring, generate)
