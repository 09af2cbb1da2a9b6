"""TransformerLens native models, made from their configuration and weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from circuits.model.load import LoadedModel, from_bridge


def boot(fields: Mapping[str, Any]) -> Any:
    """Returns a native bridge with random weights; the caller's random state is left as it was."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    given: dict[str, Any] = {"architecture": "TransformerLensNative", **fields}
    with torch.random.fork_rng(devices=[]):
        return TransformerBridge.boot_native(TransformerBridgeConfig(**given))  # pyright: ignore[reportAttributeAccessIssue]


def native(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str) -> LoadedModel:
    """Returns a native model with these weights."""
    bridge = boot(fields)
    dtype, device = fields.get("dtype", torch.float32), fields.get("device", "cpu")
    bridge.original_model.to(device=device, dtype=dtype)
    bridge.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()})
    return from_bridge(bridge, path=path)


def attention_direction(causal: bool) -> str:
    """What the configuration calls it."""
    return "causal" if causal else "bidirectional"
