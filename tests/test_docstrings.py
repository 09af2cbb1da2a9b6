"""The examples in docstrings run as written, and every public function has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in ("circuits", "abstraction", "mad")
    for path in sorted((ROOT / package).rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_run(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where examples may write
    failed, tried = doctest.testmod(importlib.import_module(module))
    assert tried and not failed


@pytest.mark.parametrize("package", ("circuits", "abstraction", "mad"))
def test_every_public_function_has_an_example(package):
    module = importlib.import_module(package)
    functions = {name: getattr(module, name) for name in dir(module)}
    without = [
        name
        for name, value in functions.items()
        if inspect.isfunction(value) and ">>> " not in (inspect.getdoc(value) or "")
    ]
    assert not without
