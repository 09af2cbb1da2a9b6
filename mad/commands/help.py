"""Help, read from the source text, so that it answers before torch could even be imported.

    madcap --help                     the commands
    madcap extract --help             the module's docstring, its settings, the presets of each group
    madcap extract method=acdc --help the settings of that choice as well

A setting's description is the comment on its line, or the lines of comment right above it, in the
dataclass. A preset's first comment names its dataclass, and may go on to say what it is for: `#
circuits.discovery.acdc.ACDC - exact sweep`.
"""

from __future__ import annotations

import ast
import io
import shutil
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
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


@dataclass(frozen=True)
class Comment:
    """A comment in a source file."""

    column: int
    text: str
    alone: bool  # nothing else is on its line


def overview(commands: Mapping[str, tuple[str, str]]) -> str:
    """The text of `madcap --help`."""
    lines = [
        "madcap finds the circuit behind a trusted behaviour of a transformer, tests it, and "
        "scores new inputs by how",
        "far the model departs from it.",
        "",
        "usage: madcap COMMAND [key=value ...]",
        "",
        *_table([(name, summary) for name, (_, summary) in commands.items()]),
        "",
        "madcap COMMAND --help tells the settings of a command.  madcap --version tells the "
        "version.",
    ]
    return "\n".join(lines) + "\n"


def command_help(command: str, module: str, words: list[str]) -> str:
    """The text of `madcap COMMAND --help`; `words` such as `method=acdc` ask for the settings of
    those choices.
    """
    taken = groups(command)
    written = {key: str(value) for key, value in primary(command).items() if key != "defaults"}
    settings = {
        setting.name: setting for setting in class_settings(f"{module}.{class_name(command)}")
    }
    lines = [
        f"usage: madcap {command} [key=value ...] [-m] [-v]",
        "",
        (ast.get_docstring(_parsed(module), clean=False) or "").strip(),
        "",
    ]

    plain = [
        s
        for s in settings.values()
        if s.name.partition(".")[0] not in taken and s.name != "overrides"
    ]
    if plain:
        lines += [
            "settings",
            *_table([(s.name, written.get(s.name, s.default), s.comment) for s in plain]),
            "",
        ]
    for group, default in taken.items():
        setting = settings.get(group)
        required = default == "???" or (
            default is None and setting is not None and setting.default == "required"
        )
        note = (
            " (required)"
            if required
            else ""
            if group == "mode"
            else f" (default: {default or 'none'})"
        )
        about = f": {setting.comment}" if setting and setting.comment else ""
        lines += [f"{group}=NAME{note}{about}"]
        lines += [
            *_table([(name, preset_summary(group, name)) for name in preset_names(group)]),
            "",
        ]
    for word in words:
        group, _, name = word.partition("=")
        if group in taken and name in preset_names(group) and (path := preset_class(group, name)):
            rows = [(f"{group}.{s.name}", s.default, s.comment) for s in class_settings(path)]
            lines += [f"settings of {word}", *_table(rows), ""]
    lines += ["options", *_table(OPTIONS)]
    return "\n".join(lines) + "\n"


def class_name(command: str) -> str:
    """The configuration dataclass of a command: `Extract` for `extract`."""
    return command.title()


# -------------------------------------------------------------------------------------------------------------
# presets


def preset_names(group: str) -> list[str]:
    """The presets in configs/GROUP."""
    return sorted(path.stem for path in (configs_folder() / group).glob("*.yaml"))


def preset_class(group: str, name: str) -> str:
    """The dotted path of the dataclass that a preset names in its first comment; empty when it
    names none.
    """
    return next(
        (word for word in _first_comment(group, name).split()[:1] if "." in word.strip(".")), ""
    )


def preset_summary(group: str, name: str) -> str:
    """What the preset's comment says it is for, or else the first sentence of its dataclass."""
    path = preset_class(group, name)
    said = _first_comment(group, name).removeprefix(path).lstrip(" :-–").strip()
    if said or not path:
        return said
    found = _find_class(path)
    docstring = ast.get_docstring(found[1]) if found else None
    return (docstring or "").partition("\n")[0]


def _first_comment(group: str, name: str) -> str:
    lines = (configs_folder() / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comments = (
        line.lstrip("# ").strip()
        for line in lines
        if line.startswith("#") and "@package" not in line
    )
    return next(comments, "")


# ---------------------------------------------------------------------------------------------------
# dataclasses, unrun


def class_settings(path: str) -> list[Setting]:
    """The fields of the dataclass at a dotted path, those it inherits first."""
    found = _find_class(path)
    if found is None:
        return []
    module, node = found
    settings = {}
    for base in node.bases:
        if isinstance(base, ast.Name):
            settings |= {s.name: s for s in class_settings(_qualified(module, base.id))}
    comments = _comments(module)
    above = node.lineno
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            comment, name = _comment_of(field, comments, above), field.target.id
            nested = (
                class_settings(_qualified(module, made)) if (made := _made_by(field.value)) else []
            )
            settings[name] = Setting(name, _default(field.value), comment)
            if nested:
                del settings[name]
                settings |= {
                    f"{name}.{s.name}": Setting(f"{name}.{s.name}", s.default, s.comment)
                    for s in nested
                }
        above = field.end_lineno or field.lineno
    return list(settings.values())


def _made_by(value: ast.expr | None) -> str | None:
    """The name of the class that a field's default is made by, in `field(default_factory=NAME)`."""
    if isinstance(value, ast.Call):
        for keyword in value.keywords:
            if keyword.arg == "default_factory" and isinstance(keyword.value, ast.Name):
                return keyword.value.id
    return None


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
    """The dotted path of a name used in a module: where it is imported from, or the module itself."""
    for node in _parsed(module).body:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return f"{node.module}.{alias.name}"
    return f"{module}.{name}"


def _comment_of(field: ast.AnnAssign, comments: Mapping[int, Comment], above: int) -> str:
    """The comment lines between `above` and the field, and the one on it with its continuation
    lines.

    A comment line that starts right of the fields continues the comment of the field before it.
    """
    end = field.end_lineno or field.lineno
    between = [comments[line] for line in range(above + 1, field.lineno) if line in comments]
    texts = [
        comment.text for comment in between if comment.alone and comment.column == field.col_offset
    ]
    if end in comments:
        texts.append(comments[end].text)
        line = end + 1
        while (
            line in comments and comments[line].alone and comments[line].column > field.col_offset
        ):
            texts.append(comments[line].text)
            line += 1
    return " ".join(texts)


def _default(value: ast.expr | None) -> str:
    if value is None or (isinstance(value, ast.Constant) and value.value == "???"):
        return "required"
    if isinstance(value, ast.Constant):  # written as on the command line
        literal = value.value
        return (
            "null"
            if literal is None
            else str(literal).lower()
            if isinstance(literal, bool)
            else str(literal) or "''"
        )
    if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field"):
        for keyword in value.keywords:
            if keyword.arg == "default":
                return _default(keyword.value)
            if keyword.arg == "default_factory":
                made = keyword.value
                empty = {"list": "[]", "dict": "{}", "tuple": "[]"}
                return (
                    ast.unparse(made.body)
                    if isinstance(made, ast.Lambda)
                    else empty.get(ast.unparse(made), "")
                )
        return "required"
    return ast.unparse(value)


def _comments(module: str) -> dict[int, Comment]:
    """The comment on each line that has one."""
    tokens = tokenize.generate_tokens(io.StringIO(_source(module)).readline)
    return {
        token.start[0]: Comment(
            token.start[1],
            token.string.lstrip("# ").strip(),
            alone=not token.line[: token.start[1]].strip(),
        )
        for token in tokens
        if token.type == tokenize.COMMENT
    }


def _parsed(module: str) -> ast.Module:
    return ast.parse(_source(module))


@cache
def _source(module: str) -> str:
    """A module's text; only its top-level package is looked up, for finding a submodule would
    import its parents.
    """
    top, *rest = module.split(".")
    spec = find_spec(top)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder, *rest)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file.read_text(encoding="utf-8")
    raise FileNotFoundError(f"no source for the module {module}")


# ---------------------------------------------------------------------------------------------------------------
# layout


def _table(rows: list[tuple[str, ...]], widest: int = 28) -> Iterator[str]:
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
