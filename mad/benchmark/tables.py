"""Tables of results, as Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The table as Markdown, without a newline at its end.

    >>> print(markdown_table(["edge", "score"], [["m0->logits", "1.5"]]))
    | edge | score |
    | --- | --- |
    | m0->logits | 1.5 |
    """
    lines = (headers, ["---"] * len(headers), *rows)
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def terminal_table(
    title: str, headers: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[str]
) -> Table:
    """The table for a terminal; the columns in `left` hold text, all others numbers."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for header in headers:
        justify = "left" if header in left else "right"
        table.add_column(header, justify=justify, no_wrap=header in left)
    for row in rows:
        table.add_row(*row)
    return table
