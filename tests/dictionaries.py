"""Dictionaries in SAELens's layout: random ones, and exact ones that leave no error."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def saved(folder: Path, weights: dict[str, Tensor], **config) -> Path:
    """A folder with `cfg.json` and `sae_weights.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {
        "architecture": "standard",
        "d_in": weights["W_enc"].shape[0],
        "d_sae": weights["W_enc"].shape[1],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.6.0", "hook_name": "blocks.1.hook_resid_pre"},
    }
    (folder / "cfg.json").write_text(json.dumps({**fields, **config}))
    save_file(
        {name: one.contiguous() for name, one in weights.items()},
        folder / "sae_weights.safetensors",
    )
    return folder


def at(hook: str, out: str | None = None, **metadata) -> dict:
    """The metadata of a dictionary at a hook."""
    written = {} if out is None else {"hook_name_out": out}
    return {"sae_lens_version": "6.6.0", "hook_name": hook, **written, **metadata}


def random(width: int, features: int, architecture: str = "standard", seed: int = 0) -> dict:
    """Weights of no meaning."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = {
        "W_enc": drawn(width, features),
        "W_dec": drawn(features, width),
        "b_dec": drawn(width),
    }
    if architecture == "gated":
        return weights | {name: drawn(features) for name in ("b_gate", "b_mag", "r_mag")}
    weights["b_enc"] = drawn(features)
    if "jumprelu" in architecture:
        weights["threshold"] = drawn(features).abs()
    return weights


def exact(width: int) -> dict[str, Tensor]:
    """An orthogonal basis in both directions: relu(x q) and relu(-x q) rebuild any x."""
    basis = torch.linalg.qr(random(width, width)["W_enc"])[0]
    both = torch.cat([basis, -basis], 1)
    bias = torch.linspace(-1, 1, width, dtype=torch.float64)
    zeros = torch.zeros(2 * width, dtype=torch.float64)
    return {"W_enc": both, "W_dec": both.T, "b_dec": bias, "b_enc": zeros}
