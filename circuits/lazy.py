"""Names of a package that are imported on first use.

So the command line answers before torch is loaded, and `dir()` and completion list the names all
the same.  The package also imports them under `TYPE_CHECKING`, for type checkers and editors.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

GetName = Callable[[str], Any]
ListNames = Callable[[], list[str]]


def lazy(package: str, where: Mapping[str, str]) -> tuple[GetName, ListNames]:
    """Returns a package's `__getattr__` and `__dir__`; `where` names each public name's module."""

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(where[name])
        return module if where[name] == f"{package}.{name}" else getattr(module, name)

    return get, lambda: sorted(where)
