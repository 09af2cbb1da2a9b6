"""HuggingFace folders and hub names: what is looked at before weights are read, and reading them.

config.json is read first and refused without touching the weights; then the weight files, of which
safetensors tell their tensors in the header; then transformers' own report on what it loaded.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from circuits.model.refusals import first_line, refuse_configuration
from circuits.model.stored import (
    WEIGHT_FILES,
    constants,
    shards_of,
    stored_dtypes,
    weight_files,
    widest,
)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
# A report of what did not fit instead of an error.
REPORTED = {"output_loading_info": True, "ignore_mismatched_sizes": True}


def read_module(source: str, *, local: bool) -> Any:
    """The module of a folder or a hub name as it was saved, in its files' dtype on the CPU.

    What config.json says of the dtype does not count; of several the module has the widest.

    Raises:
        FileNotFoundError: no such model, no config.json, no weights or not all of their shards.
        ValueError: an adapter, a configuration that is refused, broken weights, or other ones.
    """
    from transformers import AutoModelForCausalLM

    options = _options(local)
    if local:
        _refuse_no_model(Path(source))
    _check_configuration(source, options)
    if local:
        _refuse_incomplete(Path(source))
    files = weight_files(source, options)
    dtypes = stored_dtypes(files)
    options["dtype"] = widest(dtypes.values())
    try:
        with quietly():
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, **options, **REPORTED)
    except Exception as error:  # what the values in a configuration raise there cannot be listed
        raise ValueError(
            f"{source}: the weights cannot be loaded with their configuration: {_told(error)}"
        ) from error
    module, report = loaded
    refuse_keys(source, module, report, files)
    _refuse_whole_numbers(source, module, dtypes)
    return module


def read_tokenizer(source: str, *, local: bool) -> Any | None:
    """The tokenizer of a model; None for a folder that has none."""
    from transformers import AutoTokenizer

    if local and not any((Path(source) / name).is_file() for name in TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(source, **_options(local))


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' progress bar and report, which are for terminals."""
    import logging as standard

    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(standard.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _options(local: bool) -> dict[str, Any]:
    return {"local_files_only": local, "trust_remote_code": False}


def _check_configuration(source: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError for a configuration that is refused, or cannot be read."""
    from transformers import AutoConfig, PreTrainedConfig

    with _reading_configuration(source, options):
        fields, _ = PreTrainedConfig.get_config_dict(source, **options)
        if not isinstance(fields, Mapping):
            raise TypeError("it holds no mapping")
    refuse_configuration(source, fields)
    with _reading_configuration(source, options):
        AutoConfig.from_pretrained(source, **options)


@contextlib.contextmanager
def _reading_configuration(source: str, options: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # what values raise there cannot be listed
        if options["local_files_only"] or not isinstance(error, OSError):
            raise ValueError(
                f"{source}: config.json is no HuggingFace configuration: {_told(error)}"
            ) from error
        raise FileNotFoundError(
            f"model {source!r} is no folder here and could not be had from the HuggingFace hub; "
            f"check the name and the network, or give a local folder ({str(error).splitlines()[0]})"
        ) from error


def _told(error: Exception) -> str:
    """What an error says; with its kind, where it says only a key or an index."""
    said = first_line(error)
    return said if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {said}"


def _refuse_no_model(folder: Path) -> None:
    """Refuses folders of adapters, and folders of no HuggingFace model."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds adapter_config.json, an adapter that is not merged into its model; "
            "merge it first (PeftModel.merge_and_unload()) and save the whole, or delete the file "
            "if the weights are merged already"
        )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no config.json, so it is no HuggingFace model folder"
        )


def _refuse_incomplete(folder: Path) -> None:
    """Refuses weights that are not all there; of safetensors files only the headers are read."""
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{folder} holds no weights ({' or '.join(WEIGHT_FILES)}); download or save them there"
        )
    shards = shards_of(path) if path.suffix == ".json" else {path.name: set()}
    for name, wanted in sorted(shards.items()):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} lacks {name}, one of the {len(shards)} shards that {path.name} names; "
                "download it again"
            )
        if lacking := sorted(wanted - _tensor_names(folder / name, wanted)):
            raise ValueError(
                f"{folder / name} lacks {len(lacking)} of the {len(wanted)} tensors that "
                f"{path.name} places there, the first is {lacking[0]}; download or save the model "
                "again"
            )


def _tensor_names(path: Path, wanted: set[str]) -> set[str]:
    """The tensors in a file; of a pickle, which is not read to know them, all that are wanted."""
    from safetensors import SafetensorError, safe_open

    broken = f"{path} is no file of tensors, perhaps it was cut short; download or save it again"
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return set(file.keys())
        except SafetensorError as error:
            raise ValueError(f"{broken} ({first_line(error)})") from error
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped and not zipfile.is_zipfile(path) or not path.stat().st_size:
        raise ValueError(broken)
    return wanted


def refuse_keys(
    source: str, module: Any, report: Mapping[str, Any], files: Sequence[Path] = ()
) -> None:
    """Refuses weights of other names or shapes than their configuration's."""
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        found = sorted(map(str, report.get(problem) or ()))
        if problem == "unexpected_keys":
            ignored = constants(module, files, found)
            found = [name for name in found if name not in ignored]
        if not found:
            continue
        remedy = "is config.json of this model? Otherwise download or save the model again"
        if problem == "missing_keys" and found[0] in (type(module)._tied_weights_keys or ()):
            remedy = "if it is the input embedding's, set tie_word_embeddings=True in config.json"
        raise ValueError(
            f"{source}: the weights do not fit the configuration: {len(found)} "
            f"{problem.replace('_', ' ')}, the first is {found[0]}; {remedy}"
        )


def _refuse_whole_numbers(
    source: str, module: Any, dtypes: Mapping[str, torch.dtype | None]
) -> None:
    """Refuses weights that are stored as whole numbers, whose scale is not known."""
    for name, _ in module.named_parameters():
        if name in dtypes and dtypes[name] is None:
            raise ValueError(
                f"{source}: {name} is not stored as a float type, so it is quantised or broken; "
                "dequantise the model and save it in float"
            )
