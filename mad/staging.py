"""A folder that is written beside its place and takes it as a whole, once it is complete.

    with staged(OUT, ours=RUN_FILES, keep="circuit.json") as place:
        ... write into place.folder, which is OUT.partial ...
        place.publish()

What was at OUT stays there until `publish`.  If the work fails, OUT.partial is removed, unless the
file that is worth most (`keep`) is in it: then it stays, and the next run refuses to write over it.
The folder is locked while it is written, and is made before the work, so that a place that cannot
be written to is told at once.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from circuits.files import is_at

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Staged:
    """A folder on its way to its place."""

    folder: Path  # where to write
    target: Path  # where it goes
    ours: Collection[str]  # what a folder of this kind holds; all else there stays there

    @property
    def replaces(self) -> bool:
        """Whether there is something at its place."""
        return self.target.is_dir() and any(self.target.iterdir())

    def publish(self) -> Path:
        """Moves the folder to its place; an earlier one makes room, but for what is not ours."""
        before = _replaced(self.target)
        if self.replaces:
            self.target.rename(before)
        try:
            self.folder.rename(self.target)
        except OSError:
            if before.exists():
                before.rename(self.target)
            raise
        if before.exists():
            for path in [path for path in before.iterdir() if path.name not in self.ours]:
                path.rename(self.target / path.name)
            shutil.rmtree(before)
        return self.target


@contextmanager
def staged(
    target: Path, *, ours: Collection[str], keep: str, overwrite: bool = False
) -> Iterator[Staged]:
    """A new folder beside `target`, which takes its place when it is published.

    Args:
        target: its place; whether that may be replaced is the caller's question.
        ours: what a folder of this kind holds.
        keep: the file with which an unfinished folder is worth keeping.
        overwrite: an unfinished folder of an earlier run may be dropped.

    Raises:
        FileExistsError: another run writes there, or left something there.
        OSError: it cannot be written.
    """
    target = target.resolve()
    if target.is_mount():
        raise FileExistsError(f"{target} is where a disk is mounted; name a folder in it")
    if _replaced(target).exists():
        raise FileExistsError(
            f"{_replaced(target)} is a run that was being replaced when that was interrupted; move "
            "it away"
        )
    folder = target.with_name(f"{target.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        _claim(lock, folder, ours, keep, overwrite)
        try:
            yield Staged(folder, target, ours)
        except BaseException:
            if (folder / keep).exists():
                log.warning("what was found is in %s, until overwrite=true", folder)
            raise
        finally:
            if is_at(folder, lock) and not (folder / keep).exists():
                shutil.rmtree(folder)
    finally:
        os.close(lock)


def _claim(lock: int, folder: Path, ours: Collection[str], keep: str, overwrite: bool) -> None:
    """Takes an unfinished folder, and empties it; FileExistsError where it is not to be had."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not is_at(folder, lock):
            raise BlockingIOError  # it was published in between, and another one made
    except BlockingIOError:
        raise FileExistsError(f"another run is writing {folder}; choose another out=") from None
    problem = _problem(folder, ours, None if overwrite else keep)
    if problem is not None:
        raise FileExistsError(problem)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _problem(folder: Path, ours: Collection[str], keep: str | None) -> str | None:
    """Why an unfinished folder may not be emptied; None: it may."""
    if others := [path.name for path in folder.iterdir() if not _is_ours(path.name, ours)]:
        return f"{folder} is needed for writing, but holds {min(others)}; choose another out="
    if keep is not None and (folder / keep).exists():
        return f"{folder} holds what an interrupted run had found; move it away, or overwrite=true"
    return None


def _is_ours(name: str, ours: Collection[str]) -> bool:
    """Whether it is one of ours, or what became of one that was being written."""
    return name in ours or any(name.startswith(f".{own}.") for own in ours)


def _replaced(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")
