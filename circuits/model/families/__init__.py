"""Architecture families: what each computes, as a small description of a TransformerLens bridge.

A description names the parts of a bridge (norms, projections, MLP, rotary embedding;
`circuits.model.architecture`) and the constants that its forward pass uses.  A family also lists
the configuration fields that it honours.  A field that is set and is neither honoured nor known to
be inert is refused by name: an engine that ignored it would be silently wrong.

To add a family, add one function to `FAMILIES`, a small model to the tests, and a test for each
feature that fails when the feature is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from circuits.model.architecture import Architecture
from circuits.model.families.gemma import gemma, gemma2, gemma3
from circuits.model.families.gpt import codegen, gpt2, gpt_neo, gpt_neox, gptj, opt
from circuits.model.families.llama import (
    llama,
    mistral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    smollm3,
    stablelm,
)
from circuits.model.families.native import native

FAMILIES: dict[str, Callable[[Any, Any], Architecture]] = {
    "GPT2LMHeadModel": gpt2,
    "GPTNeoForCausalLM": gpt_neo,
    "OPTForCausalLM": opt,
    "GPTNeoXForCausalLM": gpt_neox,
    "GPTJForCausalLM": gptj,
    "CodeGenForCausalLM": codegen,
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "SmolLM3ForCausalLM": smollm3,
    "Phi3ForCausalLM": phi3,
    "StableLmForCausalLM": stablelm,
    "Olmo2ForCausalLM": olmo2,
    "GemmaForCausalLM": gemma,
    "Gemma2ForCausalLM": gemma2,
    "Gemma3ForCausalLM": gemma3,
    "TransformerLensNative": native,
}


def describe(bridge: Any, hf_config: Any | None) -> Architecture:
    """Returns the architecture of a bridge; `hf_config` is None for native models.

    Raises:
        ValueError: the architecture is not supported, or a configuration field is set that is not.
    """
    name = bridge.cfg.architecture
    if name not in FAMILIES:
        raise ValueError(
            f"architecture {name!r} is not supported; supported are {', '.join(FAMILIES)}. A "
            "family is one description in circuits/model/families"
        )
    return FAMILIES[name](bridge, hf_config)
