"""Prompts from a file that the user brings (`circuits.prompts.files` has the formats)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from circuits.tasks.task import Task


@dataclass
class File:
    """Trusted prompts in a file."""

    name: str = "file"
    path: str = "???"  # JSONL, auto-circuit JSON or EAP-IG CSV


def generate(config: File, count: int, seed: int) -> list[dict]:
    """Returns all records of the file; count and seed decide only how they are split later.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is empty or a line is no record.
    """
    from circuits.prompts.files import read_records

    return read_records(Path(config.path).expanduser())


TASK = Task("file", File, generate)
