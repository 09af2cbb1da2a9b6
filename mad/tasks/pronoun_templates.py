"""Texts in which something other than the gender of the person named first decides the pronoun.

The templates were chosen for `stories260K` (karpathy/tinyllamas, MIT), with BOS in front.  In each
of them its first choice among "he", "she" and "they" is the expected one in 95 % of the fillings or
more, and in each direction: man before woman, woman before man, both of one gender.  Three things
to know about them:

* A later name does not win against every earlier one: the model follows the name that it knows
  best.  So templates with a rival take their people from `RIVALS`, where the later one wins in
  either order.
* In a template of repetition the copy takes part: with a name of the other gender in front of the
  same repeated pronoun, the pronoun stays in 95 % of the cases or more.  These contradictory texts
  served to choose only.
* A later or corrected name is the subject of the last clause, and the same heads may well carry its
  gender.  Whether that is a mechanism of its own is open; `how` and `kind` keep such prompts apart
  from the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, permutations

from circuits.tasks import pronoun

PRONOUNS = ("he", "she", "they")

# Names only: "The boy" would have to be written differently inside a sentence.
COUPLES = tuple(pair for pair in pronoun.SUBJECTS["trusted"] if not pair[0].startswith("The "))
NAMES = tuple(chain.from_iterable(COUPLES))
GENDER = {name: gender for couple in COUPLES for gender, name in enumerate(couple)}
OTHER = {name: couple[1 - gender] for couple in COUPLES for gender, name in enumerate(couple)}

# Of these the later one wins in either order; with "Bob", say, the woman does in both orders.
RIVALS = ("Tim", "Max", "Jack", "Lily", "Sally", "Lucy")


@dataclass(frozen=True)
class Departure:
    """Templates in which the same thing decides the pronoun.

    {A} and {B} are the people in the order in which they are named, {P} is the pronoun of the one
    who decides.
    """

    how: str
    people: tuple[tuple[str, ...], ...]  # who may be {A} and {B}
    decides: int | None  # whose gender is asked for: 0 for {A}, 1 for {B}, None for "they"
    templates: tuple[str, ...]


DEPARTURES = (
    Departure(
        how="two_people",
        people=tuple(permutations(NAMES, 2)),
        decides=None,
        templates=(
            "{A} and {B} were {feeling}.",
            "{A} and {B} went to the {place}.",
            "{A} and {B} smiled because",
            "{A} and {B} laughed because",
            "One day, {A} and {B} went to the {place}.",
            "One day, {A} and {B} fell down.",
            "One day, {A} and {B} smiled because",
            "One day, {A} and {B} found a {thing}.",
            "One day, {A} and {B} wanted to play, but",
            "One day, {A} and {B} wanted a {thing}, but",
        ),
    ),
    Departure(
        how="two_people",
        people=tuple(permutations(RIVALS, 2)),
        decides=1,
        templates=(
            "{A} was {feeling}, but {B} was {feeling}.",
            "{A} was {feeling}. {B} fell down.",
            "{A} wanted to play, but {B} was {feeling}.",
            "{A} wanted to play, but {B} went to the {place}.",
            "{A} wanted to play, so {B} found a {thing}.",
            "{A} cried. {B} fell down.",
            "{A} smiled. {B} went to the {place}.",
            "{A} laughed. {B} lost the {thing}.",
            "{A} fell down, but {B} was {feeling}.",
            "{A} tried to run, but {B} was {feeling}.",
            "{A} tried to help, but {B} fell down.",
        ),
    ),
    Departure(
        how="corrected",
        people=tuple(permutations(RIVALS, 2)),
        decides=1,
        templates=(
            "{A}, no, {B} wanted to play, so",
            "{A}, no, {B} wanted a {thing}, so",
            "One day, {A}, no, {B} wanted to play, but",
            "One day, {A}, no, {B} went to the {place}.",
            "One day, not {A}, but {B} went to the {place}.",
            "One day, not {A}, but {B} found a {thing}.",
            "One day, not {A}, but {B} was {feeling}.",
            "One day, not {A}, but {B} fell down.",
            "{A} was {feeling}. No, {B} was {feeling}.",
            "{A} fell down. No, {B} fell down.",
            "{A} was not {feeling}. {B} was {feeling}.",
            "It was not {A}. {B} was {feeling}.",
            "It was not {A}. {B} fell down.",
            "It was not {A}. {B} went to the {place}.",
            "It was not {A}. {B} found a {thing}.",
            "It was not {A}. No, {B} was {feeling}.",
        ),
    ),
    Departure(
        how="repeated",
        people=tuple((name,) for name in NAMES),
        decides=0,
        templates=(
            "{A} found a {thing}. {P} was happy, so",
            "{A} found a {thing}. {P} was excited, so",
            "{A} found a {thing}. {P} wanted to play, so",
            "{A} lost the {thing}. {P} was sad, so",
            "{A} lost the {thing}. {P} was angry, so",
            "{A} wanted a {thing}. {P} waited and waited, but",
            "{A} wanted a {thing}. {P} went to the store.",
            "{A} cried. {P} was {feeling}, so",
            "{A} cried. {P} was {feeling}, but",
            "{A} smiled. {P} was {feeling}, so",
            "{A} smiled. {P} wanted a {thing}, so",
            "{A} smiled. {P} wanted a {thing}, but",
            "{A} wanted to play. {P} was {feeling}, so",
        ),
    ),
    Departure(
        how="repeated",
        people=tuple(pair for pair in permutations(NAMES, 2) if GENDER[pair[0]] != GENDER[pair[1]]),
        decides=1,
        templates=(
            "{A} found {B}. {P} was {feeling}, so",
            "{A} found {B}. {P} wanted a {thing}, so",
            "{A} wanted to help {B}. {P} was {feeling}, so",
        ),
    ),
)
