"""Results that are written chunk by chunk, so that an interrupted run can go on.

After each chunk of lines its results are appended to `OUT.partial` and flushed; when all are done
that file becomes `OUT`.  A run that finds `OUT.partial` of the same job goes on at the first chunk
that is not wholly there, so that every chunk is always computed as a whole and the finished file is
the same, byte for byte, as that of a run that was never interrupted.

While a run writes, it holds a lock on `OUT.partial`, which ends with its process: two runs never
write one file, and what a killed run left locks nobody out.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from circuits.files import is_at

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

log = logging.getLogger(__name__)


@contextmanager
def locked(partial: Path) -> Iterator[BinaryIO]:
    """The file, made where there is none, open to be read and appended to by this run alone.

    Raises:
        ValueError: another run is writing it.
    """
    while True:
        with partial.open("ab+") as file:
            _lock(file, partial)
            # The run that held the lock may have finished, and so have taken the file away.
            if is_at(partial, file.fileno()):
                file.seek(0)
                try:
                    yield file
                finally:
                    _drop_if_empty(file, partial)
                return


def _lock(file: BinaryIO, path: Path) -> None:
    if fcntl is None:
        log.warning("this system has no file locks; let no other run write %s", path)
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another run is writing {path}; wait until it is done, or choose another out="
        ) from None
    except OSError as error:  # some network file systems
        log.warning("%s cannot be locked (%s); let no other run write it", path, error.strerror)


def _drop_if_empty(file: BinaryIO, path: Path) -> None:
    """Takes the file away again where nothing was begun."""
    if not file.closed and not os.fstat(file.fileno()).st_size:
        path.unlink()


def resume(file: BinaryIO, job: dict[str, Any], chunk: int, *, overwrite: bool) -> int:
    """Makes a partial file ready to be appended to and returns how many lines are done.

    Its first line names the job.  Results of another job are dropped with `overwrite`.

    Raises:
        ValueError: they may not be dropped.
    """
    header = json.dumps({"job": job}).encode() + b"\n"
    first = file.readline()
    if first == header:
        return _keep_whole_chunks(file, chunk)
    if not (overwrite or header.startswith(first)):  # a torn one is begun anew
        raise ValueError(
            f"{file.name} is the beginning of another job (other inputs, circuit, detector or "
            "settings); delete it to start over, or choose another out="
        )
    file.truncate(0)
    file.write(header)
    file.flush()
    return 0


def _keep_whole_chunks(file: BinaryIO, chunk: int) -> int:
    """Cuts off what follows a whole number of chunks; returns how many lines are left."""
    lines, kept = 0, 0
    end = whole = file.tell()
    for line in file:
        if not line.endswith(b"\n"):
            break
        lines, end = lines + 1, end + len(line)
        if lines % chunk == 0:
            kept, whole = lines, end
    file.truncate(whole)
    if kept:
        log.info("going on after %d lines of %s", kept, file.name)
    return kept


def results_so_far(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """The results of a partial file, without the job line."""
    file.seek(0)
    file.readline()
    yield from map(json.loads, file)


def append(file: BinaryIO, results: Iterable[Mapping[str, Any]]) -> None:
    """Adds the results of a chunk to a partial file."""
    for result in results:
        file.write(json.dumps(result, allow_nan=False).encode() + b"\n")
    file.flush()


def finish(file: BinaryIO, out: Path) -> None:
    """Moves the results of a partial file, without the job line, to `out`."""
    ready = out.with_name(out.name + ".ready")
    file.seek(0)
    file.readline()
    with ready.open("wb") as sink:
        while block := file.read(1 << 20):
            sink.write(block)
    ready.replace(out)
    if fcntl is None:
        file.close()  # Windows takes no open file away
    Path(file.name).unlink()
