"""What the user typed: reading it literally, and answering in one line when it cannot be run.

`model=` and `task=` take a preset's name or a path, and paths may hold anything. Hydra's grammar
gives meaning to `= , : [ ] { }`, quotes and spaces, so such values are quoted before Hydra sees
them; `${...}` stays an interpolation.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

# `model=X` with X no preset means `model=path model.path=X`; a task is then a prompt file.
OPEN_GROUPS = {"model": "path", "task": "file"}

# Keys that are groups of other commands: Hydra would take `model=X` for a choice among presets.
PLAIN = {"model": "path", "detector": "name", "ablation": "name"}

# Keys whose value is taken literally, so that a path may hold spaces, commas, quotes and `=`.
PATHS = {
    *("against", "calibration", "circuit", "inputs", "out", "scored", "to", "trusted"),
    *("model.path", "task.path"),
}

# Commands that take paths without a key, and the list that these paths make.
WORDS = {"compare": "runs"}

Presets = Callable[[str], list[str]]  # the names of a group's presets


class UsageError(Exception):
    """What the user typed cannot be run; the message is one line: why, and what would do."""


# --------------------------------------------------------------------------------------------------
# reading


def normalise(
    typed: Iterable[str], taken: Iterable[str], presets: Presets, *, sweep: bool = False
) -> list[str]:
    """Hydra overrides that mean what the user's mean.

    Args:
        typed: `key=value` each.
        taken: the groups that the command takes.
        presets: the names of a group's presets.
        sweep: commas separate values, one job for each; otherwise they belong to the value.

    Raises:
        UsageError: for what is not `key=value`, and for a task that is neither a preset nor a file.
    """
    taken = set(taken)
    return [
        override
        for text in typed
        for override in _meaning(_Typed.read(text, sweep), taken, presets)
    ]


def gathered(command: str, typed: Iterable[str]) -> list[str]:
    """The overrides, with paths that stand without a key made into the list that takes them.

    >>> gathered("compare", ["runs/a", "runs/tau=0.1", "out=both"])
    ["runs=['runs/a','runs/tau=0.1']", 'out=both']
    """
    words = list(typed)
    if command not in WORDS:
        return words
    paths = [word for word in words if not re.match(r"[+~]*[\w.]+=", word)]
    settings = [word for word in words if word not in paths]
    listed = ",".join(quote(os.path.expanduser(path)) for path in paths)
    return [*([f"{WORDS[command]}=[{listed}]"] if paths else []), *settings]


def quote(value: str) -> str:
    """The value as a quoted string of Hydra's grammar; one that is quoted already is left alone.

    >>> quote("runs/a, b=c")
    "'runs/a, b=c'"
    """
    if re.fullmatch(r"""'([^'\\]|\\.)*'|"([^"\\]|\\.)*\"""", value, re.DOTALL):
        return value
    # A backslash is special only before a quote, the closing one included.
    body = re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + match[2].replace("'", "\\'"), value)
    return f"'{body}'"


@dataclass(frozen=True)
class _Typed:
    """One `key=value`, as the user typed it."""

    text: str
    sign: str  # +, ++, ~ or none
    key: str
    values: list[str]  # more than one in a sweep only

    @classmethod
    def read(cls, text: str, sweep: bool) -> _Typed:
        match = re.match(r"(\+\+|\+|~|)([^=+~][^=]*)(=?)(.*)\Z", text, re.DOTALL)
        if match is None or not (match[3] or match[1] == "~"):
            raise UsageError(f"{text!r} is not of the form key=value")
        sign, key, _, value = match.groups()
        several = sweep and not re.match(r"\w+\(.*\)\Z", value)  # range(1,9) is one value
        return cls(text, sign, key, value.split(",") if several else [value])

    @property
    def given(self) -> list[str]:
        return [value for value in self.values if value not in ("", "null")]

    def literally(self, key: str) -> list[str]:
        """The override of `key` by these values, whatever characters they hold."""
        values = ",".join(quote(os.path.expanduser(value)) for value in self.values)
        return [f"{self.sign}{key}={values}"]


def _meaning(typed: _Typed, taken: set[str], presets: Presets) -> list[str]:
    key = typed.key
    if key in OPEN_GROUPS and key in taken and not typed.sign and typed.given:
        return _preset_or_path(typed, presets(key))
    if key in PLAIN and key not in taken and not typed.sign:
        return typed.literally(f"{key}.{PLAIN[key]}")
    if key in PATHS and typed.given:
        return typed.literally(key)
    return [typed.text]


def _preset_or_path(typed: _Typed, names: list[str]) -> list[str]:
    key = typed.key
    named = [value for value in typed.given if value.strip("'\"") in names]
    if not named:
        path = ",".join(quote(_existing(key, value, names)) for value in typed.values)
        return [f"{key}={OPEN_GROUPS[key]}", f"{key}.path={path}"]
    if len(named) < len(typed.given):
        raise UsageError(
            f"{typed.text}: presets and paths cannot be swept over together; run them one by one"
        )
    return [typed.text]


def _existing(group: str, value: str, names: list[str]) -> str:
    """The value as a path; a misspelt preset is no hub name, and told at once."""
    path = os.path.expanduser(value)
    near = did_you_mean(value, names)
    must_exist = group == "task" or ("/" not in value and near)
    if must_exist and not os.path.exists(path.strip("'\"")):
        raise UsageError(f"{group}={value}: neither a preset nor a file{near}; {_listed(names)}")
    return path


# --------------------------------------------------------------------------------------------------
# answering


@contextmanager
def explained(presets: Presets) -> Iterator[None]:
    """Turn errors of Hydra and OmegaConf into a UsageError that names the key and the choices."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except OmegaConfBaseException as error:
        raise UsageError(_explain_omegaconf(error)) from error
    except HydraException as error:
        cause = error.__cause__ or error.__context__
        told = _explain_hydra(error, presets)
        if told is None and isinstance(cause, OmegaConfBaseException):
            where = re.match(r"In '(.*?)': ", str(error))
            told = (f"in {where[1]}.yaml: " if where else "") + _explain_omegaconf(cause)
        raise UsageError(told or " ".join(str(error).split())) from error


def _explain_hydra(error: Exception, presets: Presets) -> str | None:
    """What Hydra itself found wrong; None where it passes on what OmegaConf did."""
    from hydra.errors import MissingConfigException, OverrideParseException

    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        names = presets(group)
        return f"unknown {group} preset {name!r}{did_you_mean(name, names)}; {_listed(names)}"
    if isinstance(error, OverrideParseException):
        remedy = "quote a value that holds any of , = : [ ] { }"
        return f"cannot read {error.override!r}: {_first_line(error)}; {remedy}"
    if several := re.match(r"Ambiguous value for argument '(.*)'", str(error)):
        return (
            f"{several[1]} has several values: add -m for one run each, or write [a,b] for a list"
        )
    if unset := re.match(r"You must specify '(.*?)'", str(error)):
        return f"required and not given: {unset[1]}=...; {_listed(presets(unset[1]))}"
    return None


def _explain_omegaconf(error: OmegaConfBaseException) -> str:
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError

    key = str(error.full_key or "")
    if isinstance(error, ConfigAttributeError | ConfigKeyError) and error.parent_node is not None:
        return unknown_key(key, _dotted_keys(error.parent_node, key))
    return (f"{key}: " if key else "") + _first_line(error)


def unknown_key(key: str, known: list[str]) -> str:
    """What to answer to a key that no dataclass has."""
    level = key.count(".")
    siblings = [name for name in known if name.count(".") == level]
    return f"unknown key {key!r}{did_you_mean(key, known)}; keys: {', '.join(siblings) or 'none'}"


def _dotted_keys(node: DictConfig, full_key: str) -> list[str]:
    """Keys beside one that does not exist, and below: `tau=.1` may stand for `method.tau=.1`."""

    def below(node: DictConfig, prefix: str) -> Iterator[str]:
        yield from (f"{prefix}{key}" for key in node)
        for key, child in branches(node):
            if f"{prefix}{key}" != "hydra":
                yield from below(child, f"{prefix}{key}.")

    parent = full_key.rpartition(".")[0]
    return [key for key in below(node, f"{parent}." if parent else "") if key != "hydra"]


def branches(node: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """The keys of a configuration that hold configurations, without resolving anything."""
    from omegaconf import DictConfig, OmegaConf

    for key in map(str, node):
        if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
            if isinstance(node[key], DictConfig):
                yield key, node[key]


def did_you_mean(name: str, names: list[str]) -> str:
    """The nearest name as the tail of a message; empty when none is near."""
    below = [other for other in names if other.endswith(f".{name}")]
    closest = difflib.get_close_matches(name, names, n=1) or below[:1]
    return f"; did you mean {closest[0]!r}?" if closest else ""


def _listed(names: list[str]) -> str:
    return f"presets: {', '.join(names) or 'none'}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
