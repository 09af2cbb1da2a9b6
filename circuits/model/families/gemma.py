"""Gemma: scaled embeddings, gains stored less 1; later post-norms, soft-caps and windows."""

from __future__ import annotations

from typing import Any

from circuits.model.architecture import Architecture, Rotary
from circuits.model.families.llama import COMMON, LAYERED, decoder, windows_by_layer
from circuits.model.families.parts import refuse_unknown, rotary

# A bias of the output projection would be inside the post-norm: attention_bias stays refused.
_POST_NORMED = LAYERED + (
    "hidden_activation query_pre_attn_scalar final_logit_softcapping cache_implementation "
)
_GEMMA2 = _POST_NORMED + "attn_logit_softcapping"
# attn_logit_softcapping stays refused: HuggingFace's Gemma 3 ignores it, its bridge does not.
_GEMMA3 = _POST_NORMED + "rope_local_base_freq sliding_window_pattern _sliding_window_pattern"


def gemma(bridge: Any, config: Any) -> Architecture:
    """Gemma 1 (Gemma Team 2024): scaled embeddings, gains stored less 1."""
    refuse_unknown("Gemma", config, COMMON + "attention_bias hidden_activation")
    return decoder("Gemma", bridge, config, offset=1.0)


def gemma2(bridge: Any, config: Any) -> Architecture:
    """Gemma 2 (Gemma Team 2024): also post-norms, soft-caps, windows, its own attention scale."""
    refuse_unknown("Gemma 2", config, _GEMMA2)
    change = windows_by_layer("Gemma 2", config)
    return decoder("Gemma 2", bridge, config, offset=1.0, change=change)


def gemma3(bridge: Any, config: Any) -> Architecture:
    """Gemma 3, text alone (Gemma Team 2025): norms of queries and keys, rotary by layer type."""
    refuse_unknown("Gemma 3", config, _GEMMA3)
    change, kinds = windows_by_layer("Gemma 3", config), config.layer_types
    by_kind = {kind: rotary("Gemma 3", bridge, config, kind) for kind in set(kinds)}

    def positions(layer: int) -> Rotary:
        return by_kind[kinds[layer]]

    return decoder("Gemma 3", bridge, config, offset=1.0, change=change, positions=positions)
