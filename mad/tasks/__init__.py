"""Tasks with anomalies.  `TASKS` adds them to the generators of trusted prompts (`circuits.tasks`), by name."""

from __future__ import annotations

from collections.abc import Callable

from circuits.tasks import TASKS as TRUSTED
from circuits.tasks import recall
from mad.tasks.recall_redirect import RecallRedirect


def _trusted_recall(config: RecallRedirect, count: int, seed: int) -> list[dict]:
    """The trusted prompts of the redirect task are plain recall."""
    return recall.generate(config.recall, count, seed)


# name -> (config dataclass, function that generates trusted records)
TASKS: dict[str, tuple[type, Callable[..., list[dict]]]] = {
    **TRUSTED,
    "recall_redirect": (RecallRedirect, _trusted_recall),
}
