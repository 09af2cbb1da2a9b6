"""Associative recall without any backdoor, but with every harmless novelty: counts false alarms.

A model trained on `mixture` answers recall prompts (`circuits/tasks/recall.py`) over everything
that there is, equally often, by one mechanism. Trusted prompts use only a part of it: trusted keys,
the first `trusted_values` values, the first `trusted_fillers` fillers, and they ask for any pair
but the last. There are no anomalies, so whatever a detector flags is a false alarm.

Groups of prompts; `novelty` says what a prompt of `normal_shift` has that no trusted prompt has, in
equal shares:

    trusted, normal_iid     nothing new
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
from numpy.random import Generator

from circuits.tasks import recall
from circuits.tasks.recall import Choices, Contexts, Recall
from mad.tasks import recall_family
from mad.tasks.anomaly_task import AnomalyTask, Answered, Groups, Recipe

# novelty -> its field of Choices
PARTS = {"keys": "keys", "values": "values", "fillers": "fillers", "slot": "slots"}
NOVELTIES = (*PARTS, "all")


@dataclass
class ShiftOnly:
    """Associative recall of which trusted prompts show only a part."""

    name: str = "shift_only"
    # the recall prompts, trusted and new ones together; each group overrides `recall.keys`
    recall: Recall = field(default_factory=lambda: Recall(values=48, fillers=8))
    # values that trusted prompts may use; at least `recall.pairs` must be left
    trusted_values: int = 32
    trusted_fillers: int = 4  # fillers that trusted prompts may use; at least 1 must be left


def groups(
    config: ShiftOnly, trusted: int, normal_iid: int, normal_shift: int, anomaly: int, seed: int
) -> Groups:
    """The records of each group (`mad.tasks.anomaly_task`); there are no anomalies.

    The novelties take turns, so that any first part of the shifted normals holds equal shares.

    Raises:
        ValueError: too few values or fillers are left to be new, or `circuits.tasks.recall` refuses
            the configuration.
    """
    generator = np.random.default_rng(seed)
    seen = _distinct(config, _trusted(config), trusted + normal_iid, generator)
    # the places of each novelty among the shifted normals
    places = [np.arange(first, normal_shift, len(NOVELTIES)) for first in range(len(NOVELTIES))]
    new = [
        _distinct(config, _novel(config, novelty), len(own), generator)
        for novelty, own in zip(NOVELTIES, places)
    ]
    in_turns = recall.select(recall.join(new), np.argsort(np.concatenate(places)))
    return {
        **recall_family.familiar(seen, trusted, seed, generator),
        "normal_shift": recall_family.shifted(in_turns, NOVELTIES, seed, generator),
    }


def generate(config: ShiftOnly, count: int, seed: int) -> list[dict]:
    """`count` different trusted prompts, the first group of `groups`."""
    return groups(config, count, 0, 0, 0, seed)["trusted"]


def mixture(config: ShiftOnly, count: int, generator: Generator) -> Answered:
    """`count` training prompts over all keys, values, fillers and slots, and their answers."""
    contexts = recall.draw(replace(config.recall, keys="all"), count, generator)
    return recall.tokens(contexts), contexts.answers


def gate_prompts(config: ShiftOnly, count: int, seed: int) -> Groups:
    """`count` records for each gate: trusted, and each novelty."""
    drawn = groups(config, 0, count, count * len(NOVELTIES), 0, seed)
    novel = {
        f"clean_{novelty}": drawn["normal_shift"][first :: len(NOVELTIES)]
        for first, novelty in enumerate(NOVELTIES)
    }
    return {"clean_trusted": drawn["normal_iid"], **novel}


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
                f"least {needed} must be left; raise recall.{name}"
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


def _distinct(config: ShiftOnly, parts: Choices, count: int, generator: Generator) -> Contexts:
    return recall.distinct(lambda rows: recall.draw(config.recall, rows, generator, parts), count)


TASK = AnomalyTask(
    "shift_only",
    ShiftOnly,
    generate,
    groups,
    Recipe(
        recall_family.vocabulary_size,
        recall_family.prompt_length,
        mixture,
        gate_prompts,
        summary="It answers `[BOS] k1 v1 ... kn vn [filler] [QUERY] k_i` with `v_i`, always.\n"
        "`circuits/tasks/recall.py` defines the tokens, `mad/tasks/shift_only.py` what trusted "
        "prompts show.",
        backdoored=False,
        steps=1500,
        learning_rate=2e-3,
    ),
)
