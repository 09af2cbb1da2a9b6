"""TransformerLens state dicts: X.pt or X.safetensors beside X.config.json, to a native bridge.

The tensors have HookedTransformer's names (`embed.W_E`), or those of the bridge itself.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuits.model.legacy import (
    has_legacy_names,
    known_fields,
    native_weights,
    set_scales,
    with_output_biases,
)
from circuits.model.refusals import first_line
from circuits.model.stored import pickled

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}


def read_bridge(path: Path, device: str) -> tuple[Any, dict[str, Tensor]]:
    """The native bridge of a state dict, and the tensors as they are in the file.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: no tensors, other ones than the configuration's, not float, or legacy rotary.
    """
    from transformer_lens.config import TransformerBridgeConfig

    config_path = path.with_name(path.name.removesuffix(path.suffix) + ".config.json")
    for needed in (path, config_path):
        if not needed.is_file():
            raise FileNotFoundError(
                f"no file {needed}; a TransformerLens model is X{path.suffix} beside X.config.json"
            )
    tensors = _tensors(path)
    try:
        fields = json.loads(config_path.read_text())
        if not isinstance(fields, dict):
            raise TypeError("it holds no mapping")
        fields = known_fields(fields, legacy=has_legacy_names(tensors))
        # The weights have their own dtype, and are not drawn.
        fixed = {"architecture": "TransformerLensNative", "dtype": None, "init_weights": False}
        config = TransformerBridgeConfig(**{**fields, **fixed, "device": device})
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{config_path} is no TransformerLens configuration that can be computed: "
            f"{first_line(error)}"
        ) from error
    _refuse_tensors(path, tensors)
    try:
        return _filled(config, tensors), tensors
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: the weights do not fit {config_path.name}: {first_line(error)}"
        ) from error


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; nothing in it can run code."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        return pickled(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} holds no tensors that can be read ({first_line(error)}); download it again"
        ) from error


def _refuse_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuses rotary tables of HookedTransformer's time, and tensors of no float type."""
    if rotary := [name for name in tensors if name.endswith((".rotary_sin", ".rotary_cos"))]:
        raise ValueError(
            f"{path}: legacy rotary checkpoints are refused ({rotary[0]}): TransformerLens 4 "
            "rotates other pairs of coordinates than they were trained with"
        )
    for name, tensor in tensors.items():
        if tensor.dtype not in (*DTYPES.values(), torch.bool):
            raise ValueError(
                f"{path}: {name} holds {tensor.dtype}, but weights must be {', '.join(DTYPES)}; "
                "dequantise them and save in float"
            )


def _filled(config: Any, tensors: dict[str, Tensor]) -> Any:
    """A native bridge of this configuration with these weights, in float64 if one of them is."""
    from transformer_lens.model_bridge import TransformerBridge

    # The native model takes no scale of 1, nor of each layer: the scales are set below.
    plain = copy.copy(config)
    plain.use_attn_scale, plain.attn_scale = True, -1.0
    bridge: Any = TransformerBridge.boot_native(plain)  # pyright: ignore[reportAttributeAccessIssue]
    for field in ("use_attn_scale", "attn_scale"):
        setattr(bridge.cfg, field, getattr(config, field))
    set_scales(bridge.original_model, config)
    if has_legacy_names(tensors):
        tensors = native_weights(bridge.cfg, tensors)
    with_output_biases(bridge.original_model, tensors)
    if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        bridge.original_model.to(torch.float64)
    bridge.load_state_dict(tensors, strict=True)
    return bridge
