"""Architecture families: what each computes, as one small description read from a TransformerLens bridge.

A description names the parts of a bridge (norms, projections, MLP, rotary embedding; `circuits.architecture`) and the
constants that its forward pass uses.  A family also lists the configuration fields that it honours.  A field
that is set and is neither honoured nor known to be inert is refused by name: an engine that ignored it
would be silently wrong.

To add a family, add one function to `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from circuits.architecture import MLP, Activation, Architecture, Attention, Block, Linear, Norm, Rotary
from circuits.graph import Graph

# Fields of any HuggingFace configuration that do not change what a decoder computes in evaluation mode.
INERT = frozenset(
    "transformers_version architectures output_hidden_states output_attentions return_dict dtype torch_dtype "
    "chunk_size_feed_forward is_encoder_decoder id2label label2id problem_type use_cache bos_token_id eos_token_id "
    "pad_token_id sep_token_id initializer_range _name_or_path model_type tie_word_embeddings task_specific_params "
    "_attn_implementation attn_implementation pretraining_tp vocab_size name_or_path "
    "predict_special_tokens _num_labels use_bfloat16 output_past gradient_checkpointing".split()
)


def describe(bridge: Any, hf_config: Any | None) -> Architecture:
    """Returns the architecture of a bridge.

    Args:
        bridge: a `TransformerBridge`.
        hf_config: the HuggingFace configuration it was made from; None for native models.

    Raises:
        ValueError: the architecture is not supported, or a configuration field is set that is not.
    """
    name = bridge.cfg.architecture
    if name not in FAMILIES:
        raise ValueError(
            f"architecture {name!r} is not supported; supported are {', '.join(FAMILIES)}. "
            "A family is one description in circuits/families.py"
        )
    return FAMILIES[name](bridge, hf_config)


def _refuse_unknown(architecture: str, config: Mapping[str, Any], honoured: set[str]) -> None:
    """Refuses fields that are set (not None, not False) and not honoured."""
    for field, value in config.items():
        if field in honoured or field in INERT or value is None or value is False:
            continue
        raise ValueError(
            f"{architecture}: configuration field {field}={value!r} is not honoured by the engine, "
            "which would then compute another function than the model; remove the field or use another model"
        )


def _require(architecture: str, config: Any, field: str, allowed: tuple) -> None:
    value = getattr(config, field, allowed[0])
    if value not in allowed:
        raise ValueError(f"{architecture}: {field}={value!r} is not supported, only {', '.join(map(repr, allowed))}")


def _part(bridge_part: Any) -> Any:
    """The module behind a bridge component."""
    return bridge_part.original_component


def _projection(bridge_part: Any) -> Linear:
    module: Any = _part(bridge_part)
    return Linear(module, stored_in_out=type(module).__name__ == "Conv1D")


def _activation(module: Any) -> Activation:
    """The activation of an MLP module, by its fastest equal: HuggingFace writes GPT-2's GELU in eight operations."""
    if type(module).__name__ == "NewGELUActivation":
        return lambda x: F.gelu(x, approximate="tanh")
    return module


def _attention(bridge_block: Any, soft_cap: float | None = None, scale: float | None = None) -> Attention:
    attention = bridge_block.attn
    return Attention(
        *(_projection(getattr(attention, side)) for side in "qkvo"),
        scale=_part(attention).scaling if scale is None else scale,
        soft_cap=soft_cap,
    )


def _gpt2(bridge: Any, hf_config: Any) -> Architecture:
    """GPT-2 (Radford et al. 2019): LayerNorm, learned positions, Conv1D projections."""
    honoured = {
        "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function", "layer_norm_epsilon",
        "scale_attn_weights", "scale_attn_by_inverse_layer_idx",
        "resid_pdrop", "embd_pdrop", "attn_pdrop", "n_ctx",
        "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    }  # fmt: skip
    _refuse_unknown("GPT-2", hf_config.to_dict(), honoured)
    norm = lambda part: Norm("layer", _part(part).eps, _part(part))  # noqa: E731
    blocks = tuple(
        Block(
            norm1=norm(block.ln1),
            attention=_attention(block),
            norm2=norm(block.ln2),
            mlp=MLP(
                up=_projection(getattr(block.mlp, "in")),
                down=_projection(block.mlp.out),
                activation=_activation(_part(block.mlp).act),
            ),
        )
        for block in bridge.blocks
    )
    return Architecture(
        graph=Graph(hf_config.n_layer, hf_config.n_head),
        blocks=blocks,
        token=_part(bridge.embed),
        position=_part(bridge.pos_embed),
        rotary=None,
        final_norm=norm(bridge.ln_final),
        unembed=_projection(bridge.unembed),
        head_width=hf_config.n_embd // hf_config.n_head,
        context=hf_config.n_positions,
    )


def _llama(bridge: Any, hf_config: Any) -> Architecture:
    """Llama (Touvron et al. 2023): RMSNorm, rotary positions in halves, gated MLP, grouped queries."""
    honoured = {
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "rope_theta", "attention_bias",
        "mlp_bias", "head_dim", "attention_dropout",
    }  # fmt: skip
    _refuse_unknown("Llama", hf_config.to_dict(), honoured)
    rope_type = (hf_config.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in ("default", "linear", "llama3"):
        raise ValueError(
            f"Llama: rope_type={rope_type!r} depends on the length of the text and is not supported, "
            "only 'default', 'linear' and 'llama3'"
        )
    norm = lambda part: Norm("rms", _part(part).variance_epsilon, _part(part))  # noqa: E731
    blocks = tuple(
        Block(
            norm1=norm(block.ln1),
            attention=_attention(block),
            norm2=norm(block.ln2),
            mlp=MLP(
                gate=_projection(block.mlp.gate),
                up=_projection(getattr(block.mlp, "in")),
                down=_projection(block.mlp.out),
                activation=_activation(_part(block.mlp).act_fn),
            ),
        )
        for block in bridge.blocks
    )

    def tables(positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
        ids = torch.arange(positions, device=like.device)[None]
        cos, sin = _part(bridge.rotary_emb)(like, ids)
        return cos[0], sin[0]

    return Architecture(
        graph=Graph(hf_config.num_hidden_layers, hf_config.num_attention_heads, hf_config.num_key_value_heads),
        blocks=blocks,
        token=_part(bridge.embed),
        position=None,
        rotary=Rotary(tables, pairs="halves"),
        final_norm=norm(bridge.ln_final),
        unembed=_projection(bridge.unembed),
        head_width=hf_config.head_dim,
        context=hf_config.max_position_embeddings,
    )


_NATIVE_NORMS: Mapping[str | None, Literal["layer", "rms", "none"]] = {
    None: "none", "LN": "layer", "LNPRE": "layer", "RMS": "rms", "RMSPRE": "rms",
}  # fmt: skip
# Fields of a TransformerLens configuration that TransformerLens's native model itself ignores.
_NATIVE_REFUSED = (
    "use_local_attn", "window_size", "parallel_attn_mlp", "use_qk_norm", "scale_attn_by_inverse_layer_idx",
    "post_embedding_ln", "num_experts", "experts_per_token", "use_normalization_before_and_after", "scale_embedding",
    "rmsnorm_uses_offset", "use_NTK_by_parts_rope", "rotary_adjacent_pairs", "relative_attention_max_distance",
    "per_layer_head_dim", "load_in_4bit", "attn_types",
)  # fmt: skip


def _native(bridge: Any, hf_config: None) -> Architecture:
    """TransformerLens's own model: causal or bidirectional, with or without norm, MLP, gate and rotary."""
    config = bridge.cfg
    for field in _NATIVE_REFUSED:
        if getattr(config, field, None):
            raise ValueError(
                f"TransformerLens native: {field}={getattr(config, field)!r} is set, but TransformerLens's native "
                "model ignores it, so the weights would compute another function than they were trained for"
            )
    _require("TransformerLens native", config, "attention_dir", ("causal", "bidirectional"))
    kind = config.normalization_type and config.normalization_type.upper()
    if kind not in _NATIVE_NORMS:
        raise ValueError(f"TransformerLens native: normalization_type={kind!r} is not supported, only LN, RMS, None")
    model = bridge.original_model

    def norm(part: Any, kind: Literal["layer", "rms", "none"] = _NATIVE_NORMS[kind]) -> Norm:
        module = _part(part)
        return Norm(kind, config.eps, module if getattr(module, "weight", None) is not None else None)

    def mlp(part: Any) -> MLP:
        module = _part(part)
        inner = getattr(module, "ln", None)
        return MLP(
            gate=_projection(part.gate) if config.gated_mlp else None,
            up=_projection(getattr(part, "in")),
            down=_projection(part.out),
            activation=module.act,
            inner_norm=None if inner is None else Norm("layer", config.eps, _part(inner)),
        )

    blocks = tuple(
        Block(
            norm1=norm(block.ln1),
            attention=_attention(
                block,
                soft_cap=config.attn_scores_soft_cap if config.attn_scores_soft_cap > 0 else None,
                scale=1.0 / _part(block.attn).scale,
            ),
            norm2=None if config.attn_only else norm(block.ln2),
            mlp=None if config.attn_only else mlp(block.mlp),
        )
        for block in bridge.blocks
    )
    rotary = None
    if model.rotary is not None:
        rotary = Rotary(
            lambda positions, like: (
                model.rotary.cos_cached[:positions].to(like.dtype),
                model.rotary.sin_cached[:positions].to(like.dtype),
            ),
            pairs="adjacent",
        )
    return Architecture(
        graph=Graph(config.n_layers, config.n_heads, config.n_key_value_heads, attention_only=bool(config.attn_only)),
        blocks=blocks,
        token=_part(bridge.embed),
        position=None if rotary is not None else _part(bridge.pos_embed),
        rotary=rotary,
        final_norm=norm(bridge.ln_final, "rms") if config.final_rms else norm(bridge.ln_final),
        unembed=_projection(bridge.unembed),
        head_width=config.d_head,
        context=config.n_ctx,
        causal=config.attention_dir == "causal",
        logit_cap=config.output_logits_soft_cap if config.output_logits_soft_cap > 0 else None,
    )


FAMILIES: dict[str, Callable[[Any, Any], Architecture]] = {
    "GPT2LMHeadModel": _gpt2,
    "LlamaForCausalLM": _llama,
    "TransformerLensNative": _native,
}
