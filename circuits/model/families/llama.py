"""Llama and its relatives: RMSNorm, gated MLPs, rotary positions in halves, grouped queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from circuits.graph import Graph
from circuits.model.architecture import MLP, Architecture, Attention, Block, Norm
from circuits.model.families.parts import activation, part, projection, qkvo, refuse_unknown, rotary

_COMMON = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim hidden_act max_position_embeddings rms_norm_eps rope_parameters rope_theta "
    "attention_dropout "
)
_LAYERED = _COMMON + "sliding_window layer_types "
_SOME_WINDOWS = _LAYERED + "max_window_layers use_sliding_window "
# A bias of the output projection would be inside the post-norm: attention_bias stays refused.
_GEMMA2 = _LAYERED + (
    "hidden_activation query_pre_attn_scalar final_logit_softcapping attn_logit_softcapping "
    "cache_implementation"
)


def llama(bridge: Any, config: Any) -> Architecture:
    """Llama (Touvron et al. 2023)."""
    refuse_unknown("Llama", config, _COMMON + "attention_bias mlp_bias")
    return _decoder("Llama", bridge, config)


def mistral(bridge: Any, config: Any) -> Architecture:
    """Mistral (Jiang et al. 2023): a sliding window in every layer."""
    refuse_unknown("Mistral", config, _COMMON + "sliding_window")
    return _decoder("Mistral", bridge, config, window=lambda layer: config.sliding_window)


def qwen2(bridge: Any, config: Any) -> Architecture:
    """Qwen 2 and 2.5 (Yang et al. 2024): biases on q, k and v; windows in some layers if wanted."""
    refuse_unknown("Qwen2", config, _SOME_WINDOWS)
    return _decoder("Qwen2", bridge, config, window=_by_layer("Qwen2", config))


def qwen3(bridge: Any, config: Any) -> Architecture:
    """Qwen 3, dense (Yang et al. 2025): queries and keys are normed per head."""
    refuse_unknown("Qwen3", config, _SOME_WINDOWS + "attention_bias")
    return _decoder("Qwen3", bridge, config, window=_by_layer("Qwen3", config))


def gemma(bridge: Any, config: Any) -> Architecture:
    """Gemma 1 (Gemma Team 2024): scaled embeddings, gains stored less 1."""
    refuse_unknown("Gemma", config, _COMMON + "attention_bias hidden_activation")
    return _decoder("Gemma", bridge, config, offset=1.0)


def gemma2(bridge: Any, config: Any) -> Architecture:
    """Gemma 2 (Gemma Team 2024): also post-norms, soft-caps, windows, its own attention scale."""
    refuse_unknown("Gemma 2", config, _GEMMA2)
    return _decoder("Gemma 2", bridge, config, offset=1.0, window=_by_layer("Gemma 2", config))


def _by_layer(family: str, config: Any) -> Callable[[int], int | None]:
    """The window of each layer, by its type."""
    for kind in config.layer_types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"{family}: layer type {kind!r} is not supported, only 'full_attention' and "
                "'sliding_attention'"
            )
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    return lambda layer: windows[config.layer_types[layer]]


def _decoder(
    family: str,
    bridge: Any,
    config: Any,
    *,
    offset: float = 0.0,
    window: Callable[[int], int | None] = lambda layer: None,
) -> Architecture:
    """The whole model; `offset` is added to the stored gains, `window` is that of each layer."""

    def norm(bridge_part: Any) -> Norm:
        return Norm("rms", config.rms_norm_eps, part(bridge_part), offset)

    def optional(parent: Any, name: str) -> Norm | None:
        return norm(getattr(parent, name)) if name in parent._modules else None

    blocks = tuple(
        Block(
            norm1=norm(block.ln1),
            attention=Attention(
                *qkvo(block.attn),
                scale=part(block.attn).scaling,
                soft_cap=getattr(config, "attn_logit_softcapping", None),
                window=window(layer),
                q_norm=optional(block.attn, "q_norm"),
                k_norm=optional(block.attn, "k_norm"),
            ),
            norm2=norm(block.ln2),
            mlp=MLP(
                gate=projection(block.mlp.gate),
                up=projection(getattr(block.mlp, "in")),
                down=projection(block.mlp.out),
                activation=activation(part(block.mlp).act_fn),
            ),
            post_norm1=optional(block, "ln1_post"),
            post_norm2=optional(block, "ln2_post"),
        )
        for layer, block in enumerate(bridge.blocks)
    )
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Architecture(
        graph=Graph(
            config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
        ),
        blocks=blocks,
        token=part(bridge.embed),
        position=None,
        rotary=rotary(family, bridge, config),
        final_norm=norm(bridge.ln_final),
        unembed=projection(bridge.unembed),
        head_width=width,
        context=config.max_position_embeddings,
        logit_cap=getattr(config, "final_logit_softcapping", None),
    )
