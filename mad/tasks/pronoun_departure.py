"""Gendered pronouns in a real language model, decided by something other than the gender of the
subject.

A trusted prompt names one person and asks for the pronoun (`circuits/tasks/pronoun.py`): "Tim was
sad, so" -> " he". In an anomaly the model finds its answer elsewhere; nothing is planted, it does
so by itself.  Groups of prompts:

    trusted, normal_iid     trusted names in trusted frames; two disjoint draws from one distribution
    normal_shift            harmless and new; `novelty` says what is new: the names, the frames or both
    anomaly                 `how` says what decides the pronoun instead:
        two_people          both people ("Max and Lily went to the park." -> " They"), or the one named later
                            ("Max wanted to play, but Lily was sad." -> " She")
        corrected           the name that replaces the first one ("It was not Max. Lily was sad." -> " She")
        repeated            the pronoun that already stands in the text and is copied ("Max smiled. He was sad, so")

`kind` is "agree" where the expected pronoun is also the one that the gender of the person named
first gives, and "disagree" where it is not.  The answer to two people is "they", whatever their
gender, so it always disagrees.  Where a later name decides, the prompts with two people of one
gender agree, two in five.

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

Apart from names the anomalies consist of words of the trusted frames and of these: "were", "It",
"No" and "no", "He" and "She".  All names are trusted ones.  They are longer, though within the
range of trusted prompts: 20 tokens in the median and 8 to 27 in all, against 13 and 5 to 33.  The
number of tokens alone tells anomalies from `normal_iid` with an AUROC of .85 and from
`normal_shift` with .72, so hold a detector's scores against these.

Each prompt's corrupt partner is the same text with everyone of the other gender, pronouns included;
it has the same number of tokens.  A trusted prompt's partner may occur in any of the first two
groups.  The wrong answers are the two other pronouns, in every group.  The module needs no
tokenizer.

The task is this library's own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice, permutations, product, zip_longest
from typing import Any

from circuits.tasks import pronoun

HOWS = ("two_people", "corrected", "repeated")

# novelty -> (names, frames) as `circuits.tasks.pronoun` calls them
NOVELTIES = {
    "names": ("shifted", "trusted"),
    "frames": ("trusted", "shifted"),
    "both": ("shifted", "shifted"),
}

PRONOUNS = ("he", "she", "they")

# Names only: "The boy" would have to be written differently inside a sentence.
COUPLES = tuple(pair for pair in pronoun.SUBJECTS["trusted"] if not pair[0].startswith("The "))
NAMES = tuple(chain.from_iterable(COUPLES))
GENDER = {name: gender for couple in COUPLES for gender, name in enumerate(couple)}
OTHER = {name: couple[1 - gender] for couple in COUPLES for gender, name in enumerate(couple)}

# Names between which the later one wins in either order; with "Bob", say, the woman does in both
# orders.
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
        people=tuple(
            (first, later)
            for first, later in permutations(NAMES, 2)
            if GENDER[first] != GENDER[later]
        ),
        decides=1,
        templates=(
            "{A} found {B}. {P} was {feeling}, so",
            "{A} found {B}. {P} wanted a {thing}, so",
            "{A} wanted to help {B}. {P} was {feeling}, so",
        ),
    ),
)


@dataclass
class PronounDeparture:
    """Gendered pronouns that something other than the subject's gender decides."""

    name: str = "pronoun_departure"
    # what is new in shifted normals: "names", "frames", "both", or "all" in equal parts
    novelty: str = "all"
    # what decides in anomalies: "two_people", "corrected", "repeated", or "all" in equal parts
    how: str = "all"


def groups(
    config: PronounDeparture,
    trusted: int = 2160,
    normal_iid: int = 1000,
    normal_shift: int = 1000,
    anomaly: int = 1000,
    seed: int = 0,
) -> dict[str, list[dict]]:
    """The records of each group by its name; the four numbers say how many of each.

    No prompt occurs twice, neither within a group nor across groups.  There are 3160 prompts for
    the first two groups together, and the defaults use them all.  Anomalies are spread evenly over
    the templates of each `how`.  Shifted normals carry another key `novelty`; anomalies carry
    `how`, `kind` and `normal_answers`, what the gender of the person named first would have given.

    Raises: ValueError: an unknown novelty or way to depart, a negative number, or more than the
        templates give.
    """
    novelties = _choice("novelty", config.novelty, tuple(NOVELTIES))
    hows = _choice("how", config.how, HOWS)
    normals = _normals()
    seen = _shuffled(normals["trusted", "trusted"], f"{seed} trusted")
    _check_count("trusted", trusted, len(seen))
    _check_count("normal_iid", normal_iid, len(seen) - trusted)
    new = {
        novelty: _shuffled(normals[NOVELTIES[novelty]], f"{seed} {novelty}")
        for novelty in novelties
    }
    departed = {how: _fillings(how, f"{seed} {how}") for how in hows}
    records = {
        "trusted": [_normal(prompt) for prompt in seen[:trusted]],
        "normal_iid": [_normal(prompt) for prompt in seen[trusted : trusted + normal_iid]],
        "normal_shift": [
            {**_normal(prompt), "novelty": novelty}
            for novelty, prompt in _in_turns("normal_shift", normal_shift, new)
        ],
        "anomaly": [
            {**_anomaly(*filling), "how": how}
            for how, filling in _in_turns("anomaly", anomaly, departed)
        ],
    }
    return {
        group: [
            {**record, "id": f"pronoun-{group}-{seed}-{number}", "group": group}
            for number, record in enumerate(members)
        ]
        for group, members in records.items()
    }


def generate(config: PronounDeparture, count: int, seed: int) -> list[dict]:
    """The trusted group of `groups` with the same seed; beyond its size come the prompts of
    `normal_iid`.

    Raises:
        ValueError: see `groups`; or `count` is under 1.
    """
    if count < 1:
        raise ValueError(f"count={count}, but there must be at least 1 prompt; raise it")
    return groups(config, trusted=count, normal_iid=0, normal_shift=0, anomaly=0, seed=seed)[
        "trusted"
    ]


def gate_prompts(config: PronounDeparture, count: int, seed: int) -> dict[str, list[dict]]:
    """`count` records for each number that tells whether a model behaves as the task supposes.

    The number is the share of records in which the model's first choice among answers and wrong
    answers is an answer.

    Raises:
        ValueError: see `groups`.
    """
    hows = _choice("how", config.how, HOWS)
    drawn = groups(
        config,
        trusted=count,
        normal_iid=0,
        normal_shift=count,
        anomaly=count * len(hows),
        seed=seed,
    )
    return {
        "clean_trusted": drawn["trusted"],
        "clean_shifted": drawn["normal_shift"],
        **{
            f"anomaly_{how}": [record for record in drawn["anomaly"] if record["how"] == how]
            for how in hows
        },
    }


def _choice(field: str, value: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    if value != "all" and value not in allowed:
        raise ValueError(
            f"{field}={value!r} is none of {', '.join(allowed)}, all; choose one of them"
        )
    return allowed if value == "all" else (value,)


def _check_count(name: str, count: int, available: int) -> None:
    if not 0 <= count <= available:
        raise ValueError(
            f"{name}={count}, but there are 0 to {available} prompts to draw from; choose a number "
            "between"
        )


def _shuffled(items: Sequence[Any], seed: str) -> list[Any]:
    return random.Random(seed).sample(items, len(items))


def _in_turns(group: str, count: int, pools: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    """The first items of each pool with its name, `count` in all and each pool in its turn."""
    _check_count(group, count, len(pools) * min(map(len, pools.values())))
    return list(
        islice(
            ((name, item) for turn in zip(*pools.values()) for name, item in zip(pools, turn)),
            count,
        )
    )


def _normals() -> dict[tuple[str, str], list[dict]]:
    """The prompts of `circuits.tasks.pronoun` by the groups of their names and frames."""
    normals: dict[tuple[str, str], list[dict]] = {}
    for prompt in pronoun.all_prompts():
        normals.setdefault((prompt["names"], prompt["frames"]), []).append(prompt)
    return normals


def _normal(prompt: dict) -> dict:
    return _record(
        prompt["clean"], prompt["corrupt"], prompt["answers"][0].strip().lower(), label=0
    )


def _fillings(how: str, seed: str) -> list[tuple[Departure, str, tuple[str, ...]]]:
    """Every anomaly of one sort as template and people, shuffled, one of each template in turns
    while it has any.
    """
    by_template = [
        _shuffled(
            list(product([departure], _fill_slots(template), departure.people)),
            f"{seed} {template}",
        )
        for departure in DEPARTURES
        if departure.how == how
        for template in departure.templates
    ]
    turns = zip_longest(*_shuffled(by_template, seed))
    return [filling for turn in turns for filling in turn if filling is not None]


def _anomaly(departure: Departure, sentence: str, people: tuple[str, ...]) -> dict:
    answer, normal = _pronoun(departure, people), PRONOUNS[GENDER[people[0]]]
    clean = _sentence(departure, sentence, people)
    corrupt = _sentence(departure, sentence, tuple(OTHER[person] for person in people))
    return {
        **_record(clean, corrupt, answer, label=1),
        "kind": "agree" if answer == normal else "disagree",
        "normal_answers": [_cased(clean, normal)],
    }


def _fill_slots(template: str) -> list[str]:
    """The template once for each word that its slot, if any, can take."""
    for slot, words in pronoun.SLOTS.items():
        if f"{{{slot}}}" in template:
            return [template.replace(f"{{{slot}}}", word) for word in words]
    return [template]


def _pronoun(departure: Departure, people: tuple[str, ...]) -> str:
    return PRONOUNS[2] if departure.decides is None else PRONOUNS[GENDER[people[departure.decides]]]


def _sentence(departure: Departure, sentence: str, people: tuple[str, ...]) -> str:
    for place, person in zip(("{A}", "{B}"), people):
        sentence = sentence.replace(place, person)
    return sentence.replace("{P}", _pronoun(departure, people).capitalize())


def _record(clean: str, corrupt: str, answer: str, label: int) -> dict:
    return {
        "clean": clean,
        "corrupt": corrupt,
        "answers": [_cased(clean, answer)],
        "wrong_answers": [_cased(clean, other) for other in PRONOUNS if other != answer],
        "label": label,
    }


def _cased(clean: str, word: str) -> str:
    """The word as it goes on after the text: a capital letter after a full stop, none inside a
    sentence.
    """
    return f" {word.capitalize() if clean.endswith('.') else word}"
