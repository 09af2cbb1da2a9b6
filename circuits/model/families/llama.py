"""Llama and its relatives: gated MLPs, rotary positions in halves, grouped queries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from circuits.graph import Graph
from circuits.model.architecture import MLP, Architecture, Attention, Block, Norm, Rotary
from circuits.model.families.parts import (
    activation,
    layer_norm,
    part,
    projection,
    qkvo,
    refuse_unknown,
    rotary,
)

COMMON = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim hidden_act max_position_embeddings rms_norm_eps rope_parameters rope_theta "
    "attention_dropout "
)
LAYERED = COMMON + "sliding_window layer_types "
_SOME_WINDOWS = LAYERED + "max_window_layers use_sliding_window "
_SMOLLM3 = _SOME_WINDOWS + "no_rope_layers no_rope_layer_interval attention_bias mlp_bias"
# original_max_position_embeddings is read by longrope alone, which is refused.
_PHI3 = COMMON + (
    "sliding_window resid_pdrop embd_pdrop original_max_position_embeddings partial_rotary_factor"
)
# qk_layernorm, a LayerNorm for each head (in the 12B model), stays refused.
_STABLELM = COMMON + (
    "layer_norm_eps use_qkv_bias use_parallel_residual hidden_dropout partial_rotary_factor"
)

# A layer's attention as all layers of a family have it -> as this layer has it.
Change = Callable[[int, Attention], Attention]


def llama(bridge: Any, config: Any) -> Architecture:
    """Llama (Touvron et al. 2023)."""
    refuse_unknown("Llama", config, COMMON + "attention_bias mlp_bias")
    return decoder("Llama", bridge, config)


def mistral(bridge: Any, config: Any) -> Architecture:
    """Mistral (Jiang et al. 2023): a sliding window in every layer."""
    refuse_unknown("Mistral", config, COMMON + "sliding_window")
    return decoder("Mistral", bridge, config, change=_window(config))


def qwen2(bridge: Any, config: Any) -> Architecture:
    """Qwen 2 and 2.5 (Yang et al. 2024): biases on q, k and v; windows in some layers if wanted."""
    refuse_unknown("Qwen2", config, _SOME_WINDOWS)
    return decoder("Qwen2", bridge, config, change=windows_by_layer("Qwen2", config))


def qwen3(bridge: Any, config: Any) -> Architecture:
    """Qwen 3, dense (Yang et al. 2025): queries and keys are normed per head."""
    refuse_unknown("Qwen3", config, _SOME_WINDOWS + "attention_bias")
    return decoder("Qwen3", bridge, config, change=windows_by_layer("Qwen3", config))


def phi3(bridge: Any, config: Any) -> Architecture:
    """Phi-3 (Abdin et al. 2024): fused projections, a sliding window in every layer."""
    refuse_unknown("Phi-3", config, _PHI3)
    return decoder("Phi-3", bridge, config, change=_window(config))


def smollm3(bridge: Any, config: Any) -> Architecture:
    """SmolLM3 (Bakouch et al. 2025): some layers do not rotate; windows in them if wanted."""
    refuse_unknown("SmolLM3", config, _SMOLLM3)
    change, turned = windows_by_layer("SmolLM3", config), rotary("SmolLM3", bridge, config)

    def positions(layer: int) -> Rotary | None:
        return turned if config.no_rope_layers[layer] else None

    return decoder("SmolLM3", bridge, config, change=change, positions=positions)


def stablelm(bridge: Any, config: Any) -> Architecture:
    """StableLM (Bellagente et al. 2024): LayerNorm, part rotary; parallel with one norm or not."""
    refuse_unknown("StableLM", config, _STABLELM)
    parallel = config.use_parallel_residual
    return decoder("StableLM", bridge, config, norm=layer_norm, parallel=parallel)


def olmo2(bridge: Any, config: Any) -> Architecture:
    """OLMo 2 (OLMo Team 2025): no norms before, only after; queries, and keys, normed together.

    attention_bias stays refused: the output projection's would be inside the post-norm.
    """
    refuse_unknown("OLMo 2", config, COMMON)

    def change(layer: int, attention: Attention) -> Attention:
        q, k = attention.q, attention.k
        q, k = replace(q, norm=attention.q_norm), replace(k, norm=attention.k_norm)
        return replace(attention, q=q, k=k, q_norm=None, k_norm=None)

    return decoder("OLMo 2", bridge, config, change=change)


def windows_by_layer(family: str, config: Any) -> Change:
    """The window of each layer, by its type."""
    for kind in config.layer_types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"{family}: layer type {kind!r} is not supported, only 'full_attention' and "
                "'sliding_attention'"
            )
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    return lambda layer, attention: replace(attention, window=windows[config.layer_types[layer]])


def _window(config: Any) -> Change:
    """The same window in all layers."""
    return lambda layer, attention: replace(attention, window=config.sliding_window)


def decoder(
    family: str,
    bridge: Any,
    config: Any,
    *,
    offset: float = 0.0,
    norm: Callable[[Any], Norm] | None = None,
    change: Change = lambda layer, attention: attention,
    positions: Callable[[int], Rotary | None] | None = None,
    parallel: bool = False,
) -> Architecture:
    """The whole model.

    Args:
        offset: added to the stored gains of RMS norms.
        norm: how the norms of the residual stream are read; None: as RMS norms.
        change: what is special about a layer's attention.
        positions: the rotary positions of a layer; None: of all layers as the model says.
        parallel: attention and MLP of a block read the same.
    """

    def rms(bridge_part: Any) -> Norm:
        return Norm("rms", config.rms_norm_eps, part(bridge_part), offset)

    def optional(parent: Any, name: str) -> Norm | None:
        return (norm or rms)(getattr(parent, name)) if name in parent._modules else None

    if positions is None:
        everywhere = rotary(family, bridge, config)
        positions = lambda layer: everywhere  # noqa: E731

    def described(layer: int, block: Any) -> Block:
        attention = Attention(
            *qkvo(block.attn),
            scale=part(block.attn).scaling,
            soft_cap=getattr(config, "attn_logit_softcapping", None),
            q_norm=optional(block.attn, "q_norm"),
            k_norm=optional(block.attn, "k_norm"),
            rotary=positions(layer),
        )
        before = optional(block, "ln1") or Norm("none")
        return Block(
            norm1=before,
            attention=change(layer, attention),
            norm2=optional(block, "ln2") or before,  # where there is one norm, it is both's
            mlp=_gated(block.mlp),
            post_norm1=optional(block, "ln1_post"),
            post_norm2=optional(block, "ln2_post"),
        )

    return Architecture(
        graph=Graph(
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            parallel=parallel,
        ),
        blocks=tuple(described(layer, block) for layer, block in enumerate(bridge.blocks)),
        token=part(bridge.embed),
        position=None,
        final_norm=(norm or rms)(bridge.ln_final),
        unembed=projection(bridge.unembed),
        head_width=part(bridge.blocks[0].attn).head_dim,
        context=config.max_position_embeddings,
        logit_cap=getattr(config, "final_logit_softcapping", None),
    )


def _gated(bridge_part: Any) -> MLP:
    module = part(bridge_part)
    return MLP(
        gate=projection(bridge_part.gate),
        up=projection(getattr(bridge_part, "in")),
        down=projection(bridge_part.out),
        activation=activation(getattr(module, "act_fn", None) or module.activation_fn),
    )
