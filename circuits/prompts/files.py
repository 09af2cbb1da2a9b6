"""Prompt files: JSONL of our own schema and the formats of the peers, read into records.

    JSONL                one object a line, as `circuits.prompts.encoding` describes it; a JSON list
                         of them will do
    auto-circuit         {"prompts": [{"clean", "corrupt", "answers", "wrong_answers"}, ...], ...}
                         (Miller et al. 2024, arXiv 2407.08734); only the prompts are read
    feature-circuits     JSONL of {"clean_prefix", "patch_prefix", "clean_answer", "patch_answer"}
                         (Marks et al. 2024, arXiv 2403.19647)
    EAP-IG               CSV with the columns clean, corrupted and either correct_idx and
                         incorrect_idx, token ids, or label, a two-digit year: years after it are
                         right, it and those before it are wrong (Hanna et al. 2024, arXiv
                         2403.17806; greater-than: Hanna et al. 2023, arXiv 2305.00586)

A file is known by its content, a CSV by its suffix.  What the records hold is checked when they are
encoded.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

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
            formats, by number.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file; give the path of a prompt file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from None
    if not text.strip():
        raise ValueError(f"{path} is empty; give at least one prompt")
    try:
        records = _read_csv(text) if path.suffix.lower() == ".csv" else _read_json(text)
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from None
    if not records:
        raise ValueError(f"{path} holds no prompts; give at least one")
    return records


def parse_line(line: str) -> dict[str, Any]:
    """The record on a line of JSONL, ours or feature-circuits'; ValueError for no JSON object."""
    if not line.strip():
        raise ValueError("blank line; remove it")
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"no JSON at column {error.colno} ({error.msg}); write one object a line"
        ) from None
    except RecursionError:
        raise ValueError("JSON nested too deeply; write one flat object a line") from None
    return _record(value)


def write_jsonl(records: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Writes the records to `path`, one a line, over what may be there."""
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        for record in records:  # escaped to ASCII, so that no text can break a line
            file.write(json.dumps(dict(record)) + "\n")


def _read_json(text: str) -> list[dict[str, Any]]:
    try:
        whole = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        whole = None  # more than one line, as a rule
    if isinstance(whole, dict) and "prompts" in whole:
        whole = whole["prompts"]
        if not isinstance(whole, list):
            raise ValueError("prompts is no list; give a list of objects")
    if isinstance(whole, list):
        return _numbered("prompt", whole, _record)
    # Only "\n" ends a line: str.splitlines would also cut at U+2028, which JSON strings may hold.
    return _numbered("line", text.rstrip().split("\n") if whole is None else [text], parse_line)


def _record(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError('no object; write {"clean": ...}')
    if "clean_prefix" not in value:
        return value
    others = {key: value[key] for key in value if key not in PREFIX_KEYS | ANSWER_KEYS}
    texts = {ours: value[theirs] for theirs, ours in PREFIX_KEYS.items() if theirs in value}
    answers = {ours: [value[theirs]] for theirs, ours in ANSWER_KEYS.items() if theirs in value}
    return texts | answers | others


def _read_csv(text: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        rows, columns = list(reader), set(reader.fieldnames or ())
    except csv.Error as error:
        raise ValueError(
            f"after line {reader.line_num}: no CSV ({error}); correct what follows"
        ) from None
    if not {"clean", "corrupted"} <= columns or not (
        {"label"} <= columns or {"correct_idx", "incorrect_idx"} <= columns
    ):
        raise ValueError(
            f"columns {', '.join(sorted(map(str, columns)))}; EAP-IG's are clean, corrupted and "
            "either label or correct_idx and incorrect_idx"
        )
    return _numbered("row", rows, _by_index if "correct_idx" in columns else _greater_than)


def _by_index(row: Mapping[str, str]) -> dict[str, Any]:
    return {
        "clean": row["clean"],
        "corrupt": row["corrupted"],
        "answers": _token_ids("correct_idx", row["correct_idx"]),
        "wrong_answers": _token_ids("incorrect_idx", row["incorrect_idx"]),
    }


def _token_ids(column: str, cell: str | None) -> list[int]:
    """One token id or a JSON list of them."""
    try:
        value: Any = json.loads(cell or "")
    except json.JSONDecodeError:
        value = None
    tokens: list[Any] = value if isinstance(value, list) else [value]
    if not tokens or any(type(token) is not int for token in tokens):
        raise ValueError(f"{column}={cell!r} is no token id; give a whole number or a list of them")
    return tokens


def _greater_than(row: Mapping[str, str]) -> dict[str, Any]:
    cell = row["label"] or ""
    if not (cell.isascii() and cell.isdigit() and int(cell) <= 98):
        raise ValueError(
            f"label={cell!r}, but a year that others can follow is from 00 to 98; correct it"
        )
    year = int(cell)
    return {
        "clean": row["clean"],
        "corrupt": row["corrupted"],
        "answers": [f"{later:02d}" for later in range(year + 1, 100)],
        "wrong_answers": [f"{earlier:02d}" for earlier in range(year + 1)],
    }


def _numbered(noun: str, items: list, convert: Any) -> list[dict[str, Any]]:
    """`convert` of each item, with the item's number in front of its errors."""
    records = []
    for number, item in enumerate(items, start=1):
        try:
            records.append(convert(item))
        except ValueError as error:
            raise ValueError(f"{noun} {number}: {error}") from None
    return records
