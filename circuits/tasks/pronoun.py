"""Gendered pronouns: "The boy was sad, so" is followed by " he", "The girl was sad, so" by " she".

A prompt is a subject put into a frame; its corrupt partner is the same frame with the subject of
the other gender. Both have the same number of tokens under the tokenizer of `stories260K`
(karpathy/tinyllamas, MIT; a Llama with 260 thousand weights, trained on TinyStories, Eldan & Li
2023, arXiv 2305.07759).  Subjects and frames were chosen for that model: it prefers the right
pronoun in each of the 6700 prompts, by 3.5 logits on average in the trusted ones.  The module
itself needs no tokenizer; with another one, pairs of subjects of unequal length are left out.

A frame that ends a sentence asks for " He" or " She", any other for " he" or " she".  The model was
trained with BOS in front of each story, so use `prepend_bos=true`.

There are two groups of names and two of frames, so that what was found on the trusted ones can be
tried on the shifted ones, which the same mechanism answers.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from circuits.tasks.task import Task
from circuits.tasks.words import Lexicon

GROUPS = ("trusted", "shifted")
PRONOUNS = (" he", " she", " He", " She")

# Male and female subjects of equal token length; only names may enter the frames that name.
SUBJECTS = {
    "trusted": (
        ("The boy", "The girl"),
        ("The little boy", "The little girl"),
        ("Tim", "Lily"),
        ("Max", "Mia"),
        ("Bob", "Sara"),
        ("Jim", "Sally"),
        ("Tommy", "Lisa"),
        ("Benny", "Lucy"),
        ("Roy", "Ella"),
        ("Jack", "Sarah"),
        ("John", "Anna"),
    ),
    "shifted": (
        ("The young boy", "The young girl"),
        ("Leo", "Lara"),
        ("Jimmy", "Nia"),
        ("Joey", "Abby"),
        ("Johnny", "Jessica"),
    ),
}

FEELINGS = "sad happy scared tired hungry angry sick excited proud lonely bored".split()
PLACES = "park beach forest store zoo lake farm garden school".split()
THINGS = "red ball, toy car, book, box, hat, kite, cake, big apple, truck, flower".split(", ")

# {X} is the subject where a sentence begins and {x} inside one.
FRAMES = {
    "trusted": (
        "{X} was {feeling}.",
        "{X} was {feeling}, but",
        "{X} was very {feeling} because",
        "{X} was so {feeling} that",
        "{X} went to the {place}.",
        "{X} went to the {place} because",
        "One day, {x} went to the {place}.",
        "{X} found a {thing}.",
        "{X} wanted a {thing}, but",
        "{X} wanted a {thing}, so",
        "{X} lost the {thing}, but",
        "{X} wanted to play, so",
        "{X} wanted to play, but",
        "{X} did not know what to do, so",
        "{X} did not like the food, so",
        "{X} smiled because",
        "{X} cried because",
        "{X} laughed because",
        "{X} fell down because",
        "{X} fell down.",
        "{X} tried to run, but",
        "{X} tried to help, but",
        "{X} tried and tried, but",
        "{X} waited and waited, but",
    ),
    "shifted": (
        "{X} was {feeling}. When",
        "{X} ran to the {place} when",
        "{X} looked at the {thing}.",
        "{X} liked the {thing}. When",
        "{X} was glad that",
        "{X} knew that",
        "{X} said that",
        "{X} was sorry that",
        "{X} played until",
        "{X} took the ball home, and",
        "{X} lost a toy, and",
        "{X} played all day, and",
    ),
}

# Frames that introduce a name, so that the noun before it tells the gender too.
NAMING_FRAMES = {
    "trusted": (
        "Once upon a time, there was a little {child} named {X}.",
        "Once upon a time, there was a {child} named {X}.",
        "Once upon a time, there was a little {child} named {X}. One day,",
        "Once upon a time, there was a little {child} named {X}. {X} was {feeling}, so",
        "Once upon a time, there was a little {child} named {X}. {X} loved to play, but",
        "There was a {child} named {X}. One day, {X} went to the {place}.",
    ),
    "shifted": (
        "In a big house lived a {child} named {X}.",
        "A {child} named {X} had a {thing}. Every day,",
        "One day, a little {child} named {X} was {feeling}. Then,",
    ),
}

SLOTS = {"{feeling}": FEELINGS, "{place}": PLACES, "{thing}": THINGS}


@dataclass
class Pronoun:
    """Prompts of gendered pronouns."""

    name: str = "pronoun"
    names: str = "trusted"  # which subjects: "trusted", "shifted" or "all"
    frames: str = "trusted"  # which sentences stand around them: "trusted", "shifted" or "all"
    subjects: list[str] | None = None  # only these male ones, with their partners; null: all

    def fitted(self, tokenizer: Any) -> Pronoun:
        """With the pairs of equal length, if not all are; ValueError where none is."""
        lexicon = Lexicon.of(self.name, tokenizer)
        if out := [word.strip() for word in PRONOUNS if not lexicon.is_one(word)]:
            raise ValueError(
                f"task=pronoun needs{','.join(PRONOUNS)} as one token each, but with this model's "
                f"tokenizer {', '.join(out)} is not; use another model or task"
            )
        pairs = [pair for group in chosen("names", self.names, GROUPS) for pair in SUBJECTS[group]]
        pairs = [pair for pair in pairs if self.subjects is None or pair[0] in self.subjects]
        equal = [pair[0] for pair in pairs if _is_equal(pair, lexicon)]
        lexicon.require("subjects", equal, [pair[0] for pair in pairs], 1)
        return self if len(equal) == len(pairs) else replace(self, subjects=equal)


def generate(config: Pronoun, count: int, seed: int) -> list[dict]:
    """`count` different prompts with their counterfactuals, drawn without replacement.

    Raises:
        ValueError: an unknown group, or `count` outside what the templates give.
    """
    names = chosen("names", config.names, GROUPS)
    frames = chosen("frames", config.frames, GROUPS)
    everything = all_prompts(config.subjects)
    prompts = [r for r in everything if r["names"] in names and r["frames"] in frames]
    if not 1 <= count <= len(prompts):
        raise ValueError(
            f"count={count}, but names={config.names} with frames={config.frames} give 1 to "
            f"{len(prompts)} prompts; change count or use more groups"
        )
    return random.Random(seed).sample(prompts, count)


def all_prompts(only: Collection[str] | None = None) -> list[dict]:
    """Every prompt of every group, always in the same order; `id` counts them through.

    `only` names the male subjects to use; None: all.
    """
    prompts = []
    for frames, names in product(GROUPS, GROUPS):
        for frame in FRAMES[frames] + NAMING_FRAMES[frames]:
            pronouns = (" He", " She") if frame.endswith(".") else (" he", " she")
            for filled, pair in product(fill_slots(frame), _subjects(frame, frames, names, only)):
                texts = [_sentence(filled, *who) for who in zip(pair, ("boy", "girl"))]
                for gender in (0, 1):
                    prompts.append(
                        {
                            "clean": texts[gender],
                            "corrupt": texts[1 - gender],
                            "answers": [pronouns[gender]],
                            "wrong_answers": [pronouns[1 - gender]],
                            "label": 0,
                            "id": f"pronoun-{len(prompts)}",
                            "names": names,
                            "frames": frames,
                        }
                    )
    return prompts


def _subjects(
    frame: str, frames: str, names: str, only: Collection[str] | None
) -> list[tuple[str, str]]:
    """The subjects that may enter a frame."""
    naming = frame in NAMING_FRAMES[frames]
    pairs = [pair for pair in SUBJECTS[names] if only is None or pair[0] in only]
    return [pair for pair in pairs if not naming or _is_name(pair[0])]


def _is_equal(pair: tuple[str, str], lexicon: Lexicon) -> bool:
    """Whether both subjects are equally long for a tokenizer, in each frame that they enter."""
    for group in GROUPS:
        frames = (*FRAMES[group], *(NAMING_FRAMES[group] if _is_name(pair[0]) else ()))
        for frame in frames:
            filled = fill_slots(frame)[0]
            texts = [_sentence(filled, *who) for who in zip(pair, ("boy", "girl"))]
            if len({len(lexicon.tokens(text)) for text in texts}) > 1:
                return False
    return True


def fill_slots(frame: str) -> list[str]:
    """The frame once for each word that its slot, if any, can take."""
    for slot, words in SLOTS.items():
        if slot in frame:
            return [frame.replace(slot, word) for word in words]
    return [frame]


def chosen(field: str, value: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """The values that a setting names, "all" or one; raises ValueError for any other."""
    if value != "all" and value not in allowed:
        raise ValueError(
            f"{field}={value!r} is none of {', '.join(allowed)}, all; choose one of them"
        )
    return allowed if value == "all" else (value,)


def _is_name(subject: str) -> bool:
    return not subject.startswith("The ")


def _sentence(frame: str, subject: str, child: str) -> str:
    inside = subject if _is_name(subject) else subject[0].lower() + subject[1:]
    return frame.replace("{X}", subject).replace("{x}", inside).replace("{child}", child)


TASK = Task("pronoun", Pronoun, generate)
