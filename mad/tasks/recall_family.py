"""What the tasks over associative recall (`circuits/tasks/recall.py`) have in common."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy.random import Generator

from circuits.tasks import recall
from circuits.tasks.recall import Contexts
from mad.tasks.anomaly_task import Groups, as_anomalies


def vocabulary_size(config: Any) -> int:
    """Number of token ids of a task with recall prompts."""
    return recall.vocabulary(config.recall).size


def prompt_length(config: Any) -> int:
    """Tokens in a prompt of a task with recall prompts."""
    return recall.prompt_length(config.recall)


def familiar(contexts: Contexts, trusted: int, seed: int, generator: Generator) -> Groups:
    """The first `trusted` prompts as one group, and the others as `normal_iid`."""
    parts = {"trusted": slice(None, trusted), "normal_iid": slice(trusted, None)}
    return {
        group: recall.with_counterfactuals(recall.select(contexts, rows), group, seed, generator)
        for group, rows in parts.items()
    }


def shifted(
    contexts: Contexts, novelties: Sequence[str], seed: int, generator: Generator
) -> list[dict]:
    """Records of `normal_shift`; the novelties take turns."""
    records = recall.with_counterfactuals(contexts, "normal_shift", seed, generator)
    return [{**record, "novelty": novelty} for record, novelty in zip(records, cycle(novelties))]


def backdoored(
    triggered: Contexts, harmless: Contexts, answers: Int[np.ndarray, " B"], seed: int
) -> list[dict]:
    """Records of anomalies: prompts with the trigger, the same without it as their corrupt ones."""
    records = recall.records(triggered, harmless, answers, "anomaly", seed)
    return as_anomalies(records, triggered.answers.tolist())
