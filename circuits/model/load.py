"""Loads a model as a TransformerLens bridge, with what is needed to check and to identify it.

Four sources: a HuggingFace hub name, a local HuggingFace folder, a TransformerLens state dict
(`X.pt` or `X.safetensors`) beside its `X.config.json`, and an `nn.Module` already in memory.
Wrapping changes a HuggingFace module (GPT-2's q, k and v are split off), so the logits of the
unwrapped model on random tokens are taken first, its tensors are hashed first, and a model handed
over in memory is copied first.  Parameters
come back frozen: call `bridge.requires_grad_()` to train them.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.resources
import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuits.model.output_head import OutputHead, load_output_head
from circuits.model.refusals import (
    first_line,
    refuse_configuration,
    refuse_dtype,
    refuse_folder,
    refuse_keys,
    refuse_module,
    refuse_parameters,
    refuse_weight_files,
)

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass
class ModelConfig:
    """Which model to load, and how."""

    # hub name, HuggingFace folder, X.pt | X.safetensors beside X.config.json, or pkg://PACKAGE/...
    path: str = "???"
    device: str = "cpu"  # any torch device
    dtype: str = "float32"  # float32, float64, bfloat16 or float16; scores are float32 all the same
    prepend_bos: bool | None = (
        None  # begin each text with the tokenizer's BOS; null: as the tokenizer itself does
    )
    split_input: bool = False  # token and position embeddings as two writers
    head: str | None = (
        None  # X.safetensors with weight [outputs, d_model] and bias, read in place of the LM head
    )


@dataclass(frozen=True)
class LoadedModel:
    """A bridge, where it came from, and what its source computed before it was wrapped."""

    bridge: Any  # transformer_lens TransformerBridge
    hf_config: Any | None  # None for TransformerLens native models
    tokenizer: Any | None
    path: str
    weight_hash: str  # of the source tensors, before any cast
    prepend_bos: bool
    probe_tokens: Int[Tensor, "B S"]
    probe_logits: Float[Tensor, "B S V"]
    split_input: bool = False  # the engine takes token and position embeddings as two writers
    head: OutputHead | None = None  # read in place of the model's own

    @property
    def context(self) -> int:
        return self.bridge.cfg.n_ctx

    @property
    def vocabulary(self) -> int:
        return self.bridge.cfg.d_vocab

    @property
    def outputs(self) -> int:
        """How many logits there are: answers are below this."""
        own = getattr(self.bridge.cfg, "d_vocab_out", -1)
        return self.head.outputs if self.head is not None else own if own > 0 else self.vocabulary


def load_model(config: ModelConfig) -> LoadedModel:
    """Returns the model that a configuration names.

    Raises: FileNotFoundError: the file or folder is missing, or a hub name cannot be reached.
        ValueError: a device or dtype that cannot be computed with, weights that do not fit their
        configuration, or
            a model that is refused (`circuits.model.refusals`).
    """
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype={config.dtype!r}, but it must be one of {', '.join(DTYPES)}")
    _check_device(config.device)
    refuse_dtype(DTYPES[config.dtype], torch.device(config.device))
    path = local_path(config.path)
    if path.suffix in (".pt", ".pth", ".safetensors"):
        return _with_options(_load_transformer_lens(path, config), config)
    if not path.exists() and (
        config.path.startswith((".", "/", "~", "pkg://")) or config.path.count("/") > 1
    ):
        raise FileNotFoundError(
            f"no model at {config.path}: give a HuggingFace folder, X.pt with X.config.json, or a "
            "hub name"
        )
    loaded = _load_huggingface(path if path.exists() else None, config)
    return _with_options(loaded, config)


def _with_options(loaded: LoadedModel, config: ModelConfig) -> LoadedModel:
    """The model with its head, which counts as weights, and its input writers."""
    loaded = replace(loaded, split_input=config.split_input)
    if config.head is None:
        return loaded
    head = load_output_head(local_path(config.head))
    digest = hashlib.sha256(
        (loaded.weight_hash + weight_hash(head.state_dict())).encode()
    ).hexdigest()
    return replace(loaded, head=head, weight_hash=digest)


def _check_device(name: str) -> None:
    """Raises ValueError when there is no such device here."""
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={name!r} cannot be used here ({first_line(error)}); use cpu, or another "
            "machine"
        ) from error
    if device.type == "meta":
        raise ValueError("device='meta' holds no values to compute with; use cpu")


def local_path(path: str) -> Path:
    """A path as written, with `~` and `pkg://PACKAGE/...` (a file shipped inside an installed
    package) resolved.
    """
    if path.startswith("pkg://"):
        package, _, inside = path.removeprefix("pkg://").partition("/")
        return Path(str(importlib.resources.files(package))) / inside
    return Path(path).expanduser()


def from_module(
    module: nn.Module,
    *,
    tokenizer: Any | None = None,
    path: str = "memory",
    prepend_bos: bool | None = None,
) -> LoadedModel:
    """Returns a HuggingFace module in memory as a loaded model; the module itself is copied, not
    touched.

    Raises: ValueError: the module has no HuggingFace configuration, or is refused
        (`circuits.model.refusals`).
    """
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise ValueError(
            f"{type(module).__name__} has no HuggingFace configuration; for other modules build a "
            "TransformerLens "
            "bridge and use from_bridge"
        )
    refuse_module(path, module)
    return _wrap(
        copy.deepcopy(module), weight_hash(module.state_dict()), tokenizer, path, prepend_bos
    )


def from_bridge(bridge: Any, *, tokenizer: Any | None = None, path: str = "memory") -> LoadedModel:
    """Returns a TransformerLens native bridge as a loaded model.

    Raises: ValueError: the bridge wraps another kind of model, whose source is no longer at hand to
        compare with; or
            its parameters have no values, are not finite or of several dtypes.
    """
    if bridge.cfg.architecture != "TransformerLensNative":
        raise ValueError(
            f"from_bridge takes TransformerLens native bridges, not {bridge.cfg.architecture!r}: "
            "wrapping has already "
            "changed the module; hand the module itself to from_module, or its folder to load_model"
        )
    refuse_parameters(path, bridge.original_model)
    return _finish(bridge, None, weight_hash(bridge.state_dict()), tokenizer, path, False, None)


def weight_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, types, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _load_huggingface(folder: Path | None, config: ModelConfig) -> LoadedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = config.path if folder is None else str(folder)
    options = {"local_files_only": folder is not None, "trust_remote_code": False}
    if folder is not None:
        refuse_folder(folder)
    _check_configuration(source, options)
    if folder is not None:
        refuse_weight_files(folder)
    try:
        with _quietly():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype="auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
            module, report = loaded
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{source}: the weights cannot be loaded with their configuration: {first_line(error)}"
        ) from error
    refuse_keys(source, module, report)
    digest = weight_hash(module.state_dict())
    _place(module, config)
    refuse_module(source, module)
    tokenizer = None
    if folder is None or any(
        (folder / name).is_file()
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    ):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    return _wrap(module, digest, tokenizer, config.path, config.prepend_bos)


def _check_configuration(source: str, options: Mapping[str, bool]) -> None:
    """Raises ValueError for a configuration that is refused or none, FileNotFoundError where it
    cannot be had.
    """
    from transformers import AutoConfig, PreTrainedConfig

    with _reading_configuration(source, local=options["local_files_only"]):
        fields, _ = PreTrainedConfig.get_config_dict(source, **options)
        if not isinstance(fields, Mapping):
            raise TypeError("it holds no mapping")
    refuse_configuration(source, fields)
    with _reading_configuration(source, local=options["local_files_only"]):
        AutoConfig.from_pretrained(source, **options)


@contextlib.contextmanager
def _reading_configuration(source: str, *, local: bool) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        if local or not isinstance(error, OSError):
            raise ValueError(
                f"{source}: config.json is no HuggingFace configuration: {first_line(error)}"
            ) from error
        raise FileNotFoundError(
            f"model {source!r} is no folder here and could not be had from the HuggingFace hub; "
            f"check the name and the network, or give a local folder ({str(error).splitlines()[0]})"
        ) from error


def _load_transformer_lens(path: Path, config: ModelConfig) -> LoadedModel:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint

    if config.prepend_bos:
        raise ValueError(
            f"prepend_bos=true, but {path.name} comes without a tokenizer to name BOS; put it in "
            "the prompts"
        )
    config_path = path.with_name(path.name.removesuffix(path.suffix) + ".config.json")
    for needed in (path, config_path):
        if not needed.is_file():
            raise FileNotFoundError(
                f"no file {needed}; a TransformerLens model is X{path.suffix} beside X.config.json"
            )
    tensors = _state_dict(path)
    try:
        fields = json.loads(config_path.read_text())
        fixed = {"architecture": "TransformerLensNative", "device": config.device}
        native = TransformerBridgeConfig(**{**fields, **fixed})
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{config_path} is no TransformerLens configuration: {first_line(error)}"
        ) from error
    if rotary := [name for name in tensors if name.endswith((".rotary_sin", ".rotary_cos"))]:
        raise ValueError(
            f"{path}: legacy rotary checkpoints are refused ({rotary[0]}): TransformerLens 4 "
            "rotates other pairs of "
            "coordinates than they were trained with"
        )
    if whole := [
        name
        for name, tensor in tensors.items()
        if tensor.dtype not in (*DTYPES.values(), torch.bool)
    ]:
        raise ValueError(
            f"{path}: {whole[0]} holds {tensors[whole[0]].dtype}, but weights must be "
            f"{', '.join(DTYPES)}; "
            "dequantise them and save in float"
        )
    digest = weight_hash(tensors)
    legacy = any(name.endswith((".W_E", ".W_Q")) for name in tensors)
    try:
        bridge: Any = TransformerBridge.boot_native(native)  # pyright: ignore[reportAttributeAccessIssue]
        bridge.load_state_dict(
            convert_tl_checkpoint(tensors, bridge.cfg) if legacy else tensors, strict=True
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: the weights do not fit {config_path.name}: {first_line(error)}"
        ) from error
    _place(bridge.original_model, config)  # bridge.to() prints
    bridge.cfg.dtype = DTYPES[config.dtype]
    refuse_parameters(str(path), bridge.original_model)
    return _finish(bridge, None, digest, None, config.path, False, None)


def _state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; nothing in it can run code."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        # torch's own message advises weights_only=False, with which a file can run code: not
        # repeated.
        raise ValueError(
            f"{path} holds no tensors that can be read ({type(error).__name__})"
        ) from None
    if not isinstance(tensors, Mapping) or not all(
        isinstance(tensor, Tensor) for tensor in tensors.values()
    ):
        raise ValueError(
            f"{path} holds no state dict, which is a mapping from names to tensors; save that alone"
        )
    return dict(tensors)


def _place(module: nn.Module, config: ModelConfig) -> None:
    """Moves a model to its device and dtype; derived buffers, such as rotary frequencies, keep
    their precision.
    """
    derived = [
        (part, name, buffer)
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name in part._non_persistent_buffers_set
    ]
    module.to(device=config.device, dtype=DTYPES[config.dtype])
    for part, name, buffer in derived:
        setattr(part, name, buffer.to(config.device))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' progress bar and report, which are for terminals; what they say is
    checked by us.
    """
    from logging import CRITICAL

    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _wrap(
    module: nn.Module, digest: str, tokenizer: Any | None, path: str, prepend_bos: bool | None
) -> LoadedModel:
    """Takes the module's own logits, then wraps it (which changes it)."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    module = module.eval()
    hf_config: Any = module.config
    tokens = _probe(
        hf_config.vocab_size, hf_config.max_position_embeddings, next(module.parameters()).device
    )
    with torch.no_grad():
        logits = module(tokens).logits
    bridge = build_bridge_from_module(
        module, architecture=type(module).__name__, hf_config=hf_config, tokenizer=tokenizer
    )
    if prepend_bos is None:
        prepend_bos = tokenizer is not None and _prepends_bos(tokenizer)
    return _finish(bridge, hf_config, digest, tokenizer, path, prepend_bos, (tokens, logits))


def _finish(
    bridge: Any,
    hf_config: Any | None,
    digest: str,
    tokenizer: Any | None,
    path: str,
    prepend_bos: bool,
    probe: tuple[Tensor, Tensor] | None,
) -> LoadedModel:
    bridge.eval().requires_grad_(False)
    if probe is None:
        tokens = _probe(bridge.cfg.d_vocab, bridge.cfg.n_ctx, next(bridge.parameters()).device)
        with torch.no_grad():
            probe = tokens, bridge.original_model(tokens)
    return LoadedModel(bridge, hf_config, tokenizer, path, digest, prepend_bos, *probe)


def _probe(vocabulary: int, context: int, device: torch.device) -> Int[Tensor, "B S"]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (2, min(context, 16)), generator=generator).to(device)


def _prepends_bos(tokenizer: Any) -> bool:
    tokens = tokenizer.encode("a")
    return len(tokens) > 1 and tokens[0] == tokenizer.bos_token_id
