"""Results that are written chunk by chunk, so that an interrupted run can go on.

After each chunk of lines its results are appended to `OUT.partial` and flushed; when all are done
that file becomes `OUT`.  A run that finds `OUT.partial` of the same job goes on at the first chunk
that is not wholly there, so that every chunk is always computed as a whole and the finished file is
the same, byte for byte, as that of a run that was never interrupted.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, BinaryIO

log = logging.getLogger(__name__)


def resume(partial: Path, job: dict[str, Any], chunk: int, *, overwrite: bool) -> int:
    """Makes `partial` ready to be appended to and returns how many lines are done.

    Its first line names the job.  Results of another job are dropped with `overwrite`.

    Raises:
        ValueError: they may not be dropped.
    """
    header = json.dumps({"job": job}).encode() + b"\n"
    if partial.exists():
        with partial.open("rb+") as file:
            if file.readline() == header:
                return _keep_whole_chunks(file, chunk, partial)
        if not overwrite:
            raise ValueError(
                f"{partial} is the beginning of another job (other inputs, circuit, detector or "
                "settings); delete it to start over, or choose another out="
            )
    partial.write_bytes(header)
    return 0


def _keep_whole_chunks(file: BinaryIO, chunk: int, path: Path) -> int:
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
        log.info("going on after %d lines of %s", kept, path)
    return kept


def finish(partial: Path, out: Path) -> None:
    """Moves the results, without the job line, to `out`."""
    ready = out.with_name(out.name + ".ready")
    with partial.open("rb") as source, ready.open("wb") as sink:
        source.readline()
        while block := source.read(1 << 20):
            sink.write(block)
    ready.replace(out)
    partial.unlink()
