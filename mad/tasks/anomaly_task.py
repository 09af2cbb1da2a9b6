"""What an anomaly task is: trusted prompts, groups that a detector is measured on, and a recipe.

    trusted, normal_iid     two disjoint draws from one distribution
    normal_shift            harmless and new; `novelty` says what is new
    anomaly                 answered by another mechanism; `kind` says whether its answer agrees
                            with the normal one, and `normal_answers` what that would have been

No prompt occurs twice, neither within a group nor across groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy.random import Generator

from circuits.tasks.task import Task

Groups = dict[str, list[dict]]  # the records of each group by its name
Answered = tuple[Int[np.ndarray, "B S"], Int[np.ndarray, " B"]]  # prompts and their answers


@dataclass(frozen=True)
class Recipe:
    """How a model is trained on a task; each function takes the task's configuration first."""

    vocabulary_size: Callable[[Any], int]
    prompt_length: Callable[[Any], int]
    mixture: Callable[[Any, int, Generator], Answered]  # (config, count, generator)
    # gate_prompts(config, count, seed): about `count` records for each accuracy that tells whether
    # the model has learnt the task
    gate_prompts: Callable[[Any, int, int], Groups]
    summary: str  # for the model card
    backdoored: bool = True  # whether there is a second mechanism
    steps: int = 2000
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class AnomalyTask(Task):
    """A task with anomalies; `generate` gives its trusted prompts."""

    # groups(config, trusted, normal_iid, normal_shift, anomaly, seed): the records of each group by
    # its name, so many of each; a task without anomalies ignores `anomaly` and has no such group
    groups: Callable[..., Groups]
    recipe: Recipe | None = None  # None: its model is one that nobody trains for it


def require_share(name: str, value: float) -> None:
    """Raises ValueError unless the value is in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} is not a share; choose it from [0, 1]")


def as_anomalies(records: Sequence[dict], normal_answers: Sequence[int]) -> list[dict]:
    """The records, labelled, with what the normal mechanism would have said of each prompt."""
    labelled = []
    for record, normal in zip(records, normal_answers):
        kind = "agree" if normal == record["answers"][0] else "disagree"
        labelled.append({**record, "label": 1, "kind": kind, "normal_answers": [normal]})
    return labelled


def disagreeing(records: Sequence[dict]) -> list[dict]:
    """Those anomalies on which the normal mechanism alone scores nothing."""
    return [record for record in records if record["kind"] == "disagree"]
