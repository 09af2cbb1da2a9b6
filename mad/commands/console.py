"""Where commands print their tables: at a terminal's width, and elsewhere at their own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WIDEST = 1000  # characters of a line in a file or a pipe, where nothing need be cut


def output() -> Console:
    """Standard output; off a terminal, where rich would assume 80 columns, no number is cut."""
    from rich.console import Console

    console = Console()
    told = console.is_terminal or "COLUMNS" in os.environ
    return console if told else Console(width=WIDEST)
