"""Tiny HuggingFace modules of every family, with weights scaled up, so that every feature of their
architecture shows in the logits.
"""

from __future__ import annotations

import torch
from torch import nn


def scaled_up(module: nn.Module, seed: int = 0, size: float = 0.4) -> nn.Module:
    """Random normal weights and biases; gains around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(
                parameter.dtype
            )
            norm = any(part in name for part in ("ln", "norm")) and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if norm else size * noise)
    return module


def made(family: str, fields: dict, changes: dict) -> nn.Module:
    """A module whose classes have the usual names."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**{**fields, **changes})
    return scaled_up(getattr(transformers, f"{family}ForCausalLM")(config).eval())


def gpt2_module(**changes) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    fields = {
        "n_embd": 12,
        "n_layer": 2,
        "n_head": 3,
        "n_positions": 16,
        "vocab_size": 29,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "layer_norm_epsilon": 1e-2,
    }
    return scaled_up(GPT2LMHeadModel(GPT2Config(**{**fields, **changes})).eval())


def llama_module(**changes) -> nn.Module:
    fields = {**LLAMA_LIKE, "attention_bias": True, "mlp_bias": True}
    return made("Llama", fields, changes)


# Heads wider than hidden_size / heads, two per key-value head; a window shorter than the prompts.
LLAMA_LIKE = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "vocab_size": 29,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-2,
}
WINDOWED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}


def neox_module(**changes) -> nn.Module:
    fields = {
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "vocab_size": 29,
        "max_position_embeddings": 16,
        "layer_norm_eps": 1e-2,
        "rotary_pct": 0.5,
    }
    return made("GPTNeoX", fields, changes)


def mistral_module(**changes) -> nn.Module:
    return made("Mistral", {**LLAMA_LIKE, "sliding_window": 4}, changes)


def qwen2_module(**changes) -> nn.Module:
    fields = {**without_width(24), **WINDOWED}
    return made("Qwen2", fields, changes)


def qwen3_module(**changes) -> nn.Module:
    fields = {**LLAMA_LIKE, **WINDOWED, "attention_bias": True}
    return made("Qwen3", fields, changes)


def gemma_module(**changes) -> nn.Module:
    return made("Gemma", {**LLAMA_LIKE, "attention_bias": True}, changes)


def gemma2_module(**changes) -> nn.Module:
    fields = {
        **LLAMA_LIKE,
        "sliding_window": 4,
        "query_pre_attn_scalar": 10,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    }
    return made("Gemma2", fields, changes)


def gptj_module(**changes) -> nn.Module:
    fields = {"n_embd": 24, "n_layer": 2, "n_head": 3, "rotary_dim": 4}
    return made("GPTJ", {**GPTJ_LIKE, **fields}, changes)


def codegen_module(**changes) -> nn.Module:
    fields = {"n_embd": 24, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_ctx": 16}
    return made("CodeGen", {**GPTJ_LIKE, **fields}, changes)


def gptneo_module(**changes) -> nn.Module:
    fields = {
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_layers": 2,
        "num_heads": 3,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
        "vocab_size": 29,
        "max_position_embeddings": 16,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "layer_norm_epsilon": 1e-2,
    }
    return made("GPTNeo", fields, changes)


def opt_module(**changes) -> nn.Module:
    fields = {
        "hidden_size": 12,
        "ffn_dim": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "vocab_size": 29,
        "max_position_embeddings": 16,
        **ENDS,
    }
    return made("OPT", fields, changes)


def smollm3_module(**changes) -> nn.Module:
    own = {"no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 4}
    fields = {**LLAMA_LIKE, **own, "attention_bias": True, "mlp_bias": True, **ENDS}
    return made("SmolLM3", fields, changes)


def phi3_module(**changes) -> nn.Module:
    fields = {**without_width(24), "sliding_window": 4, "partial_rotary_factor": 0.7, **ENDS}
    return made("Phi3", fields, changes)


def stablelm_module(**changes) -> nn.Module:
    own = {"layer_norm_eps": 1e-2, "partial_rotary_factor": 0.7, "use_qkv_bias": True}
    fields = {**without_width(24), **own}
    fields.pop("rms_norm_eps")
    return made("StableLm", fields, changes)


def olmo2_module(**changes) -> nn.Module:
    fields = {**without_width(24), **ENDS}
    return made("Olmo2", fields, changes)


def gemma3_module(**changes) -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    fields = {
        **LLAMA_LIKE,
        "sliding_window": 4,
        "query_pre_attn_scalar": 10,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    module = Gemma3ForCausalLM(Gemma3TextConfig(**{**fields, **changes})).eval()
    return scaled_up(module, seed=1)  # at 0 attribution finds no better half of the edges


# Token ids that a small vocabulary has.
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def without_width(hidden_size: int) -> dict:
    """Where heads have hidden_size / heads coordinates."""
    fields = {**LLAMA_LIKE, "hidden_size": hidden_size}
    fields.pop("head_dim")
    return fields


GPTJ_LIKE = {
    "n_positions": 16,
    "vocab_size": 29,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "layer_norm_epsilon": 1e-2,
}

HUGGINGFACE = {
    "gpt2": gpt2_module,
    "llama": llama_module,
    "neox": neox_module,
    "mistral": mistral_module,
    "qwen2": qwen2_module,
    "qwen3": qwen3_module,
    "gemma": gemma_module,
    "gemma2": gemma2_module,
    "gptj": gptj_module,
    "codegen": codegen_module,
    "gptneo": gptneo_module,
    "opt": opt_module,
    "smollm3": smollm3_module,
    "phi3": phi3_module,
    "stablelm": stablelm_module,
    "olmo2": olmo2_module,
    "gemma3": gemma3_module,
}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 4,
    "rope_theta": 100.0,
}
HUGGINGFACE_VARIANTS = {
    **{name: {} for name in HUGGINGFACE},
    "gpt2, scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "llama, llama3 rotary": {"rope_scaling": LLAMA3},
    "llama, linear rotary": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "llama, tied": {"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False},
    "neox, sequential": {"use_parallel_residual": False},
    "mistral, no window": {"sliding_window": None},
    "qwen2, no window": {"use_sliding_window": False},
    "qwen3, yarn rotary": {
        "rope_scaling": YARN,
        "use_sliding_window": False,
        "attention_bias": False,
    },
    "qwen2, linear rotary": {
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
        "use_sliding_window": False,
    },
    "smollm3, yarn rotary": {"rope_scaling": YARN, "use_sliding_window": False},
    "phi3, no window": {"sliding_window": None},
    "stablelm, parallel": {"use_parallel_residual": True, "use_qkv_bias": False},
    "opt, without biases and gains": {
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
    },
    "gemma3, linear rotary": {
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
        "final_logit_softcapping": 3.0,
    },
    "gemma2, no caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
}
