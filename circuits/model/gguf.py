"""GGUF files, as llama.cpp writes them: what is looked at before they are read, and reading them.

transformers turns the metadata that it knows into a configuration and passes over the rest, tensors
included, so that a model which needs them becomes another one.  What is passed over is refused
here by name, and what was made of the rest is compared with the file.  Quantised weights are
computed with as float32, each the value that its block stands for.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from circuits.model.huggingface import REPORTED, quietly, refuse_keys
from circuits.model.refusals import first_line
from circuits.model.stored import WEIGHT_FILES

log = logging.getLogger(__name__)

# What a file's `general.architecture` is in transformers, of those proved equal to it by a test.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Metadata of an architecture, and what transformers' configuration calls it.
_FIELDS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_OPTIONAL = {
    *("attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("rope.dimension_count", "rope.freq_base", "vocab_size"),
}
_SIZES = {
    *("block_count", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
    "rope.dimension_count",
}
# Other metadata of an architecture that changes nothing where it has this value.
_INERT = {"rope.scaling.type": "none", "attention.causal": True, "rope.scaling.factor": 1.0}
_FREQUENCY_BASE = 10000.0  # where a file states none
_FLOAT = ("F32", "F16", "BF16")  # held by float32 as they are
_BROKEN = (ValueError, KeyError, IndexError, OverflowError, struct.error, MemoryError, OSError)


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path is, or that a folder holds in place of HuggingFace weights.

    Raises:
        FileNotFoundError: a path of this kind that is no file.
        ValueError: a folder of several.
    """
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"no GGUF file at {path}")
        return path
    if not path.is_dir() or any((path / name).is_file() for name in WEIGHT_FILES):
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise ValueError(
            f"{path} holds {len(found)} GGUF files; name one of them, such as model={found[0]}"
        )
    return found[0] if found else None


def read_gguf(path: Path) -> tuple[Any, Any | None]:
    """The module of a GGUF file in float32 on the CPU, and its tokenizer if it holds one.

    Raises:
        ValueError: the package gguf is missing, the file is broken or one part of a model, or it is
            of another architecture or holds what transformers would leave out.
    """
    # Beside other files transformers would read those too: adapters, settings of a tokenizer.
    with tempfile.TemporaryDirectory() as alone, _read_once(path):
        link = Path(alone) / path.name
        link.symlink_to(path.resolve())
        file = _contents(path, link)
        own = _own_fields(path, file)
        options = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
        try:
            with quietly(), contextlib.redirect_stderr(io.StringIO()):  # a progress bar of its own
                module, report = _module(alone, own, options)
                tokenizer = _tokenizer(alone, file, options)
        except BaseException as error:  # what a file's values raise there cannot be listed
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise  # Ctrl-C; a panic is what the tokenizers package makes of a bad vocabulary
            raise ValueError(f"{path} cannot be loaded: {first_line(error)}") from error
    refuse_keys(str(path), module, report)
    _refuse_misread(path, own, module)
    _refuse_left_out(path, file.types, module)
    _forget_origin(path, module)
    if quantised := sorted(set(file.types.values()) - set(_FLOAT)):
        log.warning(
            "%s: the weights are stored as %s; they are computed with as float32, each the value "
            "that it stands for",
            path.name,
            ", ".join(quantised),
        )
    return module, tokenizer


@dataclass(frozen=True)
class _File:
    """What stands in a file beside the weights themselves."""

    fields: Mapping[str, Any]  # metadata; of a tokenizer's only that it is there
    types: Mapping[str, str]  # of each tensor
    largest: int  # size of any tensor along any axis, or number of tensors


@contextlib.contextmanager
def _read_once(path: Path) -> Iterator[None]:
    """Parses a file once; else transformers does for each of configuration, weights and tokenizer,
    and makes the table of names for each of a model's modules: most of the time to load a small
    one."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            f"{path} needs the package gguf, which is not installed: pip install 'madcap[gguf]'"
        ) from error
    own = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    gguf.GGUFReader = functools.cache(_careful_reader())
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(gguf, name, function)


def _careful_reader() -> type:
    """gguf's reader, but it stops where a broken file ends, in the middle of whatever it says."""
    from gguf import GGUFReader

    class Careful(GGUFReader):
        @property
        def data(self) -> np.ndarray:
            return self._data

        @data.setter
        def data(self, mapped: np.ndarray) -> None:
            self._data = mapped.view(np.ndarray)  # slices of memory maps are slow to make

        def _get(self, offset, dtype, count=1, override_order=None) -> np.ndarray:
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self._data):
                raise ValueError(f"it ends after {len(self._data)} bytes, before what it states")
            return super()._get(offset, dtype, count, override_order)

    return Careful


def _contents(path: Path, link: Path) -> _File:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(link))  # as transformers asks for it
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("tokenizer.")
        }
        fields |= {name: True for name in reader.fields if name.startswith("tokenizer.")}
        types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        sizes = (int(size) for tensor in reader.tensors for size in tensor.shape)
        return _File(fields, types, max(len(types), *sizes))
    except _BROKEN as error:
        raise ValueError(
            f"{path} is no GGUF file that can be read, perhaps it was cut short; download it again "
            f"({first_line(error)})"
        ) from error


def _own_fields(path: Path, file: _File) -> dict[str, Any]:
    """What a file says of its architecture, without that name in front; refuses what is ignored."""
    fields = file.fields
    name = fields.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(
            f"{path}: general.architecture={name!r}, but of GGUF files only "
            f"{', '.join(ARCHITECTURES)} are read; give the model's HuggingFace folder"
        )
    if parts := fields.get("split.count"):
        raise ValueError(
            f"{path} is one of {parts} parts of a model; join them with llama-gguf-split --merge"
        )
    own = {
        key.removeprefix(f"{name}."): value
        for key, value in fields.items()
        if key.startswith(f"{name}.")
    }
    if missing := sorted(_FIELDS.keys() - _OPTIONAL - own.keys()):
        raise ValueError(f"{path} does not state {name}.{missing[0]}; convert the model again")
    for key, value in own.items():
        _check_field(f"{path}: {name}.{key}={value!r}", key, value, file.largest)
    return {"architecture": name, "rope.freq_base": _FREQUENCY_BASE, **own}


def _check_field(what: str, key: str, value: Any, largest: int) -> None:
    """Refuses what would be left out, and sizes that would fill the memory before they are found
    not to be those of the tensors."""
    if key not in _FIELDS and value and _INERT.get(key) != value:
        raise ValueError(
            f"{what} is left out when GGUF files are read, which would make another model; give "
            "its HuggingFace folder"
        )
    if key in _SIZES and not (isinstance(value, int) and 0 < value <= largest):
        raise ValueError(
            f"{what}, but it must be between 1 and {largest}, which is what the tensors hold; "
            "download it again, or give its HuggingFace folder"
        )


def _module(folder: str, own: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[Any, Any]:
    """The module, and transformers' report on what fitted."""
    from transformers import AutoModelForCausalLM

    width = own.get("attention.key_length", own.get("rope.dimension_count"))
    stated = {} if width is None or own["architecture"] == "qwen2" else {"head_dim": width}
    return AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportReturnType]
        folder,
        **options,
        **stated,
        **REPORTED,
        dtype=torch.float32,
    )


def _tokenizer(folder: str, file: _File, options: Mapping[str, Any]) -> Any | None:
    from transformers import AutoTokenizer

    if "tokenizer.ggml.model" not in file.fields:
        return None
    return AutoTokenizer.from_pretrained(folder, **options)


def _refuse_misread(path: Path, own: Mapping[str, Any], module: Any) -> None:
    """Refuses a module that is not what its file says it is."""
    config = module.config
    made = {**config.to_dict(), "rope_theta": (config.rope_parameters or {}).get("rope_theta")}
    if not made.get("head_dim"):
        made["head_dim"] = config.hidden_size // config.num_attention_heads
    wrong = [
        f"{key}={own[key]!r} became {name}={made[name]!r}"
        for key, name in _FIELDS.items()
        if key in own and own[key] != made[name]
    ]
    if type(module).__name__ != (expected := ARCHITECTURES[own["architecture"]]):
        wrong.insert(0, f"{expected} became {type(module).__name__}")
    if wrong:
        raise ValueError(
            f"{path} is read as another model: {wrong[0]}; give its HuggingFace folder"
        )


def _refuse_left_out(path: Path, types: Mapping[str, str], module: Any) -> None:
    """Refuses tensors for which the module has no place."""
    import gguf

    names = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(
        names[module.config.model_type], module.config.num_hidden_layers
    )
    placed = {table.get_name(name, (".weight", ".bias")) for name in module.state_dict()}
    if left := sorted(types.keys() - placed):
        first = next((name for name in left if name.startswith("rope_freqs")), left[0])
        what = " (it rescales rotary frequencies)" if first.startswith("rope_freqs") else ""
        raise ValueError(
            f"{path}: {len(left)} tensors are left out when GGUF files are read, the first is "
            f"{first}{what}, which would make another model; give its HuggingFace folder"
        )


def _forget_origin(path: Path, module: Any) -> None:
    """Takes away what tells of a quantised file, as the module's weights are plain ones."""
    for name in ("quantization_config", "_model_name_or_path", "unk_token_id"):
        module.config.__dict__.pop(name, None)
    module.config.name_or_path = str(path)
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        module.__dict__.pop(name, None)
