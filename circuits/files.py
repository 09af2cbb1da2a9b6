"""The files of a run folder, which may be a stranger's: read as data, written whole.

Reading takes nothing from outside the folder and runs nothing: JSON and safetensors only, links
that lead out are refused, and what becomes a configuration is checked field by field.  A file is
written beside its place and then moved there, so that it is either the old one or the new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from jaxtyping import Shaped, jaxtyped
from torch import Tensor

from circuits.prompts.errors import quote

Config = TypeVar("Config")


def own_file(folder: Path, name: str) -> Path:
    """The path of a file in a folder; ValueError where it is a link that leads out of the folder.

    >>> own_file(Path("."), "circuit.json").name
    'circuit.json'
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{path} is a link to {path.resolve()}, which is not in the folder; put the file "
            "itself there"
        )
    return path


def read_json(path: Path) -> Any:
    """What a JSON file holds; ValueError where it is none, or nested too deep to be one of ours."""
    text = path.read_text(encoding="utf-8")
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if "\\ud" in text.lower():  # half of a character, which nothing can write or draw
        json.dumps(data, ensure_ascii=False).encode()
    return data


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError where it is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError, RuntimeError) as error:  # the last: too large for memory
        raise ValueError(f"{path} cannot be read: {error}") from error


def restored(schema: type[Config], data: Any, where: str) -> Config:
    """A dataclass from what a file says of it, each field of its declared type.

    >>> from circuits import EAP
    >>> restored(EAP, {"name": "eap"}, "circuit.json: method")
    EAP(name='eap', rule='plain')

    Raises:
        ValueError: it is no mapping, names a field that there is not, or a value is of another
            type.
    """
    from beartype import BeartypeConf
    from beartype.door import is_bearable

    tower = BeartypeConf(is_pep484_tower=True)  # 1 may stand where a float is declared
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} is {quote(data)}, but it must be a mapping")
    hints = get_type_hints(schema)
    known = [field.name for field in fields(schema)]  # pyright: ignore[reportArgumentType]
    values = {}
    for name, value in data.items():
        if name not in known:
            raise ValueError(f"{where}.{name} is unknown; the fields are {', '.join(known)}")
        if isinstance(nested := hints[name], type) and is_dataclass(nested):
            value = restored(nested, value, f"{where}.{name}")
        hint: Any = hints[name]
        if not is_bearable(value, hint, conf=tower):
            declared = hint.__name__ if isinstance(hint, type) else str(hint)
            raise ValueError(f"{where}.{name} is {quote(value)}, but it must be {declared}")
        values[name] = value
    return schema(**values)


def restored_tensors(schema: type[Config], tensors: Mapping[str, Tensor], **sizes: int) -> Config:
    """A dataclass of tensors from what a file holds, each of its declared kind and shape.

    >>> from circuits.ablation.means import Means
    >>> rows, count = torch.zeros(3, 2), torch.ones(4, dtype=torch.int64)
    >>> state = {"first": rows, "rest": rows, "positional": torch.zeros(3, 4, 2), "count": count}
    >>> len(restored_tensors(Means, state, W=3, D=2).count)
    4

    Args:
        schema: its fields are annotated by jaxtyping.
        tensors: by the names of the fields.
        sizes: of axes that are known.

    Raises:
        TypeError: a tensor is missing or too many, is of another type or shape, or not finite.
    """
    hints = {field.name: get_type_hints(schema)[field.name] for field in fields(schema)}  # pyright: ignore[reportArgumentType]
    if other := sorted(set(hints) ^ set(tensors)):
        raise TypeError(f"{other[0]} is {'missing' if other[0] in hints else 'not known'}")
    with jaxtyped("context"):  # in which the name of an axis has one size
        for axis, size in sizes.items():
            assert isinstance(torch.empty(size, device="meta"), Shaped[Tensor, axis])  # pyright: ignore
        for name, tensor in tensors.items():
            if not isinstance(tensor, hints[name]):
                raise TypeError(
                    f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, but it must be "
                    f"{hints[name].__name__}" + "".join(f", {a}={n}" for a, n in sizes.items())
                )
            refuse_not_finite(name, tensor)
    return schema(**tensors)


def refuse_not_finite(name: str, tensor: Tensor) -> None:
    """Raises TypeError where a tensor holds no numbers that can be computed with."""
    if not torch.isfinite(tensor).all():
        raise TypeError(f"{name} is not finite")


def write_text(path: Path, text: str) -> None:
    """Writes a text file as a whole."""
    partial = _beside(path)
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Writes data that people may read."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file as a whole."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = _beside(path)
    try:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, partial)
        follow_umask(partial)
        partial.replace(path)
    except SafetensorError as error:  # no space, no permission
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def follow_umask(path: Path) -> None:
    """Gives a file the permissions that new files have here: safetensors makes them private."""
    new = path.with_name(f"{path.name}.new")
    new.touch()
    path.chmod(new.stat().st_mode)
    new.unlink()


def is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file or folder still stands at a path, and was not moved or replaced."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")
