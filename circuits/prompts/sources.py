"""The bytes of a prompt file: plain or gzip, from a file or a pipe, and never of another format."""

from __future__ import annotations

import gzip
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import cast

STDIN = "-"  # in place of a path
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # byte-order marks
_HEAD = 4096  # bytes that tell UTF-16


def is_source(path: Path) -> bool:
    """Whether there is something to read: a file, a pipe, or `-` for standard input."""
    return str(path) == STDIN or (path.exists() and not path.is_dir())


@contextmanager
def opened(path: Path) -> Iterator[BufferedIOBase]:
    """The contents from their first byte, unpacked where they are gzip; they can be read again.

    What comes from a pipe is kept in a temporary file.

    Raises:
        ValueError: they are Parquet or UTF-16; later, where gzip is damaged or breaks off.
    """
    with _seekable(path) as file:
        _refuse_parquet(file, path)
        packed = file.read(len(_GZIP)) == _GZIP
        file.seek(0)
        contents = gzip.GzipFile(fileobj=file) if packed else file
        try:
            _refuse_utf16(contents, path)
            yield contents
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is damaged gzip ({error}); pack it anew") from None


@contextmanager
def _seekable(path: Path) -> Iterator[BufferedIOBase]:
    if path.is_file():
        with path.open("rb") as file:
            yield file
        return
    pipe = os.dup(sys.stdin.fileno()) if str(path) == STDIN else path
    with open(pipe, "rb") as source, tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(source, copy)
        copy.seek(0)
        yield cast(BufferedIOBase, copy)


def _refuse_parquet(file: BufferedIOBase, path: Path) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - len(_PARQUET)))
    last = file.read()
    file.seek(0)
    if file.read(len(_PARQUET)) == last == _PARQUET:
        raise ValueError(f"{path} is Parquet; write its rows as JSONL, one object a line")
    file.seek(0)


def _refuse_utf16(contents: BufferedIOBase, path: Path) -> None:
    """Refuses a file of UTF-16; a stray mark before lines of UTF-8 makes one bad line only."""
    head = contents.read(_HEAD)
    contents.seek(0)
    if head.startswith(_UTF16) and head.count(0) > len(head) // 4:  # half of JSON's bytes are 0
        raise ValueError(f"{path} is UTF-16; save the file as UTF-8")
