"""What weight files hold: names and dtypes, known without reading the values, and single tensors.

safetensors say both in their header; pickles are unpickled without their values, and never run
code.
"""

from __future__ import annotations

import functools
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from circuits.model.refusals import first_line

# The weights of a folder, in the order in which transformers looks for them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# safetensors' names; those of eight bits are exact in float32.
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float32,
    "F8_E5M2": torch.float32,
}
_SCALES = {torch.float8_e4m3fn: torch.float32, torch.float8_e5m2: torch.float32}
# Constants that old versions of transformers stored beside the weights.
_MASKS = (".bias", ".causal_mask", ".mask")
_MASKED = (".masked_bias", ".mask_value")


def weight_files(source: str, options: Mapping[str, Any]) -> list[Path]:
    """The weight files of a folder or a hub name that transformers would read, all shards."""
    from transformers.utils.hub import cached_file

    quiet = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    local = {"local_files_only": options["local_files_only"]}
    for name in WEIGHT_FILES:
        found = cached_file(source, name, **local, **quiet)
        if found is None:
            continue
        if not name.endswith(".json"):
            return [Path(found)]
        shards = (cached_file(source, shard, **local) for shard in sorted(shards_of(Path(found))))
        return [Path(shard) for shard in shards if shard is not None]
    return []


def shards_of(index: Path) -> dict[str, set[str]]:
    """The files that an index names, each with its tensors; ValueError where it is no index."""
    try:
        content = json.loads(index.read_text())
        places, _ = content["weight_map"].items(), content["metadata"]  # which transformers wants
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{index} is no index of shards ({first_line(error)}); download it again"
        ) from error
    shards: dict[str, set[str]] = {}
    for tensor, name in places:
        shards.setdefault(name, set()).add(tensor)
    return shards


def stored_dtypes(files: Iterable[Path]) -> dict[str, torch.dtype | None]:
    """The dtype of each tensor in some files, None where it is not a float type.

    Raises:
        ValueError: a file holds no tensors that can be read.
    """
    from safetensors import safe_open

    dtypes: dict[str, torch.dtype | None] = {}
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    dtypes[name] = _FLOATS.get(file.get_slice(name).get_dtype())
        else:
            for name, tensor in pickled(path, "meta", mapped=True).items():
                dtype = _SCALES.get(tensor.dtype, tensor.dtype)
                dtypes[name] = dtype if dtype.is_floating_point else None
    return dtypes


def widest(dtypes: Iterable[torch.dtype | None]) -> torch.dtype:
    """The narrowest dtype that holds all values of some dtypes; float32 where there are none.

    >>> widest([torch.bfloat16, torch.bfloat16]), widest([torch.bfloat16, torch.float16])
    (torch.bfloat16, torch.float32)
    """
    floats = [dtype for dtype in dtypes if dtype is not None]
    return functools.reduce(torch.promote_types, floats) if floats else torch.float32


def pickled(path: Path, device: str = "cpu", *, mapped: bool = False) -> dict[str, Tensor]:
    """The state dict that torch.save wrote; nothing in it can run code.

    Where `mapped`, values are read from the file when they are asked for, if its format allows.

    Raises:
        ValueError: it is broken, needs code to be read, or holds something else.
    """
    try:
        mapped = mapped and zipfile.is_zipfile(path)
        tensors = torch.load(path, weights_only=True, map_location=device, mmap=mapped)
    except Exception as error:
        # torch's own message advises weights_only=False, with which a file can run code.
        raise ValueError(
            f"{path} holds no tensors that can be read ({type(error).__name__}); it is broken, or "
            "would run code: download it again, or save the state dict alone, as safetensors"
        ) from None
    if isinstance(tensors, Mapping) and all(isinstance(one, Tensor) for one in tensors.values()):
        return {str(name): tensor for name, tensor in tensors.items()}
    raise ValueError(
        f"{path} holds no state dict, which is a mapping from names to tensors; save that alone"
    )


def constants(module: nn.Module, files: Iterable[Path], names: Iterable[str]) -> set[str]:
    """Which of some stored tensors are no weights, but constants of an old version of the model.

    Those are causal masks (a lower triangle of ones, or equal to a buffer of the module that has
    their name), and the large negative number that masked scores were set to.
    """
    buffers = dict(module.named_buffers())
    tensors = _stored_tensors(files, set(names))
    return {name for name, one in tensors.items() if _is_constant(name, one, buffers.get(name))}


def _is_constant(name: str, tensor: Tensor, buffer: Tensor | None) -> bool:
    if buffer is not None and buffer.shape == tensor.shape:
        return torch.equal(buffer.float(), tensor.float())
    if name.endswith(_MASKED):
        return tensor.numel() == 1 and tensor.item() <= -1e4
    square = tensor.ndim >= 2 and tensor.shape[-1] == tensor.shape[-2] == tensor.numel() ** 0.5
    return name.endswith(_MASKS) and square and torch.equal(tensor, torch.ones_like(tensor).tril())


def _stored_tensors(files: Iterable[Path], names: set[str]) -> dict[str, Tensor]:
    from safetensors import safe_open

    tensors: dict[str, Tensor] = {}
    for path in files if names else ():
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in names & set(file.keys())}
        else:
            tensors |= {
                name: one for name, one in pickled(path, mapped=True).items() if name in names
            }
    return tensors
