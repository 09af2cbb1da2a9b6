"""Attention of each head over its own queries, keys and values.

    z_h = softmax(cap(scale * rotate(norm(q_h)) . rotate(norm(k_h))) + allowed) v_h

Readers have their own inputs, so that heads come first and share nothing; what an architecture lacks of the above
(norm, rotary positions, soft-cap, window) is left out.

Shapes: N flattened batch, pos S, head width E.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.architecture import Architecture, Attention


def attend(
    architecture: Architecture,
    attention: Attention,
    q: Float[Tensor, "heads N S E"],
    k: Float[Tensor, "kv N S E"],
    v: Float[Tensor, "kv N S E"],
    key_mask: Bool[Tensor, "N S"] | None,
    kv_of_head: list[int] | None = None,
) -> Float[Tensor, "heads N S E"]:
    """Returns what each head moves, before its output projection.

    Args:
        key_mask: True on real tokens; only bidirectional models need it, since padding is on the right.
        kv_of_head: for each query head its place among the key-value heads; None: they are in equal groups.
    """
    if attention.q_norm is not None and attention.k_norm is not None:
        q, k = attention.q_norm(q), attention.k_norm(k)
    if architecture.rotary is not None:
        cos, sin = architecture.rotary.tables(q.shape[-2], q)
        q, k = (_rotate(x, cos, sin, architecture.rotary.pairs) for x in (q, k))
    if kv_of_head is not None:
        k, v = k[kv_of_head], v[kv_of_head]
    elif len(k) != len(q):
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    n_positions, causal = q.shape[-2], architecture.graph.causal
    windowed = attention.window is not None and attention.window < n_positions
    plain = not windowed and (causal or key_mask is None)
    if plain and attention.soft_cap is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=attention.scale)
    allowed = q.new_ones(n_positions, n_positions, dtype=torch.bool)
    if causal:
        allowed = allowed.tril()
    if windowed and attention.window is not None:
        allowed = allowed.triu(1 - attention.window)
    if key_mask is not None and not causal:
        allowed = allowed & key_mask[:, None, :]
    if attention.soft_cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=attention.scale)
    scores = q @ k.mT * attention.scale
    scores = attention.soft_cap * torch.tanh(scores / attention.soft_cap)
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v


def _rotate(x: Float[Tensor, "heads N S E"], cos: Tensor, sin: Tensor, pairs: str) -> Tensor:
    """Rotates the first `cos.shape[-1]` coordinates of each head by position."""
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if pairs == "halves":
        first, second = turned.chunk(2, -1)
        quarter = torch.cat((-second, first), -1)
    else:
        quarter = torch.stack((-turned[..., 1::2], turned[..., 0::2]), -1).flatten(-2)
    turned = turned * cos + quarter * sin
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned
