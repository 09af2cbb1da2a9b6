"""TransformerLens state dicts: X.pt or X.safetensors beside X.config.json, to a native bridge.

The tensors have HookedTransformer's names (`embed.W_E`), or those of the bridge itself.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuits.model.refusals import first_line

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
        fixed = {"architecture": "TransformerLensNative", "device": device}
        config = TransformerBridgeConfig(**{**fields, **fixed})
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{config_path} is no TransformerLens configuration: {first_line(error)}"
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

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        # torch's own message advises weights_only=False, with which a file can run code.
        raise ValueError(
            f"{path} holds no tensors that can be read ({type(error).__name__})"
        ) from None
    if isinstance(tensors, Mapping) and all(isinstance(one, Tensor) for one in tensors.values()):
        return dict(tensors)
    raise ValueError(
        f"{path} holds no state dict, which is a mapping from names to tensors; save that alone"
    )


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
    """A native bridge of this configuration with these weights."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint

    bridge: Any = TransformerBridge.boot_native(config)  # pyright: ignore[reportAttributeAccessIssue]
    if any(name.endswith((".W_E", ".W_Q")) for name in tensors):
        tensors = convert_tl_checkpoint(tensors, bridge.cfg)
    bridge.load_state_dict(tensors, strict=True)
    return bridge
