"""What the packages give on import: names that are listed, typed, documented and lazy."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("circuits", "abstraction", "mad", "circuits.prompts", "circuits.plot")
PUBLIC = [
    (package, name)
    for package in ("circuits", "abstraction", "mad")
    for name in importlib.import_module(package).__dir__()
]


def typed(package: str) -> dict[str, str]:
    """The names that type checkers and editors see, with the module that each comes from."""
    source = Path(importlib.import_module(package).__file__ or "").read_text()
    (block,) = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    found = {}
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom) and statement.module is not None
        for alias in statement.names:
            submodule = f"{package}.{alias.name}" if statement.module == package else None
            found[alias.asname or alias.name] = submodule or statement.module
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_editors_see_the_names_that_are_there(package):
    module = importlib.import_module(package)
    assert typed(package) == module._WHERE
    assert sorted(module._WHERE) == dir(module)


@pytest.mark.parametrize(("package", "name"), PUBLIC)
def test_every_name_is_there_and_says_what_it_is(package, name):
    value = getattr(importlib.import_module(package), name)
    if inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value):
        assert inspect.getdoc(value)


@pytest.mark.parametrize("package", ("circuits", "abstraction", "mad"))
def test_importing_takes_no_torch(package):
    code = f"import sys, {package}; dir({package}); sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
    )


def test_what_is_not_there_is_refused():
    import circuits

    with pytest.raises(AttributeError, match="module 'circuits' has no attribute 'nothing'"):
        _ = circuits.nothing  # pyright: ignore[reportAttributeAccessIssue]
