"""Subject and verb agree: "The keys near the cabinet" -> " are", not " is".

The corrupt prompt has the subject in the other number, so that the other verbs are right; a noun
that stands between subject and verb is as it was, and may be of either number (Linzen et al. 2016,
arXiv 1611.01368).  Nouns are those of which the model's tokenizer reads both numbers as one token;
so are verbs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from circuits.tasks.task import Task, drawn
from circuits.tasks.words import Lexicon

NOUNS = (
    "boy/boys girl/girls dog/dogs cat/cats car/cars book/books friend/friends teacher/teachers "
    "student/students doctor/doctors parent/parents brother/brothers sister/sisters lawyer/lawyers "
    "king/kings bird/birds tree/trees house/houses river/rivers picture/pictures door/doors "
    "manager/managers player/players writer/writers driver/drivers author/authors guest/guests "
    "guard/guards window/windows table/tables"
).split()
VERBS = "is/are was/were has/have does/do".split()
FRAMES = {
    "plain": ("The {noun}", "Every day, the {noun}", "Last year the {noun}"),
    "attractor": (
        "The {noun} near the {other}",
        "The {noun} behind the {other}",
        "The {noun} with the {other}",
        "The {noun} next to the {other}",
    ),
}


@dataclass
class Sva:
    """Prompts of subject-verb agreement."""

    name: str = "sva"
    frames: str = "all"  # plain: only the subject; attractor: another noun before the verb; all
    # singular/plural, such as key/keys; null: 30 of ours
    nouns: list[str] | None = None
    verbs: list[str] | None = None  # singular/plural, such as is/are; null: 4 of ours

    def fitted(self, tokenizer: Any) -> Sva:
        """With the words of which both numbers are one token; ValueError where too few are."""
        lexicon = Lexicon.of(self.name, tokenizer)
        kept = {}
        for field, words, needed in (("nouns", NOUNS, 3), ("verbs", VERBS, 1)):
            given = getattr(self, field) or words
            both = [
                pair
                for pair in given
                if all(lexicon.is_one(f" {word}") for word in _numbers(field, pair))
            ]
            lexicon.require(field, both, given, needed)
            kept[field] = both
        return replace(self, **kept)


def generate(config: Sva, count: int, seed: int) -> list[dict]:
    """`count` different prompts with their counterfactuals.

    Raises:
        ValueError: other `frames`, words without two numbers, or `count` outside what they give.
    """
    if config.frames not in (*FRAMES, "all"):
        raise ValueError(
            f"frames={config.frames!r} is none of {', '.join(FRAMES)}, all; choose one of them"
        )
    groups = FRAMES if config.frames == "all" else {config.frames: FRAMES[config.frames]}
    frames = [frame for group in groups.values() for frame in group]
    nouns = [_numbers("nouns", pair) for pair in config.nouns or NOUNS]
    verbs = [_numbers("verbs", pair) for pair in config.verbs or VERBS]
    if len(nouns) < 2:
        raise ValueError(f"{len(nouns)} nouns, but at least 2 are needed; give more in task.nouns")

    def draw(generator: random.Random) -> dict:
        frame, number = generator.choice(frames), generator.randrange(2)
        noun, between = generator.sample(nouns, 2)
        other = generator.choice(between)
        texts = [frame.format(noun=word, other=other) for word in noun]
        return {
            "clean": texts[number],
            "corrupt": texts[1 - number],
            "answers": [f" {pair[number]}" for pair in verbs],
            "wrong_answers": [f" {pair[1 - number]}" for pair in verbs],
            "group": ("singular", "plural")[number],
        }

    return drawn("sva", count, seed, draw, f"{len(nouns)} nouns and frames={config.frames}")


def _numbers(field: str, pair: str) -> tuple[str, str]:
    singular, slash, plural = pair.partition("/")
    if not (singular and slash and plural) or "/" in plural:
        raise ValueError(f"{field} holds {pair!r}, but words are given as singular/plural")
    return singular, plural


TASK = Task("sva", Sva, generate)
