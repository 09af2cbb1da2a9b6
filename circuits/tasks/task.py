"""What a task family is to the rest of the library."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

MOST_DRAWS = 50  # draws for each prompt that is wanted


@dataclass(frozen=True)
class Task:
    """A generator of prompt records (`circuits.prompts`), with the dataclass that configures it."""

    name: str
    schema: type
    # generate(config, count, seed): different records, the same ones for the same seed
    generate: Callable[[Any, int, int], list[dict]]

    def records(self, config: Any, count: int, seed: int, tokenizer: Any = None) -> list[dict]:
        """Records that a model with this tokenizer can read.

        Raises:
            ValueError: the tokenizer cannot serve the task, or what `generate` refuses.
        """
        fit = getattr(config, "fitted", None)
        return self.generate(config if fit is None else fit(tokenizer), count, seed)


def drawn(
    family: str, count: int, seed: int, draw: Callable[[random.Random], dict], about: str
) -> list[dict]:
    """Returns so many records, no two with the same clean prompt.

    Args:
        draw: makes one record, without an id, of a generator of random numbers.
        about: which settings decide how many there are.

    Raises:
        ValueError: there are not so many.
    """
    generator, records = random.Random(seed), {}
    for _ in range(MOST_DRAWS * max(count, 0)):
        record = draw(generator)
        records.setdefault(str(record["clean"]), record)
        if len(records) == count:
            break
    if count < 1 or len(records) < count:
        raise ValueError(
            f"count={count}, but with {about} only {len(records)} different prompts were found; "
            "change count or add words"
        )
    return [
        {**record, "label": 0, "id": f"{family}-{seed}-{number}"}
        for number, record in enumerate(records.values())
    ]


def token_records(
    family: str,
    clean: Int[np.ndarray, "B S"],
    corrupt: Int[np.ndarray, "B S"],
    answers: Int[np.ndarray, " B"],
    choices: Int[np.ndarray, "B C"],
    group: str,
    seed: int,
) -> list[dict]:
    """Records of token ids; the choices other than the answer are wrong answers."""
    columns = zip(*(column.tolist() for column in (clean, corrupt, answers, choices)))
    return [
        {
            "clean": clean_tokens,
            "corrupt": corrupt_tokens,
            "answers": [answer],
            "wrong_answers": [choice for choice in among if choice != answer],
            "label": 0,
            "id": f"{family}-{group}-{seed}-{number}",
            "group": group,
        }
        for number, (clean_tokens, corrupt_tokens, answer, among) in enumerate(columns)
    ]
