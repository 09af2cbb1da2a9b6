"""TransformerLens's own model, with or without causal mask, norm, MLP, gate, rotary positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from torch import Tensor

from circuits.graph import Graph
from circuits.model.architecture import MLP, Architecture, Attention, Block, Norm, Rotary
from circuits.model.families.parts import part, projection, qkvo
from circuits.model.legacy import attention_scale

NormKind = Literal["layer", "rms", "none"]

_NORMS: Mapping[str, NormKind] = {"LN": "layer", "LNPRE": "layer", "RMS": "rms", "RMSPRE": "rms"}
# Fields that change what a native model computes, and that are honoured here.
_HONOURED = frozenset(
    "d_model d_head n_layers n_ctx n_heads d_mlp d_vocab d_vocab_out positional_embedding_type "
    "n_key_value_heads attn_only gated_mlp eps act_fn normalization_type final_rms use_attn_scale "
    "attn_scale scale_attn_by_inverse_layer_idx attention_dir rotary_dim rotary_base rope_scaling "
    "attn_scores_soft_cap output_logits_soft_cap".split()
)
# Fields that change nothing of it: names, devices, initialisation, tokenisers, hooks.
_INERT = frozenset(
    "device dtype architecture original_architecture model_name tokenizer_name initializer_range "
    "init_mode init_weights seed n_params n_devices from_checkpoint checkpoint_index "
    "checkpoint_label_type checkpoint_value default_prepend_bos tokenizer_prepends_bos "
    "tokenizer_appends_eos default_padding_side trust_remote_code use_attn_result "
    "use_split_qkv_input use_hook_mlp_in use_attn_in use_hook_tokens uses_rms_norm "
    "attn_implementation decoder_start_token_id NTK_by_parts_low_freq_factor "
    "NTK_by_parts_high_freq_factor NTK_by_parts_factor".split()
)


def native(bridge: Any, hf_config: None) -> Architecture:
    """A native model; fields that TransformerLens's native model itself ignores are refused."""
    config = bridge.cfg
    _refuse_others(config)
    _refuse_scales(config, bridge)
    norm = partial(_norm, config, kind=_norm_kind(config))
    final_norm = norm(bridge.ln_final, kind="rms") if config.final_rms else norm(bridge.ln_final)
    rotary = _rotary(bridge.original_model.rotary)
    blocks = tuple(_block(config, block, norm, rotary) for block in bridge.blocks)
    return Architecture(
        graph=Graph(
            config.n_layers,
            config.n_heads,
            config.n_key_value_heads,
            attention_only=bool(config.attn_only),
            causal=config.attention_dir == "causal",
        ),
        blocks=blocks,
        token=part(bridge.embed),
        position=None if rotary is not None else part(bridge.pos_embed),
        final_norm=final_norm,
        unembed=projection(bridge.unembed),
        head_width=config.d_head,
        context=config.n_ctx,
        logit_cap=_cap(config.output_logits_soft_cap),
    )


def _norm_kind(config: Any) -> NormKind:
    if config.normalization_type is None:
        return "none"
    named = config.normalization_type.upper()
    if named not in _NORMS:
        raise ValueError(
            f"TransformerLens native: normalization_type={named!r} is not supported, only LN, RMS, "
            "None"
        )
    return _NORMS[named]


def _norm(config: Any, bridge_part: Any, kind: NormKind) -> Norm:
    module = part(bridge_part)
    return Norm(kind, config.eps, None if getattr(module, "weight", None) is None else module)


def _block(config: Any, block: Any, norm: Callable[[Any], Norm], rotary: Rotary | None) -> Block:
    return Block(
        norm1=norm(block.ln1),
        attention=Attention(
            *qkvo(block.attn),
            scale=1.0 / part(block.attn).scale,
            soft_cap=_cap(config.attn_scores_soft_cap),
            rotary=rotary,
        ),
        norm2=None if config.attn_only else norm(block.ln2),
        mlp=None if config.attn_only else _mlp(config, block.mlp),
    )


def _mlp(config: Any, bridge_part: Any) -> MLP:
    module = part(bridge_part)
    inner = getattr(module, "ln", None)
    return MLP(
        gate=projection(bridge_part.gate) if config.gated_mlp else None,
        up=projection(getattr(bridge_part, "in")),
        down=projection(bridge_part.out),
        activation=module.act,
        inner_norm=None if inner is None else Norm("layer", config.eps, part(inner)),
    )


def _cap(soft_cap: float) -> float | None:
    return soft_cap if soft_cap > 0 else None


def _rotary(rotary: Any | None) -> Rotary | None:
    """Rotary positions by the model's own tables; None where it has learned positions."""
    if rotary is None:
        return None

    def tables(positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (table[:positions] for table in (rotary.cos_cached, rotary.sin_cached))
        return cos.to(like.dtype), sin.to(like.dtype)

    return Rotary(tables, pairs="adjacent")


def _refuse_scales(config: Any, bridge: Any) -> None:
    """Refuses a model that scales its attention in another way than its configuration says."""
    for layer, block in enumerate(bridge.blocks):
        stated, scale = attention_scale(config, layer), part(block.attn).scale
        if not math.isclose(stated, scale, rel_tol=1e-6):
            raise ValueError(
                f"TransformerLens native: use_attn_scale={config.use_attn_scale}, "
                f"attn_scale={config.attn_scale:g} and scale_attn_by_inverse_layer_idx="
                f"{config.scale_attn_by_inverse_layer_idx} divide the attention scores of layer "
                f"{layer} by {stated:g}, but the model divides them by {scale:g}; state that in "
                "bridge.cfg if the weights were trained so, else give HookedTransformer's "
                "checkpoint to load_model"
            )


def _refuse_others(config: Any) -> None:
    """Refuses fields off TransformerLens's default that it ignores, and any other direction."""
    from transformer_lens.config import TransformerBridgeConfig

    defaults = vars(TransformerBridgeConfig(d_model=1, d_head=1, n_layers=1, n_ctx=1))
    for field, value in vars(config).items():
        if field in _HONOURED or field in _INERT or not value or value == defaults.get(field):
            continue
        raise ValueError(
            f"TransformerLens native: {field}={value!r} is set, but TransformerLens's native model "
            "ignores it, so that the weights would compute another function than they were trained "
            "for; leave it at its default"
        )
    if config.attention_dir not in ("causal", "bidirectional"):
        raise ValueError(
            f"TransformerLens native: attention_dir={config.attention_dir!r} is not supported, "
            "only 'causal' and 'bidirectional'"
        )
