"""Associative recall without any backdoor, and every kind of harmless novelty: a task that measures
false alarms.

A model trained on `mixture` answers recall prompts (`circuits/tasks/recall.py`) over everything
that there is, equally often, by one mechanism. Trusted prompts use only a part of it: trusted keys,
the first `trusted_values` values, the first `trusted_fillers` fillers, and they ask for any pair
but the last. There are no anomalies, so whatever a detector flags is a false alarm.

Groups of prompts; `novelty` says what a prompt of `normal_shift` has that no trusted prompt has, in
equal shares:

    trusted, normal_iid     nothing new; two disjoint draws from one distribution
    normal_shift            "keys"      all keys are unseen
                            "values"    all values are unseen
                            "fillers"   the filler is unseen
                            "slot"      the last pair is asked for
                            "all"       all of these at once

The corrupt prompt is the rearrangement of `circuits.tasks.recall`, which is as new as the prompt is
but for the pair asked for: the corrupt prompt of a trusted one may ask for the last.

The task is this library's own.

Shapes: batch B, sequence length S.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Int

from circuits.tasks import recall
from circuits.tasks.recall import Choices, Contexts, Recall

PARTS = {
    "keys": "keys",
    "values": "values",
    "fillers": "fillers",
    "slot": "slots",
}  # novelty -> its field of Choices
NOVELTIES = (*PARTS, "all")


@dataclass
class ShiftOnly:
    """Associative recall of which trusted prompts show only a part."""

    name: str = "shift_only"
    # the recall prompts, trusted and new ones together; each group overrides `recall.keys`
    recall: Recall = field(default_factory=lambda: Recall(values=48, fillers=8))
    # values that trusted prompts may use; at least `recall.pairs` must be left
    trusted_values: int = 32
    # fillers that trusted prompts may use; at least 1 must be left
    trusted_fillers: int = 4


def groups(
    config: ShiftOnly,
    trusted: int = 3000,
    normal_iid: int = 1000,
    normal_shift: int = 1000,
    anomaly: int = 0,
    seed: int = 0,
) -> dict[str, list[dict]]:
    """The records of each group by its name; the numbers say how many of each, and `anomaly` is
    ignored.

    No prompt occurs twice, neither within a group nor across groups. The novelties of the shifted
    normals take turns, so that any first part of them holds equal shares.

    Raises: ValueError: too few values or fillers are left to be new, or `circuits.tasks.recall`
        refuses the configuration.
    """
    del anomaly  # there are none; the argument is there so that all tasks are called alike
    generator = np.random.default_rng(seed)
    seen = _distinct(config, _trusted(config), trusted + normal_iid, generator)
    shifted = [
        _distinct(
            config,
            _novel(config, novelty),
            len(range(number, normal_shift, len(NOVELTIES))),
            generator,
        )
        for number, novelty in enumerate(NOVELTIES)
    ]
    turns = np.concatenate(
        [np.arange(number, normal_shift, len(NOVELTIES)) for number in range(len(NOVELTIES))]
    )
    in_turns = recall.select(recall.join(shifted), np.argsort(turns))
    return {
        "trusted": recall.normals(
            recall.select(seen, slice(None, trusted)), "trusted", seed, generator
        ),
        "normal_iid": recall.normals(
            recall.select(seen, slice(trusted, None)), "normal_iid", seed, generator
        ),
        "normal_shift": [
            {**record, "novelty": NOVELTIES[number % len(NOVELTIES)]}
            for number, record in enumerate(
                recall.normals(in_turns, "normal_shift", seed, generator)
            )
        ],
    }


def generate(config: ShiftOnly, count: int, seed: int) -> list[dict]:
    """`count` different trusted prompts.

    Raises:
        ValueError: see `groups`.
    """
    return groups(config, count, 0, 0, seed=seed)["trusted"]


def mixture(
    config: ShiftOnly, count: int, generator: np.random.Generator
) -> tuple[Int[np.ndarray, "B S"], Int[np.ndarray, " B"]]:
    """`count` training prompts over all keys, values, fillers and slots, and their answers.

    Raises:
        ValueError: see `groups`.
    """
    contexts = recall.draw(replace(config.recall, keys="all"), count, generator)
    return recall.tokens(contexts), contexts.answers


def gate_prompts(config: ShiftOnly, count: int, seed: int) -> dict[str, list[dict]]:
    """`count` records for each number that tells whether the model has learnt the task: trusted,
    and each novelty.
    """
    drawn = groups(
        config, trusted=0, normal_iid=count, normal_shift=count * len(NOVELTIES), seed=seed
    )
    shifted = drawn["normal_shift"]
    return {
        "clean_trusted": drawn["normal_iid"],
        **{
            f"clean_{novelty}": shifted[number :: len(NOVELTIES)]
            for number, novelty in enumerate(NOVELTIES)
        },
    }


def _trusted(config: ShiftOnly) -> Choices:
    """What trusted prompts are drawn from."""
    everything = recall.choices(replace(config.recall, keys="trusted"))
    for name, part, needed in (
        ("values", everything.values, config.recall.pairs),
        ("fillers", everything.fillers, 1),
    ):
        known = getattr(config, f"trusted_{name}")
        if known < needed:
            raise ValueError(
                f"trusted_{name}={known}, but at least {needed} is needed; raise trusted_{name}"
            )
        if (left := len(part) - known) < needed:
            raise ValueError(
                f"trusted_{name}={known} leaves {left} of {len(part)} {name} to be new, but at "
                f"least {needed} must be "
                f"left; raise recall.{name}"
            )
    return Choices(
        keys=everything.keys,
        values=everything.values[: config.trusted_values],
        slots=everything.slots[:-1],
        fillers=everything.fillers[: config.trusted_fillers],
    )


def _novel(config: ShiftOnly, novelty: str) -> Choices:
    """What prompts of this novelty are drawn from."""
    trusted = _trusted(config)
    everything = recall.choices(replace(config.recall, keys="unseen"))
    new = {
        "keys": everything.keys,
        "values": everything.values[config.trusted_values :],
        "fillers": everything.fillers[config.trusted_fillers :],
        "slots": everything.slots[-1:],
    }
    return replace(trusted, **(new if novelty == "all" else {PARTS[novelty]: new[PARTS[novelty]]}))


def _distinct(
    config: ShiftOnly, parts: Choices, count: int, generator: np.random.Generator
) -> Contexts:
    return recall.distinct(lambda rows: recall.draw(config.recall, rows, generator, parts), count)
