"""Greater than: "The war lasted from the year 1732 to the year 17" -> a year after 32.

Hanna et al. 2023 (arXiv 2305.00586).  Answers are all later years, wrong answers that year and all
earlier ones; the corrupt prompt begins in the year 01, after which any year is right.  Two forms,
for what tokenizers make of a year:

    pairs      17 32: its last two digits are one token, and so is the answer
    digits     1 7 3 2: a token each; the first digit that may differ is scored: 4 to 9 are right,
               0 to 2 wrong, and 3 is neither, since what follows decides
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from circuits.tasks.task import Task, drawn
from circuits.tasks.words import Lexicon

NOUNS = (
    "war contract plan trip journey project conflict program battle campaign mission study peace "
    "dynasty strike search reign effort struggle trade"
).split()
YEARS = tuple(100 * century + year for century in range(11, 20) for year in range(2, 99))
FORMS = ("pairs", "digits")
NEEDED = 2  # years


@dataclass
class GreaterThan:
    """Prompts of years that come later."""

    name: str = "greater_than"
    # pairs or digits; null: what the model's tokenizer makes of years, pairs where it has none
    form: str | None = None
    # what lasts, of one token where any is; null: 20 of ours
    nouns: list[str] | None = None
    years: list[int] | None = None  # in which it begins; null: 1102 to 1998

    def fitted(self, tokenizer: Any) -> GreaterThan:
        """In the form that a tokenizer serves, with its years; ValueError where it serves none."""
        lexicon = Lexicon.of(self.name, tokenizer)
        nouns = [noun for noun in self.nouns or NOUNS if lexicon.is_one(f" {noun}", "The")]
        forms = FORMS if self.form is None else (self.form,)
        among = self.years or YEARS
        for form in forms:
            years = [year for year in among if _served(year, form, lexicon)]
            if len(years) >= NEEDED:
                return replace(self, form=form, nouns=nouns or self.nouns, years=years)
        wanted = {"pairs": "one token", "digits": "a token each"}
        told = " or ".join(wanted[form] for form in forms if form in wanted)
        raise ValueError(
            f"task=greater_than needs years whose last two digits are {told or 'tokens'}, but with "
            f"this model's tokenizer {len(years)} of {len(among)} are, and at least {NEEDED} are "
            "needed; use another model or task"
        )


def _served(year: int, form: str, lexicon: Lexicon) -> bool:
    """Whether a year and the corrupt one end in tokens of this form, and all answers are such."""
    size = {"pairs": 2, "digits": 1}.get(form, 0)
    century = str(year // 100)
    lead = lexicon.tokens(f"the year {century}")
    ends = []
    for text in (f"the year {year}", f"the year {century}01"):
        tokens = lexicon.tokens(text)
        count = 2 // size if size else 0
        if not count or tokens[:-count] != lead:
            return False
        ends.append(tokens[-count:])
    exact = all(
        [lexicon.tokenizer.decode([token]).strip() for token in tokens]
        == ([text[-2:]] if size == 2 else [*text[-2:]])
        for tokens, text in zip(ends, (str(year), f"{century}01"))
    )
    answers = [f"{n:02d}" for n in range(100)] if size == 2 else [str(n) for n in range(10)]
    return exact and all(_alone(answer, lexicon) for answer in answers)


def _alone(digits: str, lexicon: Lexicon) -> bool:
    """Whether digits are one token of their own."""
    token = lexicon.tokenizer.convert_tokens_to_ids(digits)
    return token is not None and token != lexicon.tokenizer.unk_token_id


def generate(config: GreaterThan, count: int, seed: int) -> list[dict]:
    """`count` different prompts with their counterfactuals.

    Raises:
        ValueError: another form, a year that has no earlier or no later one, or `count` outside
            what nouns and years give.
    """
    form = config.form or FORMS[0]
    if form not in FORMS:
        raise ValueError(f"form={form!r} is none of {', '.join(FORMS)}; choose one of them")
    lowest, highest = (2, 98) if form == "pairs" else (10, 89)
    given = config.years or YEARS
    years = [year for year in given if lowest <= year % 100 <= highest]
    if not years:
        raise ValueError(
            f"none of {len(given)} years ends in {lowest:02d} to {highest}, as form={form} needs; "
            "give others in task.years"
        )
    nouns = config.nouns or NOUNS

    def draw(generator: random.Random) -> dict:
        year, noun = generator.choice(years), generator.choice(nouns)
        right, wrong = _answers(year % 100, form)
        texts = [
            f"The {noun} lasted from the year {begin} to the year {year // 100}"
            for begin in (year, f"{year // 100}01")
        ]
        clean, corrupt = texts
        return {"clean": clean, "corrupt": corrupt, "answers": right, "wrong_answers": wrong}

    about = f"{len(nouns)} nouns and {len(years)} years"
    return drawn("greater_than", count, seed, draw, about)


def _answers(year: int, form: str) -> tuple[list[str], list[str]]:
    """What may follow a century, and what may not."""
    if form == "pairs":
        return (
            [f"{later:02d}" for later in range(year + 1, 100)],
            [f"{earlier:02d}" for earlier in range(year + 1)],
        )
    digit = year // 10
    return [str(n) for n in range(digit + 1, 10)], [str(n) for n in range(digit)]


TASK = Task("greater_than", GreaterThan, generate)
