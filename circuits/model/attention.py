"""Attention of each head over its own queries, keys and values.

    z_h = softmax(cap(scale * rotate(norm(q_h)) . rotate(norm(k_h))) + allowed) v_h

Readers have their own inputs, so that heads come first and share nothing; what an architecture
lacks of the above (norm, rotary positions, soft-cap, window) is left out.

Shapes: N flattened batch, pos S, queries Q, head width E, chosen positions P.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.model.architecture import Architecture, Attention
from circuits.model.surrogate import with_gradient_of

Pair = tuple[Tensor, Tensor]


def attend(
    architecture: Architecture,
    attention: Attention,
    q: Float[Tensor, "heads N Q E"],
    k: Float[Tensor, "kv N S E"],
    v: Float[Tensor, "kv N S E"],
    key_mask: Bool[Tensor, "N S"] | None,
    kv_of_head: list[int] | None = None,
    at: Int[Tensor, "N P"] | None = None,
) -> Float[Tensor, "heads N Q E"]:
    """Returns what each head moves, before its output projection.

    Args:
        key_mask: True on real tokens; needed by bidirectional models, as padding is on the right.
        kv_of_head: each query head's place among the key-value heads; None: in equal groups.
        at: the positions of the queries, Q = P; None: they are at all of them, Q = S.
    """
    if attention.pattern is not None or attention.product is not None:
        assert at is None, "rules of the backward pass are for plain runs, at all positions"
        return _with_other_gradient(architecture, attention, q, k, v, key_mask, kv_of_head)
    q, k = _positioned(attention, q, k, at)
    k, v = (_per_head(x, len(q), kv_of_head) for x in (k, v))
    n_positions, causal = k.shape[-2], architecture.graph.causal
    windowed = attention.window is not None and attention.window < n_positions
    everywhere = at is None or not causal
    plain = everywhere and not windowed and (causal or key_mask is None)
    if plain and attention.soft_cap is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=attention.scale)
    allowed = _allowed(architecture, attention, k, key_mask)
    if at is not None:
        allowed = _rows(allowed, at)
    if attention.soft_cap is None:
        if allowed.ndim == 3:
            allowed = allowed[None]  # with 3 axes the CPU would hold all scores at once
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=attention.scale)
    return _scores(attention, q, k).masked_fill(~allowed, float("-inf")).softmax(-1) @ v


def _with_other_gradient(
    architecture: Architecture,
    attention: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    kv_of_head: list[int] | None,
) -> Tensor:
    """`attend`, with the gradients that `attention` says."""
    own = replace(attention, pattern=None, product=None)
    pattern = attention.pattern or _softmax
    product = attention.product or _as_it_is

    def value(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(architecture, own, q, k, v, key_mask, kv_of_head)

    def surrogate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = _positioned(own, q, k)
        k, v = (_per_head(x, len(q), kv_of_head) for x in (k, v))
        allowed = _allowed(architecture, own, q, key_mask)
        scores = product(_scores(own, q, k)).masked_fill(~allowed, float("-inf"))
        return product(pattern(scores) @ v)

    return with_gradient_of(surrogate, value, q, k, v)


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


def _as_it_is(product: Tensor) -> Tensor:
    return product


def attention_scores(
    architecture: Architecture,
    attention: Attention,
    q: Float[Tensor, "heads N S E"],
    k: Float[Tensor, "kv N S E"],
    key_mask: Bool[Tensor, "N S"] | None,
    kv_of_head: list[int] | None = None,
    *,
    at: Int[Tensor, "N P"],
) -> Float[Tensor, "heads N P S"]:
    """What the softmax of `attend` is taken of, for queries at some positions; -inf if forbidden.

    Padding is not told apart where the model does not: on the right of a causal model's tokens.
    """
    q, k = _positioned(attention, q, k)
    rows = torch.arange(len(at), device=at.device)[:, None]
    allowed = _rows(_allowed(architecture, attention, k, key_mask), at)
    scores = _scores(attention, q[:, rows, at], _per_head(k, len(q), kv_of_head))
    return scores.masked_fill(~allowed, float("-inf"))


def _positioned(attention: Attention, q: Tensor, k: Tensor, at: Tensor | None = None) -> Pair:
    """Queries and keys as they are compared: normed and rotated where the model does so."""
    if attention.q_norm is not None and attention.k_norm is not None:
        q, k = attention.q_norm(q), attention.k_norm(k)
    if attention.rotary is not None:
        cos, sin = attention.rotary.tables(k.shape[-2], k)
        tables = (cos, sin) if at is None else (cos[at], sin[at])
        q = _rotate(q, *tables, attention.rotary.pairs)
        k = _rotate(k, cos, sin, attention.rotary.pairs)
    return q, k


def _per_head(x: Tensor, n_heads: int, kv_of_head: list[int] | None) -> Tensor:
    """Keys or values once for each query head that reads them."""
    if kv_of_head is not None:
        return x[kv_of_head]
    return x if len(x) == n_heads else x.repeat_interleave(n_heads // len(x), 0)


def _allowed(
    architecture: Architecture, attention: Attention, k: Tensor, key_mask: Tensor | None
) -> Tensor:
    """Which query may look at which key, [S, S] or [N, S, S]."""
    n_positions, causal = k.shape[-2], architecture.graph.causal
    allowed = k.new_ones(n_positions, n_positions, dtype=torch.bool)
    if causal:
        allowed = allowed.tril()
    if attention.window is not None and attention.window < n_positions:
        allowed = allowed.triu(1 - attention.window)
    if key_mask is not None and not causal:
        allowed = allowed & key_mask[:, None, :]
    return allowed


def _rows(allowed: Bool[Tensor, "*N S S"], at: Int[Tensor, "N P"]) -> Bool[Tensor, "N P S"]:
    """What queries at some positions may look at."""
    if allowed.ndim == 2:
        return allowed[at]
    return allowed[torch.arange(len(at), device=at.device)[:, None], at]


def _scores(attention: Attention, q: Tensor, k: Tensor) -> Tensor:
    scores, cap = q @ k.mT * attention.scale, attention.soft_cap
    return scores if cap is None else cap * torch.tanh(scores / cap)


def _rotate(x: Float[Tensor, "heads N S E"], cos: Tensor, sin: Tensor, pairs: str) -> Tensor:
    """Rotates the first `cos.shape[-1]` coordinates of each head by position."""
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if pairs == "halves":
        first, second = turned.chunk(2, -1)
        quarter = torch.cat((-second, first), -1)
    else:
        quarter = torch.stack((-turned[..., 1::2], turned[..., 0::2]), -1).flatten(-2)
    turned = (turned * cos + quarter * sin).to(x.dtype)  # OLMo 2 rotates in float32 at least
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned
