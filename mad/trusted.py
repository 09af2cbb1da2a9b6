"""Trusted prompts, and the four disjoint parts that they are split into.

discovery     finds the circuit
evaluation    measures it
fit           what a detector is fitted on
calibration   bounds false alarms
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from circuits.model.load import LoadedModel
from circuits.prompts import Prompts
from mad.tasks import TASKS

log = logging.getLogger(__name__)


@dataclass
class Splits:
    """How many trusted prompts each part gets; scaled down together when there are fewer."""

    discovery: int = 200  # finds the circuit
    evaluation: int = 200  # measures it
    fit: int = 300  # gives the means that it is scored under
    calibration: int = 300  # bounds false alarms; alpha needs at least 1/alpha - 1


def load_trusted(records: Sequence[Mapping], model: LoadedModel) -> Prompts:
    """Different trusted records as the model's prompts.

    Raises:
        ValueError: some are labelled anomalous, or what the records do wrong.
    """
    prompts = model.prompts(records)
    if prompts.labels is not None and bool(prompts.labels.any()):
        raise ValueError(
            f"{int(prompts.labels.sum())} of {len(prompts)} trusted prompts are labelled anomalous "
            "(label=1); trusted prompts must be normal"
        )
    return prompts.deduplicated()


def trusted_splits(task: Any, model: LoadedModel, splits: Splits, seed: int) -> dict[str, Prompts]:
    """The four disjoint parts of a task's trusted prompts.

    Raises:
        ValueError: fewer than four different prompts, or what the task's records do wrong.
    """
    sizes = asdict(splits)
    total = sum(sizes.values())
    prompts = load_trusted(TASKS[task.name].records(task, total, seed, model.tokenizer), model)
    if len(prompts) < len(sizes):
        raise ValueError(
            f"{len(prompts)} different trusted prompts, but at least {len(sizes)} are needed"
        )
    if len(prompts) < total:
        spare = len(prompts) - len(sizes)  # each part gets one prompt, and its share of the rest
        sizes = {
            name: 1 + (size - 1) * spare // (total - len(sizes)) for name, size in sizes.items()
        }
        log.warning("only %d different trusted prompts; split into %s", len(prompts), sizes)
    return prompts.split(sizes, seed)


def one_length(splits: Mapping[str, Prompts]) -> int:
    """The length of all prompts.

    Raises:
        ValueError: they differ.
    """
    lengths = sorted({int(length) for prompts in splits.values() for length in prompts.lengths})
    if len(lengths) > 1:
        raise ValueError(
            f"positions=true, but the prompts have {lengths[0]} to {lengths[-1]} tokens: edges per "
            "position need templated prompts of one length; leave out positions, or the prompts of "
            "other lengths"
        )
    return lengths[0]
