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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

# `model=X` with X no preset means `model=path model.path=X`; a task is then a prompt file.
OPEN_GROUPS = {"model": "path", "task": "file"}

# Keys that are groups of other commands: Hydra would take `model=X` for a choice among presets.
PLAIN = {"model": "path", "detector": "name"}

# Keys whose value is taken literally, so that a path may hold spaces, commas, quotes and `=`.
PATHS = {"circuit", "inputs", "out", "trusted", "model.path", "task.path"}


class UsageError(Exception):
    """What the user typed cannot be run; the message is one line that says why and what would do."""


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


def normalise(
    words: Iterable[str],
    taken: Iterable[str],
    presets: Callable[[str], list[str]],
    *,
    sweep: bool = False,
) -> list[str]:
    """Hydra overrides that mean what the user's words mean.

    Args:
        words: `key=value` as typed.
        taken: the groups that the command takes.
        presets: the names of a group's presets.
        sweep: commas separate values, one job for each; otherwise they belong to the value.

    Raises: UsageError: for a word that is not `key=value`, and for a task that is neither a preset
        nor a file.
    """
    taken = set(taken)
    overrides = []
    for word in words:
        sign, key, value = _split(word)
        several = sweep and "," in value and not re.match(r"\w+\(.*\)\Z", value)
        values = value.split(",") if several else [value]
        literal = [item for item in values if item not in ("", "null")]
        if key in OPEN_GROUPS and key in taken and not sign and literal:
            names = presets(key)
            named = [item for item in literal if item.strip("'\"") in names]
            if not named:
                path = ",".join(quote(_existing(key, item, names)) for item in values)
                overrides += [f"{key}={OPEN_GROUPS[key]}", f"{key}.path={path}"]
                continue
            if len(named) < len(literal):
                raise UsageError(
                    f"{word}: presets and paths cannot be swept over together; run them one by one"
                )
        elif key in PLAIN and key not in taken and not sign:
            word = f"{key}.{PLAIN[key]}=" + ",".join(
                quote(os.path.expanduser(item)) for item in values
            )
        elif key in PATHS and literal:
            word = f"{sign}{key}=" + ",".join(quote(os.path.expanduser(item)) for item in values)
        overrides.append(word)
    return overrides


def _split(word: str) -> tuple[str, str, str]:
    """A word's sign (`+`, `++`, `~` or none), key and value."""
    match = re.match(r"(\+\+|\+|~|)([^=+~][^=]*)(=?)(.*)\Z", word, re.DOTALL)
    if match is None or not (match[3] or match[1] == "~"):
        raise UsageError(f"{word!r} is not of the form key=value")
    return match[1], match[2], match[4]


def _existing(group: str, value: str, names: list[str]) -> str:
    """The value as a path; what is no file must be a hub name, so that a misspelt preset is told at
    once.
    """
    path = os.path.expanduser(value)
    near = did_you_mean(value, names)
    if (group == "task" or ("/" not in value and near)) and not os.path.exists(path.strip("'\"")):
        raise UsageError(
            f"{group}={value}: neither a preset nor a file{did_you_mean(value, names)}; "
            f"{_listed(names)}"
        )
    return path


@contextmanager
def explained(presets: Callable[[str], list[str]]) -> Iterator[None]:
    """Turn the errors of Hydra and OmegaConf into a UsageError of one line that names the key and
    the choices.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(_explanation(error, presets)) from error


def _explanation(error: Exception, presets: Callable[[str], list[str]]) -> str:
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        names = presets(group)
        return f"unknown {group} preset {name!r}{did_you_mean(name, names)}; {_listed(names)}"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: {_first_line(error)}; quote a value that holds any of , = : [ ] {{ }}"
    if several := re.match(r"Ambiguous value for argument '(.*)'", str(error)):
        return (
            f"{several[1]} has several values: add -m for one run each, or write [a,b] for a list"
        )

    if unset := re.match(r"You must specify '(.*?)'", str(error)):
        return f"required and not given: {unset[1]}=...; {_listed(presets(unset[1]))}"

    cause = (
        error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    )
    if not isinstance(cause, OmegaConfBaseException):
        return " ".join(str(error).split())
    where = re.match(r"In '(.*?)': ", str(error))
    prefix = f"in {where[1]}.yaml: " if where else ""
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.parent_node is not None:
        return prefix + unknown_key(
            str(cause.full_key), _dotted_keys(cause.parent_node, str(cause.full_key))
        )
    key = f"{cause.full_key}: " if cause.full_key else ""
    return prefix + key + _first_line(cause)


def unknown_key(key: str, known: list[str]) -> str:
    """What to answer to a key that no dataclass has."""
    level = key.count(".")
    siblings = [name for name in known if name.count(".") == level]
    return f"unknown key {key!r}{did_you_mean(key, known)}; keys: {', '.join(siblings) or 'none'}"


def _dotted_keys(node: DictConfig, full_key: str) -> list[str]:
    """Keys beside a key that does not exist, and below, since `tau=.1` may stand for
    `method.tau=.1`.
    """

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
