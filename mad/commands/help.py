"""Help, read from the source text, so that it answers before torch could even be imported.

    madcap --help                     the commands
    madcap extract --help             the module's docstring, its settings, presets of each group
    madcap extract method=acdc --help the settings of that choice as well

A setting's description is the comment on its lines, or right above them, in the dataclass. A
preset's first comment names its dataclass, and may go on to say what it is for:
`# circuits.discovery.acdc.ACDC - exact sweep`.
"""

from __future__ import annotations

import ast
import io
import shutil
import textwrap
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from mad.commands.config import configs_folder, groups, primary

OPTIONS = [
    ("-h, --help", "this text; with group=name also the settings of that choice"),
    ("-m, --multirun", "one run for each combination of comma-separated values"),
    ("-v, --verbose", "say what is being done"),
    ("--cfg", "print the configuration that would be run, and stop"),
]


@dataclass(frozen=True)
class Setting:
    """One field of a configuration dataclass."""

    name: str
    default: str  # as source text; "required" when there is none
    comment: str


def overview(commands: Mapping[str, str]) -> str:
    """The text of `madcap --help`, from each command's summary."""
    lines = [
        "madcap finds the circuit behind a trusted behaviour of a transformer, tests it, and "
        "scores new inputs by how",
        "far the model departs from it.",
        "",
        "usage: madcap COMMAND [key=value ...]",
        "",
        *_columns(list(commands.items())),
        "",
        "madcap COMMAND --help tells the settings of a command.  madcap --version tells the "
        "version.",
    ]
    return "\n".join(lines) + "\n"


def command_help(command: str, module: str, overrides: list[str]) -> str:
    """The text of `madcap COMMAND --help`; `method=acdc` asks for that choice's settings too."""
    taken = groups(command)
    settings = {
        setting.name: setting for setting in class_settings(f"{module}.{class_name(command)}")
    }
    lines = [
        f"usage: madcap {command} [key=value ...] [-m] [-v]",
        "",
        (ast.get_docstring(_parsed(module), clean=False) or "").strip(),
        "",
        *_plain_settings(command, settings.values()),
    ]
    for group, default in taken.items():
        lines += _group(group, default, settings.get(group))
    for override in overrides:
        group, _, name = override.partition("=")
        if group in taken and name in preset_names(group):
            lines += _choice(group, name)
    lines += ["options", *_columns(OPTIONS)]
    return "\n".join(lines) + "\n"


def _plain_settings(command: str, settings: Iterable[Setting]) -> list[str]:
    """The settings that are no groups, with the defaults of the command's own file."""
    hidden = {*groups(command), "overrides"}
    written = {key: str(value) for key, value in primary(command).items()}
    rows = [
        (setting.name, written.get(setting.name, setting.default), setting.comment)
        for setting in settings
        if setting.name.partition(".")[0] not in hidden
    ]
    return ["settings", *_columns(rows), ""] if rows else []


def _group(group: str, default: str | None, setting: Setting | None) -> list[str]:
    """A group with its presets."""
    unset = default is None and setting is not None and setting.default == "required"
    note = f" (default: {default or 'none'})"
    if default == "???" or unset:
        note = " (required)"
    elif group == "mode":
        note = ""
    about = f": {setting.comment}" if setting and setting.comment else ""
    rows = [(name, preset_summary(group, name)) for name in preset_names(group)]
    return [f"{group}=NAME{note}{about}", *_columns(rows), ""]


def _choice(group: str, name: str) -> list[str]:
    """The settings of a preset's dataclass."""
    path = preset_class(group, name)
    if not path:
        return []
    rows = [(f"{group}.{s.name}", s.default, s.comment) for s in class_settings(path)]
    return [f"settings of {group}={name}", *_columns(rows), ""]


def class_name(command: str) -> str:
    """The configuration dataclass of a command: `Extract` for `extract`."""
    return command.title()


# --------------------------------------------------------------------------------------------------
# presets


def preset_names(group: str) -> list[str]:
    """The presets in configs/GROUP."""
    return sorted(path.stem for path in (configs_folder() / group).glob("*.yaml"))


def preset_class(group: str, name: str) -> str:
    """The dotted path of a preset's dataclass, by its first comment; empty when it names none."""
    word = _first_comment(group, name).partition(" ")[0]
    return word if "." in word.strip(".") else ""


def preset_summary(group: str, name: str) -> str:
    """What the preset's comment says it is for, or else what its dataclass begins with."""
    path = preset_class(group, name)
    said = _first_comment(group, name).removeprefix(path).lstrip(" :-–").strip()
    if said or not path:
        return said
    found = _find_class(path)
    docstring = ast.get_docstring(found[1]) if found else None
    return " ".join((docstring or "").partition("\n\n")[0].split())


def _first_comment(group: str, name: str) -> str:
    lines = (configs_folder() / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comments = (line for line in lines if line.startswith("#") and "@package" not in line)
    return next(comments, "").lstrip("# ").strip()


# --------------------------------------------------------------------------------------------------
# dataclasses, unrun


def class_settings(path: str) -> list[Setting]:
    """The fields of the dataclass at a dotted path, those it inherits first."""
    found = _find_class(path)
    if found is None:
        return []
    module, node = found
    settings: dict[str, Setting] = {}
    for base in node.bases:
        if isinstance(base, ast.Name):
            settings |= {s.name: s for s in class_settings(_qualified(module, base.id))}
    comments = _comments(module)
    above = node.lineno
    for field in node.body:
        end = field.end_lineno or field.lineno
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            lines = range(above + 1, end + 1)
            comment = " ".join(comments[line] for line in lines if line in comments)
            own = Setting(field.target.id, _default(field.value), comment)
            nested = _nested(module, field)
            if nested:
                settings.pop(own.name, None)
            settings |= {setting.name: setting for setting in nested or [own]}
        above = end
    return list(settings.values())


def _nested(module: str, field: ast.AnnAssign) -> list[Setting]:
    """The settings below a field whose default is another dataclass of ours."""
    factory = _keywords(field.value).get("default_factory")
    if not isinstance(factory, ast.Name):
        return []
    prefix = ast.unparse(field.target)
    inner = class_settings(_qualified(module, factory.id))
    return [Setting(f"{prefix}.{s.name}", s.default, s.comment) for s in inner]


def _keywords(value: ast.expr | None) -> dict[str | None, ast.expr]:
    return {one.arg: one.value for one in value.keywords} if isinstance(value, ast.Call) else {}


def _find_class(path: str) -> tuple[str, ast.ClassDef] | None:
    """The class at a dotted path and the module that defines it, through re-exports."""
    module, _, name = path.rpartition(".")
    try:
        tree = _parsed(module)
    except FileNotFoundError:
        return None
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
    elsewhere = _qualified(module, name)
    return _find_class(elsewhere) if elsewhere != path else None


def _qualified(module: str, name: str) -> str:
    """The dotted path of a name used in a module: where it is imported from, or in the module."""
    for node in _parsed(module).body:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return f"{node.module}.{alias.name}"
    return f"{module}.{name}"


def _default(value: ast.expr | None) -> str:
    """A default, written as on the command line."""
    match value:
        case None | ast.Constant(value="???"):
            return "required"
        case ast.Constant(value=None):
            return "null"
        case ast.Constant(value=bool(literal)):
            return str(literal).lower()
        case ast.Constant(value=literal):
            return str(literal) or "''"
        case ast.Call(func=ast.Name("field")):
            return _field_default(_keywords(value))
    return ast.unparse(value)


def _field_default(keywords: Mapping[str | None, ast.expr]) -> str:
    factory = keywords.get("default_factory")
    if factory is None:
        return _default(keywords.get("default"))
    if isinstance(factory, ast.Lambda):
        return ast.unparse(factory.body)
    return {"list": "[]", "dict": "{}", "tuple": "[]"}.get(ast.unparse(factory), "")


def _comments(module: str) -> dict[int, str]:
    """The comment on each line that has one."""
    tokens = tokenize.generate_tokens(io.StringIO(_source(module)).readline)
    return {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokens
        if token.type == tokenize.COMMENT
    }


def _parsed(module: str) -> ast.Module:
    return ast.parse(_source(module))


@cache
def _source(module: str) -> str:
    """A module's text, found without importing the packages above it."""
    top, *rest = module.split(".")
    spec = find_spec(top)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder, *rest)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file.read_text(encoding="utf-8")
    raise FileNotFoundError(f"no source for the module {module}")


# --------------------------------------------------------------------------------------------------
# layout


def _columns(rows: Sequence[tuple[str, ...]], widest: int = 28) -> Iterator[str]:
    """Rows as aligned columns, the last one wrapped to the terminal."""
    if not rows:
        return
    columns = list(zip(*rows, strict=True))[:-1]
    widths = [min(max(map(len, column)), widest) for column in columns]
    indent = 2 + sum(width + 2 for width in widths)
    room = max(shutil.get_terminal_size((120, 24)).columns - indent, 30)
    for row in rows:
        start = "  " + "".join(
            cell.ljust(width) + "  " for cell, width in zip(row, widths, strict=False)
        )
        first, *others = textwrap.wrap(row[-1], room) or [""]
        yield (start + first).rstrip()
        yield from (" " * indent + other for other in others)
