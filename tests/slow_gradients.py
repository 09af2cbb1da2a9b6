"""Gradients at readers a second time: one forward pass written out, in which what a backward rule
takes for a number is detached, and an addend stands at each reader's own input.
"""

from __future__ import annotations

import torch

from circuits.engine import Engine
from circuits.model.attention import _rotate
from circuits.prompts import Prompts


def halved(x: torch.Tensor) -> torch.Tensor:
    return x / 2 + (x / 2).detach()


def slow_gradients(
    engine: Engine, prompts: Prompts, scalar, rule: str = "plain", replaced: dict | None = None
) -> torch.Tensor:
    """Gradients of `scalar(logits)` in an addend of each reader's own input, [R, B, S, D].

    `replaced` gives what `input`, the heads of a layer `a0` or an MLP `m0` write, as constants.
    """
    replaced = replaced or {}
    architecture, graph = engine.architecture, engine.graph
    plain, relp = rule == "plain", rule.startswith("relp")
    embedded = replaced.get("input", engine.embed(prompts).sum(0))
    addends = embedded.new_zeros(len(graph.readers), *embedded.shape).requires_grad_()

    def normed(norm, x):
        if norm is None or norm.kind == "none":
            return x
        weight, bias = (getattr(norm.module, name, None) for name in ("weight", "bias"))
        x = x - x.mean(-1, keepdim=True) if norm.kind == "layer" else x
        size = (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        y = x / (size if plain else size.detach())
        y = y if weight is None else y * (weight + norm.offset)
        return y if bias is None else y + bias

    def active(f, x):
        return x * (f(x) / x).detach() if relp else f(x)

    def product(x):
        return x if plain else halved(x)

    def softmax(scores):
        p = scores.softmax(-1)
        if rule == "relp":
            return p.detach()
        if rule != "gim":
            return p
        softer = (scores / 2).softmax(-1)
        return p.detach() + 2 * (softer - softer.detach())

    def heads(layer, x):
        block, first = architecture.blocks[layer], graph.first_reader(layer)
        attention, width = block.attention, architecture.head_width
        sides, row = [], first
        for name, count in (("q", graph.n_heads), ("k", graph.kv_heads), ("v", graph.kv_heads)):
            projection, own_norm = getattr(attention, name), getattr(attention, f"{name}_norm", 0)
            side = []
            for head in range(count):
                read = normed(block.norm1, x + addends[row + head])
                made = normed(projection.norm, read @ projection.weight.T + bias_of(projection))
                side.append(made[..., head * width : (head + 1) * width])
            side = torch.stack([normed(own_norm or None, one) for one in side])
            if attention.rotary is not None and name != "v":
                cos, sin = attention.rotary.tables(x.shape[1], x)
                side = _rotate(side, cos, sin, attention.rotary.pairs)
            sides.append(side)
            row += count
        return attended(attention, *sides)

    def attended(attention, q, k, v):
        k, v = (side.repeat_interleave(graph.kv_group, 0) for side in (k, v))
        scores = q @ k.mT * attention.scale
        scores = halved(scores) if rule == "gim" else scores
        if (cap := attention.soft_cap) is not None:
            scores = cap * torch.tanh(scores / cap)
        place = torch.arange(q.shape[2])
        back = place[:, None] - place
        allowed = (
            back >= 0 if graph.causal else prompts.key_mask[:, None, :].expand(-1, len(q[0, 0]), -1)
        )
        if attention.window is not None:
            allowed = allowed & (back < attention.window)
        z = softmax(scores.masked_fill(~allowed, float("-inf"))) @ v
        z = halved(z) if rule == "gim" else z
        return z.movedim(0, -2).flatten(-2) @ attention.o.weight.T + bias_of(attention.o)

    def feed_forward(block, x):
        mlp = block.mlp
        hidden = active(mlp.activation, (mlp.gate or mlp.up)(x))
        hidden = product(hidden * mlp.up(x)) if mlp.gate else hidden
        return normed(block.post_norm2, mlp.down(normed(mlp.inner_norm, hidden)))

    x = embedded
    for layer, block in enumerate(architecture.blocks):
        before = x
        x = x + replaced.get(f"a{layer}", normed(block.post_norm1, heads(layer, x)))
        if block.mlp is not None:
            own = addends[graph.first_reader(layer + 1) - 1]
            read = normed(block.norm2, (before if graph.parallel else x) + own)
            x = x + replaced.get(f"m{layer}", feed_forward(block, read))
    logits = architecture.unembedded(normed(architecture.final_norm, x + addends[-1]))
    at = prompts.positions.clamp(min=0)[..., None].expand(-1, -1, logits.shape[-1])
    return torch.autograd.grad(scalar(logits.gather(1, at)), addends)[0]


def bias_of(projection) -> torch.Tensor | float:
    return 0.0 if projection.bias is None else projection.bias
