"""Indirect objects: "When Mary and John went to the store, John gave a drink to" -> " Mary".

Two names, one of which comes again as the one who gives; the other is the answer (Wang et al. 2022,
arXiv 2211.00593).  Either may stand first.  The corrupt prompt has, in place of the repeated name,

    third     a name that is nowhere else, so that neither stands out
    flip      the other name, so that the answer is the other one

Names, places and things are those of the list that the model's tokenizer reads as one token.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from circuits.tasks.task import Task, drawn
from circuits.tasks.words import Lexicon

NAMES = (
    "Mary John Tom James Dan Sarah Anna Paul Mark Peter Jack Emma Alice Kate David Robert Michael "
    "Kevin Brian Laura Martin George Richard Susan Lisa Simon Daniel Rachel"
).split()
PLACES = "store park school garden station office house hospital".split()
THINGS = "drink ring book letter ball gift flower phone".split()
TEMPLATES = (
    "When {A} and {B} went to the {place}, {S} gave a {thing} to",
    "After {A} and {B} had been to the {place}, {S} handed a {thing} to",
    "Then {A} and {B} were at the {place}. {S} decided to give a {thing} to",
    "Then, {A} and {B} went to the {place}. {S} gave a {thing} to",
)
CORRUPT = ("third", "flip")


@dataclass
class Ioi:
    """Prompts of indirect objects."""

    name: str = "ioi"
    # null: 28 English first names, of which those are used that are one token
    names: list[str] | None = None
    places: list[str] | None = None  # null: 8 of ours
    things: list[str] | None = None  # null: 8 of ours
    corrupt: str = "third"  # the repeated name becomes: third, a name of its own; flip, the other

    def fitted(self, tokenizer: Any) -> Ioi:
        """With the words that are one token; ValueError where too few are."""
        lexicon = Lexicon.of(self.name, tokenizer)
        return replace(
            self,
            names=lexicon.kept("names", self.names or NAMES, 3),
            places=lexicon.kept("places", self.places or PLACES, 1),
            things=lexicon.kept("things", self.things or THINGS, 1),
        )


def generate(config: Ioi, count: int, seed: int) -> list[dict]:
    """`count` different prompts with their counterfactuals.

    Raises:
        ValueError: another `corrupt`, fewer than 3 names, or `count` outside what the words give.
    """
    names = list(dict.fromkeys(config.names or NAMES))
    if config.corrupt not in CORRUPT:
        raise ValueError(
            f"corrupt={config.corrupt!r} is none of {', '.join(CORRUPT)}; choose one of them"
        )
    if len(names) < 3:
        raise ValueError(f"{len(names)} names, but at least 3 are needed; give more in task.names")

    def draw(generator: random.Random) -> dict:
        first, second, third = generator.sample(names, 3)
        giver, other = generator.sample([first, second], 2)
        frame = generator.choice(TEMPLATES)
        words = {
            "A": first,
            "B": second,
            "place": generator.choice(config.places or PLACES),
            "thing": generator.choice(config.things or THINGS),
        }
        twin = third if config.corrupt == "third" else other
        return {
            "clean": frame.format(S=giver, **words),
            "corrupt": frame.format(S=twin, **words),
            "answers": [f" {other}"],
            "wrong_answers": [f" {giver}"],
        }

    return drawn("ioi", count, seed, draw, f"{len(names)} names")


TASK = Task("ioi", Ioi, generate)
