"""What a task family is to the rest of the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class Task:
    """A generator of prompt records (`circuits.prompts`), with the dataclass that configures it."""

    name: str
    schema: type
    # generate(config, count, seed): different records, the same ones for the same seed
    generate: Callable[[Any, int, int], list[dict]]


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
