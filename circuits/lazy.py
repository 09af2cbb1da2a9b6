"""Names of a package that are imported on first use, so that the command line answers before torch
is loaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy(package: str, where: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns a package's `__getattr__`; `where` maps each public name to the module that defines
    it (or is it).
    """

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(where[name])
        return module if where[name] == f"{package}.{name}" else getattr(module, name)

    return get
