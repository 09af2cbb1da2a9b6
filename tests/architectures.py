"""Writes `docs/architectures.md`: what each family's engine has been proved to compute.

python -m tests.architectures
"""
# ruff: noqa: E501 - the lines of the page stand as they are in the page

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from circuits.engine import Engine
from circuits.graph import Graph
from tests import tiny
from tests.features import MUTATIONS

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Family:
    """A family's heading, its architecture's name, and well-known models of it with their graphs."""

    title: str
    architecture: str
    known: dict[str, Graph]


def _parallel(layers: int, heads: int) -> Graph:
    return Graph(layers, heads, parallel=True)


FAMILIES = {
    "gpt2": Family(
        "GPT-2",
        "GPT2LMHeadModel",
        {
            "gpt2": Graph(12, 12),
            "gpt2-medium": Graph(24, 16),
            "gpt2-large": Graph(36, 20),
            "gpt2-xl": Graph(48, 25),
        },
    ),
    "gptneo": Family(
        "GPT-Neo, TinyStories",
        "GPTNeoForCausalLM",
        {"TinyStories-1M": Graph(8, 16), "gpt-neo-125m": Graph(12, 12)},
    ),
    "opt": Family("OPT", "OPTForCausalLM", {"opt-125m": Graph(12, 12), "opt-1.3b": Graph(24, 32)}),
    "neox": Family(
        "GPT-NeoX, Pythia",
        "GPTNeoXForCausalLM",
        {
            "pythia-70m": _parallel(6, 8),
            "pythia-160m": _parallel(12, 12),
            "pythia-410m": _parallel(24, 16),
            "pythia-1b": _parallel(16, 8),
            "pythia-1.4b": _parallel(24, 16),
        },
    ),
    "gptj": Family("GPT-J", "GPTJForCausalLM", {"gpt-j-6b": _parallel(28, 16)}),
    "codegen": Family("CodeGen", "CodeGenForCausalLM", {"codegen-350M-mono": _parallel(20, 16)}),
    "llama": Family(
        "Llama 2, 3, SmolLM2",
        "LlamaForCausalLM",
        {
            "SmolLM2-135M": Graph(30, 9, 3),
            "Llama-3.2-1B": Graph(16, 32, 8),
            "Llama-2-7b": Graph(32, 32),
        },
    ),
    "mistral": Family("Mistral", "MistralForCausalLM", {"Mistral-7B-v0.1": Graph(32, 32, 8)}),
    "qwen2": Family("Qwen 2, 2.5", "Qwen2ForCausalLM", {"Qwen2.5-0.5B": Graph(24, 14, 2)}),
    "qwen3": Family("Qwen 3, dense", "Qwen3ForCausalLM", {"Qwen3-0.6B": Graph(28, 16, 8)}),
    "smollm3": Family("SmolLM3", "SmolLM3ForCausalLM", {"SmolLM3-3B": Graph(36, 16, 4)}),
    "phi3": Family("Phi-3", "Phi3ForCausalLM", {"Phi-3-mini-4k-instruct": Graph(32, 32, 32)}),
    "stablelm": Family("StableLM", "StableLmForCausalLM", {"stablelm-2-1_6b": Graph(24, 32, 32)}),
    "olmo2": Family("OLMo 2", "Olmo2ForCausalLM", {"OLMo-2-0425-1B": Graph(16, 16, 16)}),
    "gemma": Family("Gemma 1", "GemmaForCausalLM", {"gemma-2b": Graph(18, 8, 1)}),
    "gemma2": Family("Gemma 2", "Gemma2ForCausalLM", {"gemma-2-2b": Graph(26, 8, 4)}),
    "gemma3": Family(
        "Gemma 3, text",
        "Gemma3ForCausalLM",
        {"gemma-3-270m": Graph(18, 4, 1), "gemma-3-1b-pt": Graph(26, 4, 1)},
    ),
    "native": Family(
        "TransformerLens native",
        "TransformerLensNative",
        {"2 layers, 4 heads": Graph(2, 4), "without MLPs": Graph(2, 4, attention_only=True)},
    ),
}

INTRODUCTION = """# Architectures

*Made by `make docs` from the tests; `make test` fails when it is no longer true.*

A model is supported when its family is described in `circuits/model/families` and every configuration field that it
sets is known there or read by nothing. A field counts as read when the model's own code asks for it while a model of this
very configuration is built and run once, without weights: such a field is refused by name where the engine does not honour
it, and others are named in one note. Experts, ALiBi, adapters and quantised weights are refused even where the code does
not ask, because such weights are of another model. Loading compares the engine with the TransformerLens bridge, and both
with the HuggingFace model before it was wrapped, on random tokens.

That alone would prove little, because random initial weights hide most features. So each family also has small models
with weights scaled up, texts longer than the attention window and heads of odd sizes, and **each feature listed below
has been left out on purpose, and was noticed**. For runs under a mask the engine is compared with an independent
computation through hooks on the bridge, edge by edge.

The columns float64, float32 and bfloat16 give the deviation: the largest difference between the logits of the engine
(clean run, and run under a mask of ones) and those of the unwrapped model, divided by the largest logit, over all small
models of the family, rounded up to one digit. Where float64 is little better than float32, the model itself
computes its norms or its attention in float32. The weights are scaled up, so that bfloat16, which has two to three
digits, shows its worst; a real model's deviation is smaller.

With $L$ layers, $H$ heads, $K$ key-value heads and $s_l = 1 + l\\,(H + 1)$ the number of edges is

$$E = \\sum_{l < L} \\left[ (H + 2K)\\, s_l + s_l + H \\right] + s_L$$

In parallel blocks the MLP does not read its own layer's heads: without the $+ H$. Without MLPs:
$s_l = 1 + l H$ and $E = \\sum_{l < L} (H + 2K)\\, s_l + s_L$. Position embeddings as a writer of their own
(`split_input=true`) make each $s_l$ one larger; edges per position, for prompts of $S$ tokens, are $S$ times as many.
"""

REFUSED = """## Refused, by name

* Quantised weights (dequantise and save in float), LoRA adapters that are not merged (`merge_and_unload()`), models on
  the meta device or offloaded.
* Mixtures of experts, ALiBi, state-space models, encoder-decoders, multimodal models.
* Rotary scaling that depends on the length of the text (`dynamic`, `longrope`, such as Phi-3-mini-128k); `default`,
  `linear`, `llama3` and `yarn` are supported.
* Gemma 2, Gemma 3 and OLMo 2 with `attention_bias`: the output projection's bias would be inside the post-norm, part
  of no writer.
* opt-350m, whose norms are of the residual stream itself; stablelm-2-12b (`qk_layernorm`, a norm of its own for each
  head); Gemma 3 with `attn_logit_softcapping`, which HuggingFace's own model ignores.
* Bidirectional Gemma; cross-attention.
* For native models, every field that TransformerLens's own model ignores (`use_qk_norm`, `parallel_attn_mlp`,
  `use_local_attn`, ...), and legacy rotary checkpoints. Other checkpoints with HookedTransformer's names are computed by
  its definition, also where TransformerLens 4 differs: the attention scale, biases of gated MLPs.
* Models in memory with forward hooks, replaced functions, parametrised weights (`weight_norm`, pruning) or layers cut off
  without a word in the configuration.

A family is one function in `circuits/model/families`, a small model in `tests/modules.py`, and an entry in
`tests/features.py` for each of its features; `tests/published.json` has the whole `config.json` of well-known
checkpoints, each of which is tried as a tiny model.
"""


def deviations(dtype: torch.dtype) -> dict[str, float]:
    """For each family the engine's largest relative deviation from its unwrapped small models."""
    worst = dict.fromkeys(FAMILIES, 0.0)
    for name, model in tiny.models(dtype).items():
        engine, theirs = Engine(model), model.probe_logits.double()
        clean = engine.clean(tiny.from_tokens(model.probe_tokens))
        masked = engine.masked(
            tiny.from_tokens(model.probe_tokens),
            engine.graph.exists,
            engine.ablated(torch.zeros_like(clean.writers)),
        )
        for ours in (clean.logits, masked):
            difference = (ours.double() - theirs).abs().max() / theirs.abs().max()
            assert difference.isfinite(), name
            worst[name.split(",")[0]] = max(worst[name.split(",")[0]], difference.item())
    return worst


def one_digit(value: float) -> str:
    """The value with one digit, rounded up."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(value))
    digit = math.ceil(value / 10.0**exponent - 1e-6)
    return f"{digit}e{exponent}" if digit < 10 else f"1e{exponent + 1}"


def page() -> str:
    """The page."""
    head = "| family | architecture | " + " | ".join(DTYPES) + " | edges |"
    lines = [INTRODUCTION, "## Families", "", head, "|---" * (len(DTYPES) + 3) + "|"]
    measured = [deviations(dtype) for dtype in DTYPES.values()]
    for key, family in FAMILIES.items():
        worst = [one_digit(by_family[key]) for by_family in measured]
        known = ", ".join(f"{name} {graph.n_edges:,}" for name, graph in family.known.items())
        lines.append(
            f"| {family.title} | `{family.architecture}` | " + " | ".join(worst) + f" | {known} |"
        )
    lines += ["", "## Features proved", ""]
    features = [(name.split(",")[0], feature) for name, feature, _ in MUTATIONS]
    for key, group in itertools.groupby(
        features, key=lambda pair: pair[0] if pair[0] != "codegen" else "gptj"
    ):
        names = dict.fromkeys(feature for _, feature in group)
        title = "GPT-J and CodeGen" if key == "gptj" else FAMILIES[key].title
        lines.append(f"* **{title}**: {'; '.join(names)}.")
    return "\n".join([*lines, "", REFUSED])


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
    print(PAGE)
