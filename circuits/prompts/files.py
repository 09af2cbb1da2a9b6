"""Prompt files: JSONL of our own schema and the formats of the peers, read into records.

    JSONL                one object a line, as `circuits.prompts.encoding` describes it; a JSON list
                         of them will do
    auto-circuit         {"prompts": [{"clean", "corrupt", "answers", "wrong_answers"}, ...], ...}
                         (Miller et al. 2024, arXiv 2407.08734); only the prompts are read
    feature-circuits     JSONL of {"clean_prefix", "patch_prefix", "clean_answer", "patch_answer"}
                         (Marks et al. 2024, arXiv 2403.19647)
    EAP-IG               CSV, as `circuits.prompts.tables` describes it (Hanna et al. 2024, arXiv
                         2403.17806; greater-than: Hanna et al. 2023, arXiv 2305.00586)

A file is known by its content, a CSV by its suffix; each may be packed by gzip.  It is UTF-8, and
its lines end in newlines.  What the records hold is checked when they are encoded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from circuits.prompts.errors import InputError, quote
from circuits.prompts.sources import is_source, opened
from circuits.prompts.tables import read_csv

# feature-circuits' keys and ours
PREFIX_KEYS = {"clean_prefix": "clean", "patch_prefix": "corrupt"}
ANSWER_KEYS = {"clean_answer": "answers", "patch_answer": "wrong_answers"}


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records in the file, in order.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder) / "prompts.jsonl"
    ...     write_jsonl([{"clean": [5, 7, 5], "answers": [7]}], path)
    ...     read_records(path)
    [{'clean': [5, 7, 5], 'answers': [7]}]

    Raises:
        ValueError: no such file, nothing in it, not UTF-8, or a line or row in none of these
            formats, by number; a key given twice.
    """
    path = Path(path)
    if not is_source(path):
        raise ValueError(f"{path} is no file; give the path of a prompt file")
    with opened(path) as file:
        contents = file.read()
    try:
        text = decode(contents)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty; give at least one prompt")
    is_csv = path.name.lower().removesuffix(".gz").endswith(".csv")
    try:
        records = _numbered("row", *read_csv(text)) if is_csv else _read_json(text)
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from None
    if not records:
        raise ValueError(f"{path} holds no prompts; give at least one")
    return records


def decode(contents: bytes) -> str:
    """The text of a file or line, without a byte-order mark; ValueError where it is not UTF-8."""
    try:
        return contents.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8; save the file as UTF-8") from None


def parse_line(line: str) -> dict[str, Any]:
    """The record on a line of JSONL, ours or feature-circuits'; ValueError for no JSON object."""
    line = line.removeprefix("\ufeff")  # where files were put together
    if not line.strip():
        raise ValueError("blank line; remove it")
    try:
        value = _loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(_no_json(line, error)) from None
    return _record(value)


def write_jsonl(records: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Writes the records to `path`, one a line, over what may be there."""
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        for record in records:  # escaped to ASCII, so that no text can break a line
            file.write(json.dumps(dict(record)) + "\n")


def _no_json(line: str, error: json.JSONDecodeError) -> str:
    if "\r" in line.strip():
        return "a carriage return without a newline ends no line; end each line with a newline"
    return f"no JSON at column {error.colno} ({error.msg}); write one object a line"


def _loads(text: str) -> Any:
    """JSON without keys that are given twice; InputError where it cannot be read.

    Raises:
        JSONDecodeError: no JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (json.JSONDecodeError, InputError):
        raise
    except RecursionError:
        raise InputError("JSON nested too deeply; write one flat object a line") from None
    except ValueError:  # Python's bound on digits
        raise InputError("JSON with a number of thousands of digits; correct it") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InputError(f"key {quote(twice)} is given twice; keep one")
    return made


def _read_json(text: str) -> list[dict[str, Any]]:
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        whole = None  # more than one line, as a rule
    if isinstance(whole, list) or (isinstance(whole, dict) and "prompts" in whole):
        whole = _loads(text)
        return _numbered("prompt", whole if isinstance(whole, list) else _prompts(whole), _record)
    # Only "\n" ends a line: str.splitlines would also cut at U+2028, which JSON strings may hold.
    return _numbered("line", text.rstrip().split("\n") if whole is None else [text], parse_line)


def _prompts(whole: Mapping[str, Any]) -> list[Any]:
    """auto-circuit's prompts."""
    if both := {"clean", "text", "clean_prefix"} & set(whole):
        raise ValueError(f"prompts and {min(both)} stand side by side; keep one of them")
    if not isinstance(whole["prompts"], list):
        raise ValueError("prompts is no list; give a list of objects")
    return whole["prompts"]


def _record(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError('no object; write {"clean": ...}')
    if "clean_prefix" not in value:
        return value
    record = {key: value[key] for key in value if key not in PREFIX_KEYS | ANSWER_KEYS}
    for theirs, ours in (PREFIX_KEYS | ANSWER_KEYS).items():
        if (given := value.get(theirs)) is None:
            continue
        if record.get(ours) is not None:
            raise ValueError(f"both {theirs} and {ours} are given, which mean the same; keep one")
        record[ours] = given if theirs in PREFIX_KEYS else [given]
    return record


def _numbered(noun: str, items: Iterable, convert: Any) -> list[dict[str, Any]]:
    """`convert` of each item, with the item's number in front of its errors."""
    records = []
    for number, item in enumerate(items, start=1):
        try:
            records.append(convert(item))
        except ValueError as error:
            raise ValueError(f"{noun} {number}: {error}") from None
    return records
