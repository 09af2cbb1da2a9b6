"""Prompts: clean and corrupt tokens, the positions that are scored and the answers there.

    file or task  ->  records (dicts)  ->  EncodedPrompt (one, checked)  ->  Prompts (tensors)

The names below are imported on first use: reading records takes no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from circuits.lazy import lazy

if TYPE_CHECKING:
    from circuits.prompts.collation import collate, prompts_from_records
    from circuits.prompts.encoding import EncodedPrompt, encode_record
    from circuits.prompts.errors import InputError
    from circuits.prompts.files import parse_line, read_records, write_jsonl
    from circuits.prompts.prompts import NONE, Prompts

_WHERE = {
    "EncodedPrompt": "circuits.prompts.encoding",
    "InputError": "circuits.prompts.errors",
    "NONE": "circuits.prompts.prompts",
    "Prompts": "circuits.prompts.prompts",
    "collate": "circuits.prompts.collation",
    "encode_record": "circuits.prompts.encoding",
    "parse_line": "circuits.prompts.files",
    "prompts_from_records": "circuits.prompts.collation",
    "read_records": "circuits.prompts.files",
    "write_jsonl": "circuits.prompts.files",
}

__all__ = [*_WHERE]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = lazy(__name__, _WHERE)
