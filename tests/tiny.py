"""Tiny models with weights scaled up, so that every feature of their architecture shows in the
logits.
"""

from __future__ import annotations

import random

import torch

from circuits.ablation import ABLATIONS
from circuits.engine import Engine
from circuits.model.load import LoadedModel, from_bridge, from_module
from circuits.prompts import Prompts, prompts_from_records
from tests.modules import (
    HUGGINGFACE,
    HUGGINGFACE_VARIANTS,
    gpt2_module,
    llama_module,
    scaled_up,
)

UNTRAINED = tuple(name for name, kind in ABLATIONS.items() if not kind.learned)


def from_tokens(
    tokens: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> Prompts:
    """Token ids as prompts that are scored everywhere, or at some positions."""
    lengths = None if key_mask is None else key_mask.sum(1)
    return Prompts.from_tokens(tokens, lengths=lengths, positions=positions)


def native_bridge(dtype: torch.dtype = torch.float64, **changes):
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    fields = {
        "d_model": 12,
        "d_head": 5,
        "n_heads": 3,
        "n_layers": 2,
        "n_ctx": 16,
        "d_vocab": 29,
        "act_fn": "gelu",
        "d_mlp": 20,
        "architecture": "TransformerLensNative",
        "dtype": dtype,
        "eps": 1e-2,
    }
    bridge = TransformerBridge.boot_native(TransformerBridgeConfig(**{**fields, **changes}))
    bridge.original_model.to(dtype)
    scaled_up(bridge)
    bias = bridge.unembed.original_component.bias
    bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(1)))
    return bridge


def gpt2(dtype: torch.dtype = torch.float64, **changes) -> LoadedModel:
    return from_module(gpt2_module(**changes).to(dtype))


def llama(dtype: torch.dtype = torch.float64, **changes) -> LoadedModel:
    return from_module(llama_module(**changes).to(dtype))


def huggingface(name: str, dtype: torch.dtype = torch.float64, **changes) -> LoadedModel:
    return from_module(HUGGINGFACE[name](**changes).to(dtype))


def native(dtype: torch.dtype = torch.float64, **changes) -> LoadedModel:
    return from_bridge(native_bridge(dtype, **changes))


NATIVE_VARIANTS = {
    "layer norm": {},
    "layer norm, no parameters": {"normalization_type": "LNPre"},
    "rms norm": {"normalization_type": "RMS"},
    "no norm": {"normalization_type": None},
    "final rms": {"final_rms": True},
    "bidirectional": {"attention_dir": "bidirectional"},
    "attention only": {"attn_only": True},
    "gated": {"gated_mlp": True, "act_fn": "silu"},
    "grouped queries": {"n_heads": 4, "n_key_value_heads": 2},
    "rotary": {"positional_embedding_type": "rotary", "rotary_dim": 4},
    "soft caps": {"attn_scores_soft_cap": 2.0, "output_logits_soft_cap": 3.0},
    "relu": {"act_fn": "relu"},
    "gelu_new": {"act_fn": "gelu_new"},
    "solu_ln": {"act_fn": "solu_ln"},
    "attention scale": {"attn_scale": 1.7},
}


def models(dtype: torch.dtype = torch.float64) -> dict[str, LoadedModel]:
    """One model of each family and variant; a name is its family, then a comma and the variant."""
    families = {
        name: huggingface(name.split(",")[0], dtype, **changes)
        for name, changes in HUGGINGFACE_VARIANTS.items()
    }
    return {
        **families,
        **{
            f"native, {name}": native(dtype, **changes) for name, changes in NATIVE_VARIANTS.items()
        },
    }


def records(
    count: int, seed: int = 0, *, shortest: int = 4, longest: int = 9, vocabulary: int = 29
) -> list[dict]:
    """Random prompts of different lengths: a corrupt twin; 1 to 3 scored positions, answers and
    wrong answers.
    """
    draw = random.Random(seed)
    made = []
    for number in range(count):
        length = draw.randint(shortest, longest)
        clean, corrupt = ([draw.randrange(vocabulary) for _ in range(length)] for _ in range(2))
        positions = draw.sample(range(length), draw.randint(1, 3))
        tokens = [draw.sample(range(vocabulary), 6) for _ in positions]
        answers = [here[: draw.randint(1, 3)] for here in tokens]
        wrong = [here[3 : draw.randint(4, 6)] for here in tokens]
        made.append(
            {
                "clean": clean,
                "corrupt": corrupt,
                "positions": positions,
                "answers": answers,
                "wrong_answers": wrong,
                "id": f"{seed}.{number}",
            }
        )
    return made


def prompts(count: int = 5, seed: int = 0, **changes) -> Prompts:
    return prompts_from_records(records(count, seed, **changes))


def with_own_answers(engine: Engine, records: list[dict]) -> list[dict]:
    """The same prompts; the answer is the token that the clean prompt favours most over the corrupt
    one.
    """
    changed = []
    for record in records:
        clean, corrupt = engine.logits(
            from_tokens(torch.tensor([record["clean"], record["corrupt"]]))
        )[:, record["positions"]]
        order = (clean - corrupt).argsort(descending=True)  # [positions, V]
        answers, wrong = order[:, :1].tolist(), order[:, -1:].tolist()
        changed.append({**record, "answers": answers, "wrong_answers": wrong})
    return changed
