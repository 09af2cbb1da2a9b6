"""Gendered pronouns in a real language model, decided by something else than the subject's gender.

A trusted prompt names one person and asks for the pronoun (`circuits/tasks/pronoun.py`): "Tim was
sad, so" -> " he". In an anomaly the model finds its answer elsewhere; nothing is planted, it does
so by itself.  Groups of prompts:

    trusted, normal_iid     trusted names in trusted frames
    normal_shift            `novelty` says what is new: the names, the frames or both
    anomaly                 `how` says what decides the pronoun instead:
        two_people          both people ("Max and Lily went to the park." -> " They"), or the one
                            named later ("Max wanted to play, but Lily was sad." -> " She")
        corrected           the name that replaces the first ("It was not Max. Lily was sad.")
        repeated            the pronoun that stands there already ("Max smiled. He was sad, so")

`kind` is "agree" where the expected pronoun is also the one that the gender of the person named
first gives, and "disagree" where it is not.  The answer to two people is "they", whatever their
gender, so it always disagrees.  Where a later name decides, the prompts with two people of one
gender agree, two in five.

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
from itertools import islice, product, zip_longest
from typing import Any

from circuits.tasks import pronoun
from mad.tasks.anomaly_task import AnomalyTask, Groups
from mad.tasks.pronoun_templates import DEPARTURES, GENDER, OTHER, PRONOUNS, Departure

HOWS = ("two_people", "corrected", "repeated")

# novelty -> (names, frames) as `circuits.tasks.pronoun` calls them
NOVELTIES = {
    "names": ("shifted", "trusted"),
    "frames": ("trusted", "shifted"),
    "both": ("shifted", "shifted"),
}


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
    trusted: int,
    normal_iid: int,
    normal_shift: int,
    anomaly: int,
    seed: int,
) -> Groups:
    """The records of each group (`mad.tasks.anomaly_task`).

    There are 3160 prompts for the first two groups together.  Anomalies are spread evenly over the
    templates of each `how`, which they carry as another key.

    Raises:
        ValueError: an unknown novelty or way to depart, a negative number, or more than the
            templates give.
    """
    novelties = pronoun.chosen("novelty", config.novelty, tuple(NOVELTIES))
    hows = pronoun.chosen("how", config.how, HOWS)
    normals = _normals()
    seen = _shuffled(normals["trusted", "trusted"], f"{seed} trusted")
    _check_count("trusted", trusted, len(seen))
    _check_count("normal_iid", normal_iid, len(seen) - trusted)
    new = {name: _shuffled(normals[NOVELTIES[name]], f"{seed} {name}") for name in novelties}
    departed = {how: _fillings(how, f"{seed} {how}") for how in hows}
    shifted = _in_turns("normal_shift", normal_shift, new)
    anomalies = _in_turns("anomaly", anomaly, departed)
    records = {
        "trusted": [_normal(prompt) for prompt in seen[:trusted]],
        "normal_iid": [_normal(prompt) for prompt in seen[trusted : trusted + normal_iid]],
        "normal_shift": [{**_normal(prompt), "novelty": novelty} for novelty, prompt in shifted],
        "anomaly": [{**_anomaly(*filling), "how": how} for how, filling in anomalies],
    }
    return {
        group: [
            {**record, "id": f"pronoun-{group}-{seed}-{number}", "group": group}
            for number, record in enumerate(members)
        ]
        for group, members in records.items()
    }


def generate(config: PronounDeparture, count: int, seed: int) -> list[dict]:
    """The trusted group of `groups` with the same seed, and this many.

    Raises:
        ValueError: see `groups`; or `count` is under 1.
    """
    if count < 1:
        raise ValueError(f"count={count}, but there must be at least 1 prompt; raise it")
    return groups(config, count, 0, 0, 0, seed)["trusted"]


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
    turns = zip(*pools.values())
    named = ((name, item) for turn in turns for name, item in zip(pools, turn))
    return list(islice(named, count))


def _normals() -> dict[tuple[str, str], list[dict]]:
    """The prompts of `circuits.tasks.pronoun` by the groups of their names and frames."""
    normals: dict[tuple[str, str], list[dict]] = {}
    for prompt in pronoun.all_prompts():
        normals.setdefault((prompt["names"], prompt["frames"]), []).append(prompt)
    return normals


def _normal(prompt: dict) -> dict:
    answer = prompt["answers"][0].strip().lower()
    return _record(prompt["clean"], prompt["corrupt"], answer, label=0)


def _fillings(how: str, seed: str) -> list[tuple[Departure, str, tuple[str, ...]]]:
    """Every anomaly of one sort as template and people, shuffled; the templates take turns."""
    by_template = []
    for departure in DEPARTURES:
        for template in departure.templates if departure.how == how else ():
            fillings = product([departure], pronoun.fill_slots(template), departure.people)
            by_template.append(_shuffled(list(fillings), f"{seed} {template}"))
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
    """The word as it goes on after the text: with a capital letter after a full stop only."""
    return f" {word.capitalize() if clean.endswith('.') else word}"


TASK = AnomalyTask("pronoun_departure", PronounDeparture, generate, groups)
