"""The trusted prompts that a run's circuit was found and measured on, made again.

A run folder holds hashes of its prompts, not the prompts.  They come from the task that the circuit
names, drawn as they were then, or from a file that the user names, and are known by their hashes.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuits.files import restored
from circuits.prompts import Prompts, read_records
from mad.calibration import sequence_hash
from mad.folder import Opened
from mad.known_models import is_known
from mad.tasks import TASKS
from mad.trusted import load_trusted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunPrompts:
    """Prompts to measure a circuit on, and those that it was found on, where they can be had."""

    evaluation: Prompts
    discovery: Prompts | None


def run_prompts(opened: Opened, file: str | None = None) -> RunPrompts:
    """Returns the prompts that a run was measured on, or all of a file that did not find it.

    Args:
        opened: the run.
        file: other trusted prompts to measure it on.

    Raises:
        FileNotFoundError: the run does not say which prompts it used, or a file is gone.
        ValueError: the prompts cannot be made again, or the file has none but those that the
            circuit was found on.
    """
    if file is None:
        made = _made_again(opened)
        used = opened.used()
        parts = {name: _known(made, used[name]) for name in used}
        for name, part in parts.items():
            if len(part) < len(used[name]):
                raise ValueError(
                    f"of the {len(used[name])} {name} prompts of {opened.folder} only {len(part)} "
                    "can be made again from its task; give trusted=FILE to measure on others"
                )
        _warn_of_others(opened, parts["evaluation"])
        return RunPrompts(parts["evaluation"], parts["discovery"])
    found_on = _hashes(opened)
    prompts = load_trusted(read_records(Path(file)), opened.model)
    unseen = _known(prompts, found_on, known=False)
    if not len(unseen):
        raise ValueError(
            f"the circuit was found on all {len(prompts)} prompts of {file}; give others to "
            "measure it on"
        )
    if len(unseen) < len(prompts):
        out = len(prompts) - len(unseen)
        log.warning("%d prompts of %s are left out: the circuit was found on them", out, file)
    return RunPrompts(unseen, _discovery(opened, prompts, found_on))


def _made_again(opened: Opened) -> Prompts:
    """All trusted prompts of the run, and others."""
    source, about = opened.folder / "circuit.json", opened.circuit.about
    name = opened.circuit.says("task")
    if name not in TASKS:
        raise ValueError(
            f"{source} names no task that its prompts could be made again from (task={name!r}); "
            "give trusted=FILE"
        )
    config: Any = restored(TASKS[name].schema, about["task"], f"{source}: task")
    if (path := getattr(config, "path", None)) is not None and not is_known(path):
        raise ValueError(
            f"{source} names the prompt file {path!r}, which has not been given to madcap on this "
            "machine, so that it is not read; if you trust it, give trusted=FILE"
        )
    total = sum(len(hashes) for hashes in opened.splits().values())
    seed = about.get("seed", 0)
    if not isinstance(seed, int):
        raise ValueError(f"{source}: seed is {seed!r}, but it must be a whole number")
    records = TASKS[name].records(config, total, seed, opened.model.tokenizer)
    return load_trusted(records, opened.model)


def _known(prompts: Prompts, hashes: Collection[str], *, known: bool = True) -> Prompts:
    """The prompts with these hashes, or those without."""
    wanted = set(hashes)
    found = [sequence_hash(sequence) in wanted for sequence in prompts.sequences()]
    return prompts.select([row for row, is_there in enumerate(found) if is_there is known])


def _hashes(opened: Opened) -> list[str]:
    """Hashes of the prompts that the circuit was found on; none where the run does not say."""
    try:
        return opened.used()["discovery"]
    except FileNotFoundError as error:
        log.warning("%s; some of these prompts may be ones that it was found on", error)
        return []


def _discovery(opened: Opened, prompts: Prompts, found_on: Collection[str]) -> Prompts | None:
    """The prompts that the circuit was found on: in the same file, or made again."""
    own = _known(prompts, found_on)
    if not found_on or len(own) == len(set(found_on)):
        return own if len(own) else None
    try:
        own = _known(_made_again(opened), found_on)
    except (ValueError, OSError) as error:
        log.warning("the prompts that the circuit was found on cannot be had: %s", error)
        return None
    return own if len(own) == len(set(found_on)) else None


def _warn_of_others(opened: Opened, prompts: Prompts) -> None:
    """Warns where the prompts have other corrupt twins or answers than when they were measured."""
    told = opened.circuit.about.get("splits")
    told = told.get("evaluation") if isinstance(told, dict) else None
    if not isinstance(told, dict) or told.get("prompts") != len(prompts):
        return
    if told.get("hash") != prompts.hash():
        log.warning(
            "the prompts have other corrupt twins, answers or labels than when the circuit of %s "
            "was measured; figures may differ from its metrics.json",
            opened.folder,
        )
