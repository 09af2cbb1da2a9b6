"""What TransformerLens's HookedTransformer (versions 1 to 3) computed from a configuration, where
the native model of TransformerLens 4 computes something else.

A file with HookedTransformer's names (`blocks.0.attn.W_Q`) holds weights that were trained under
its definition, so that is computed, or the field is refused by name:

    scores = q . k / s,  s = attn_scale (-1: sqrt(d_head)) if use_attn_scale else 1,
                         times layer + 1 if scale_attn_by_inverse_layer_idx
    MLP, gated:          (act(x W_gate) * (x W_in) + b_in) W_out + b_out

The native model ignores both fields of the scale, and has no biases in a gated MLP.  In a file with
the names of TransformerLens 4 the fields of the scale are refused where the two differ, since they
do not tell under which of them the weights were trained.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Fields of earlier configurations, or of TransformerLens 4's as saved, that it does not take:
# `_DROPPED` change nothing unless another field is on; `_REFUSED` must be off.
_DROPPED = frozenset(
    "ungroup_grouped_query_attention NTK_original_ctx_len rotary_base_local rotary_scaling_factor "
    "train_seq_length norm_topk_prob yarn_factor yarn_attention_factor yarn_beta_fast "
    "yarn_beta_slow yarn_original_max_position_embeddings yarn_truncate yarn_global_attn_only "
    "split_attention_weights".split()
)
_REFUSED = frozenset(
    "use_yarn_rope use_dynamic_ntk_rope use_logn_attn clip_qkv use_attention_sinks "
    "quantization_method".split()
)
_WINDOWS = frozenset({"window_size", "attn_types", "rotary_base_local"})  # of local attention
# GELU's tanh approximation under HookedTransformer's other names.
_TANH_GELU = frozenset({"gelu_fast", "gelu_pytorch_tanh"})
_BUFFERS = (".mask", ".IGNORE")


def has_legacy_names(tensors: Iterable[str]) -> bool:
    """Whether a state dict was written by HookedTransformer."""
    return any(name.endswith((".W_E", ".W_Q")) for name in tensors)


def known_fields(fields: Mapping[str, Any], *, legacy: bool) -> dict[str, Any]:
    """The fields of a saved configuration that TransformerLens 4 takes, meaning the same.

    Raises:
        ValueError: a field that the native model would leave out is set, or there is no such field.
    """
    from transformer_lens.config import TransformerBridgeConfig, TransformerLensConfig

    taken = {
        *inspect.signature(TransformerBridgeConfig).parameters,
        *inspect.signature(TransformerLensConfig).parameters,
    } - {"kwargs"}
    dropped = _DROPPED | (frozenset() if fields.get("use_local_attn") else _WINDOWS)
    for field, value in fields.items():
        if field in _REFUSED and value:
            raise ValueError(
                f"{field}={value!r} is set, but TransformerLens's native model cannot compute it; "
                "use a model without it"
            )
        if field not in taken | dropped | _REFUSED:
            raise ValueError(f"there is no field {field}; remove it, or correct its name")
    known = {field: value for field, value in fields.items() if field in taken - dropped}
    _refuse_scale(known, legacy=legacy)
    if legacy:
        _translate(known)
    return known


def _refuse_scale(fields: Mapping[str, Any], *, legacy: bool) -> None:
    """Refuses an attention scale that cannot be, or that may mean two things."""
    scale, used = fields.get("attn_scale", -1.0), fields.get("use_attn_scale", True)
    if used and scale != -1 and not scale > 0:
        raise ValueError(
            f"attn_scale={scale}, but scores are divided by it: it must be above 0, or -1 for "
            "sqrt(d_head)"
        )
    for field, off in (("use_attn_scale", True), ("scale_attn_by_inverse_layer_idx", False)):
        if not legacy and fields.get(field, off) != off:
            raise ValueError(
                f"{field}={fields[field]} is honoured in files with HookedTransformer's names "
                "(blocks.0.attn.W_Q) but not in those of TransformerLens 4, whose native model "
                f"ignores it; set {field}={off} and, if scores were not divided by sqrt(d_head) in "
                "training, attn_scale to what they were divided by"
            )


def _translate(fields: dict[str, Any]) -> None:
    """Puts HookedTransformer's fields into TransformerLens 4's, or refuses them."""
    activation = fields.get("act_fn", "relu")
    if fields.get("positional_embedding_type", "standard") == "rotary":
        raise ValueError(
            "legacy rotary checkpoints are refused (positional_embedding_type='rotary'): "
            "TransformerLens 4 rotates other pairs of coordinates than they were trained with"
        )
    if activation is None and not fields.get("attn_only"):
        raise ValueError("act_fn is null, but a model with MLPs has an activation; set it")
    if activation is not None and activation.endswith("_ln") and fields.get("gated_mlp"):
        raise ValueError(
            f"act_fn={activation!r} with gated_mlp=True has no product of gate and input, which "
            "TransformerLens's native model cannot compute; use a model without it"
        )
    if activation in _TANH_GELU:
        fields["act_fn"] = "gelu_new"
    if fields.get("normalization_type", "LN") is None:
        fields["final_rms"] = False  # there is no norm at all


def attention_scale(config: Any, layer: int) -> float:
    """By what a layer's scores are divided under a configuration, by HookedTransformer's meaning.

    >>> from types import SimpleNamespace
    >>> fields = {"attn_scale": -1.0, "d_head": 16, "scale_attn_by_inverse_layer_idx": True}
    >>> attention_scale(SimpleNamespace(use_attn_scale=True, **fields), 1)
    8.0
    >>> attention_scale(SimpleNamespace(use_attn_scale=False, **fields), 1)
    2.0
    """
    scale = config.attn_scale if config.attn_scale > 0 else math.sqrt(config.d_head)
    scale = scale if config.use_attn_scale else 1.0
    return float(scale * (layer + 1 if config.scale_attn_by_inverse_layer_idx else 1))


def without_constants(config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A legacy state dict without its stored masks.

    Raises:
        ValueError: a mask is not the one that the configuration means.
    """
    for name, tensor in tensors.items():
        causal = name.endswith(".mask") and config.attention_dir == "causal"
        if causal and not torch.equal(tensor.bool(), torch.ones_like(tensor).tril().bool()):
            raise ValueError(
                f"{name} is no causal mask (local attention?), but the configuration has causal "
                "attention over all positions; use a model without local attention"
            )
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(_BUFFERS)}


def native_weights(config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a legacy state dict by TransformerLens 4's names and shapes.

    A gated MLP's biases become one of its output, b_out + b_in W_out; a folded norm inside a SoLU
    MLP gets a gain of one.
    """
    from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint

    weights = without_constants(config, tensors)
    for layer in range(config.n_layers):
        mlp = f"blocks.{layer}.mlp"
        if config.gated_mlp and f"{mlp}.b_in" in weights and f"{mlp}.W_out" in weights:
            through = weights.pop(f"{mlp}.b_in") @ weights[f"{mlp}.W_out"]
            weights[f"{mlp}.b_out"] = weights.get(f"{mlp}.b_out", 0) + through
        folded = config.act_fn == "solu_ln" and config.normalization_type != "LN"
        if folded and not config.attn_only and f"{mlp}.ln.w" not in weights:
            weights[f"{mlp}.ln.w"] = torch.ones(config.d_mlp)
            weights[f"{mlp}.ln.b"] = torch.zeros(config.d_mlp)
    return convert_tl_checkpoint(weights, config)


def set_scales(model: Any, config: Any) -> None:
    """Gives each attention layer of a native model the scale that its configuration means."""
    for layer, block in enumerate(model.layers):
        block.attn.scale = attention_scale(config, layer)


def with_output_biases(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Adds the biases of gated MLPs that the weights have to a native model, as zeros."""
    for layer, block in enumerate(model.layers):
        if block.cfg.gated_mlp and f"blocks.{layer}.mlp.out.bias" in weights:
            block.mlp.out.bias = nn.Parameter(torch.zeros(block.cfg.d_model))
