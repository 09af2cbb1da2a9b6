"""EAP-IG's CSV files, whose columns must have one meaning.

The columns are clean, corrupted and either correct_idx and incorrect_idx, token ids, or label, a
two-digit year that `clean` ends a number with: years after it are right, it and those before it are
wrong.  Beside token ids, label is 0 (normal) or 1 (anomalous), as in JSONL.  A column id names the
prompts; columns without a meaning are ignored, and those that would compete are refused.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from circuits.prompts.errors import quote

Row = Mapping[str | None, Any]  # under None: cells without a column
Convert = Callable[[Row], dict[str, Any]]

IDS = ("correct_idx", "incorrect_idx")
ANSWERS = ("answers", "wrong_answers", "answer", "wrong_answer", "clean_answer", "patch_answer")
# columns that mean the same as one that is read
TWINS = {
    "clean": ("text", "clean_prefix"),
    "corrupted": ("corrupt", "patch_prefix"),
}


def read_csv(text: str) -> tuple[Sequence[Row], Convert]:
    """The rows of a CSV, and what makes a record of each.

    Raises:
        ValueError: no CSV, or columns that are unknown or can be read in two ways.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        columns, rows = list(reader.fieldnames or ()), list(reader)
    except csv.Error as error:
        raise ValueError(
            f"after line {reader.line_num}: no CSV ({error}); correct what follows"
        ) from None
    if twice := [name for name in dict.fromkeys(columns) if name and columns.count(name) > 1]:
        raise ValueError(f"column {quote(twice[0])} is there twice; keep one")
    return rows, _reading(columns)


def _reading(columns: Sequence[str]) -> Convert:
    """What the columns say, if that is one thing only."""
    by_index = set(IDS) <= set(columns)
    if not {"clean", "corrupted"} <= set(columns) or not (by_index or "label" in columns):
        raise ValueError(
            f"columns {quote(', '.join(sorted(map(str, columns))))}; EAP-IG's are clean, corrupted "
            "and either label or correct_idx and incorrect_idx"
        )
    for name, twins in TWINS.items():
        if both := _first(columns, twins):
            raise ValueError(f"columns {name} and {both} mean the same; keep {name}")
    if "positions" in columns:
        raise ValueError("column positions is not read from CSV; write the prompts as JSONL")
    _refuse_other_answers(columns, by_index)
    return _by_index if by_index else _greater_than


def _refuse_other_answers(columns: Sequence[str], by_index: bool) -> None:
    if by_index:
        if other := _first(columns, ANSWERS):
            raise ValueError(f"columns correct_idx and {other} both hold answers; keep one of them")
        return
    if answers := [name for name in columns if name in ANSWERS or name.endswith("_idx")]:
        raise ValueError(
            f"column label would be read as two-digit years, but column {quote(answers[0])} beside "
            "it seems to hold answers; give token ids as correct_idx and incorrect_idx, or write "
            "the prompts as JSONL"
        )


def _first(columns: Collection[str], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _by_index(row: Row) -> dict[str, Any]:
    _check_cells(row)
    record = {
        "clean": row["clean"],
        "corrupt": row["corrupted"],
        "answers": _token_ids("correct_idx", row["correct_idx"]),
        "wrong_answers": _token_ids("incorrect_idx", row["incorrect_idx"]),
    }
    if label := row.get("label"):
        record["label"] = _mark(label)
    return record | _named(row)


def _check_cells(row: Row) -> None:
    if None in row:
        raise ValueError("more cells than columns; put text that holds a comma in quotes")
    if (missing := [name for name, cell in row.items() if cell is None]) != []:
        raise ValueError(f"no cell for column {quote(missing[0])}; give every row all cells")


def _named(row: Row) -> dict[str, str]:
    return {"id": row["id"]} if row.get("id") else {}


def _token_ids(column: str, cell: str) -> list[int]:
    """One token id or a JSON list of them."""
    try:
        value: Any = json.loads(cell)
    except (ValueError, RecursionError):
        value = None
    tokens: list[Any] = value if isinstance(value, list) else [value]
    if not tokens or any(type(token) is not int for token in tokens):
        raise ValueError(
            f"{column}={quote(cell)} is no token id; give a whole number or a list of them"
        )
    return tokens


def _mark(cell: str) -> int:
    if cell not in ("0", "1"):
        raise ValueError(
            f"label={quote(cell)}, but beside correct_idx it is 0 (normal) or 1 (anomalous); give "
            "one of these, or rename the column"
        )
    return int(cell)


def _greater_than(row: Row) -> dict[str, Any]:
    _check_cells(row)
    cell = row["label"]
    if not (cell.isascii() and cell.isdigit() and len(cell) <= 2 and int(cell) <= 98):
        raise ValueError(
            f"label={quote(cell)}, but a year that others can follow is from 00 to 98; correct it"
        )
    year = int(cell)
    if not re.search(rf"\d{year:02d}(?!\d)", row["clean"]):
        raise ValueError(
            f"label={cell} is read as a two-digit year, but clean={quote(row['clean'])} has no "
            f"year that ends in {year:02d}; give the answers as correct_idx and incorrect_idx, or "
            "write the prompts as JSONL"
        )
    record = {
        "clean": row["clean"],
        "corrupt": row["corrupted"],
        "answers": [f"{later:02d}" for later in range(year + 1, 100)],
        "wrong_answers": [f"{earlier:02d}" for earlier in range(year + 1)],
    }
    return record | _named(row)
