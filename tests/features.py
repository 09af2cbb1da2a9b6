"""Every feature of every family, each with the change of an architecture that leaves it out.

A feature counts as proved when the engine without it is noticed: `tests/test_engine.py` tries them
all, and `docs/architectures.md` lists them.
"""

from __future__ import annotations

import dataclasses

import torch

from circuits.model.architecture import Norm, Rotary


def each_block(**attention):
    def change(architecture):
        blocks = tuple(
            dataclasses.replace(block, attention=dataclasses.replace(block.attention, **attention))
            for block in architecture.blocks
        )
        return dataclasses.replace(architecture, blocks=blocks)

    return change


def each_mlp(**mlp):
    def change(architecture):
        blocks = tuple(
            dataclasses.replace(block, mlp=dataclasses.replace(block.mlp, **mlp))
            for block in architecture.blocks
        )
        return dataclasses.replace(architecture, blocks=blocks)

    return change


def norms(which: str, **fields):
    def change(architecture):
        if which == "final_norm":
            return dataclasses.replace(
                architecture, final_norm=dataclasses.replace(architecture.final_norm, **fields)
            )
        blocks = tuple(
            dataclasses.replace(
                block, **{which: dataclasses.replace(getattr(block, which), **fields)}
            )
            for block in architecture.blocks
        )
        return dataclasses.replace(architecture, blocks=blocks)

    return change


class WithoutBias(torch.nn.Module):
    bias = None

    def __init__(self, module):
        super().__init__()
        self.weight = module.weight


def no_bias(side: str):
    def change(architecture):
        blocks = []
        for block in architecture.blocks:
            linear = getattr(block.attention, side)
            bare = dataclasses.replace(linear, module=WithoutBias(linear.module))
            blocks.append(
                dataclasses.replace(
                    block, attention=dataclasses.replace(block.attention, **{side: bare})
                )
            )
        return dataclasses.replace(architecture, blocks=tuple(blocks))

    return change


def whole(**fields):
    return lambda architecture: dataclasses.replace(architecture, **fields)


def each_rotary(change):
    """A change of every layer's rotary positions, by the architecture."""

    def changed(architecture):
        blocks = []
        for block in architecture.blocks:
            turned = block.attention.rotary
            turned = None if turned is None else change(architecture, turned)
            attention = dataclasses.replace(block.attention, rotary=turned)
            blocks.append(dataclasses.replace(block, attention=attention))
        return dataclasses.replace(architecture, blocks=tuple(blocks))

    return changed


@each_rotary
def swapped_pairs(architecture, rotary):
    return Rotary(rotary.tables, "adjacent" if rotary.pairs == "halves" else "halves")


def each_layer(**fields):
    def change(architecture):
        blocks = tuple(dataclasses.replace(block, **fields) for block in architecture.blocks)
        return dataclasses.replace(architecture, blocks=blocks)

    return change


def block(layer: int, **attention):
    """A change of one layer's attention."""

    def change(architecture):
        blocks = list(architecture.blocks)
        changed = dataclasses.replace(blocks[layer].attention, **attention)
        blocks[layer] = dataclasses.replace(blocks[layer], attention=changed)
        return dataclasses.replace(architecture, blocks=tuple(blocks))

    return change


def graph(**fields):
    def change(architecture):
        return dataclasses.replace(
            architecture, graph=dataclasses.replace(architecture.graph, **fields)
        )

    return change


def shared_norm(architecture):
    blocks = tuple(dataclasses.replace(block, norm2=block.norm1) for block in architecture.blocks)
    return dataclasses.replace(architecture, blocks=blocks)


def other_norm2(architecture):
    """The MLP's norm is that of the next layer."""
    norms = [block.norm1 for block in architecture.blocks]
    pairs = zip(architecture.blocks, norms[1:] + norms[:1], strict=True)
    blocks = tuple(dataclasses.replace(block, norm2=norm) for block, norm in pairs)
    return dataclasses.replace(architecture, blocks=blocks)


@each_rotary
def full_rotary(architecture, rotary):
    """All coordinates rotate, not only the first."""

    def tables(positions, like):
        cos, sin = rotary.tables(positions, like)
        width = architecture.head_width
        return cos.repeat(1, width)[:, :width], sin.repeat(1, width)[:, :width]

    return Rotary(tables, rotary.pairs)


@each_rotary
def unscaled_rotary(architecture, rotary):
    """Rotations that keep lengths."""

    def tables(positions, like):
        cos, sin = rotary.tables(positions, like)
        length = (cos**2 + sin**2).sqrt()
        return cos / length, sin / length

    return Rotary(tables, rotary.pairs)


class Unscaled(torch.nn.Module):
    """An embedding without the scale that its module applies."""

    def __init__(self, module):
        super().__init__()
        self.weight = module.weight

    def forward(self, tokens):
        return torch.nn.functional.embedding(tokens, self.weight)


def unscaled_embedding(architecture):
    return dataclasses.replace(architecture, token=Unscaled(architecture.token))


def no_unembedding_bias(architecture):
    bare = dataclasses.replace(
        architecture.unembed, module=WithoutBias(architecture.unembed.module)
    )
    return dataclasses.replace(architecture, unembed=bare)


@each_rotary
def plain_rotary(architecture, rotary):
    """Angles position / 10000^(2 i / width), as without any scaling of positions."""

    def tables(positions, like):
        width = rotary.tables(positions, like)[0].shape[-1]
        frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=like.dtype) / width)
        angles = torch.arange(positions, dtype=like.dtype)[:, None] * frequencies
        halves = rotary.pairs == "halves"
        spread = angles.repeat(1, 2) if halves else angles.repeat_interleave(2, -1)
        return spread.cos(), spread.sin()

    return Rotary(tables, rotary.pairs)


def no_mlp_bias(side: str):
    def change(architecture):
        blocks = []
        for block in architecture.blocks:
            linear = getattr(block.mlp, side)
            bare = dataclasses.replace(linear, module=WithoutBias(linear.module))
            blocks.append(
                dataclasses.replace(block, mlp=dataclasses.replace(block.mlp, **{side: bare}))
            )
        return dataclasses.replace(architecture, blocks=tuple(blocks))

    return change


class Rolled(torch.nn.Module):
    """A projection whose heads have moved on by one."""

    def __init__(self, module, width):
        super().__init__()
        self.weight = module.weight.roll(width, 0)
        self.bias = None if module.bias is None else module.bias.roll(width, 0)


def other_groups(architecture):
    """Query heads read the next group's keys and values."""
    blocks = []
    for block in architecture.blocks:
        sides = {
            side: dataclasses.replace(
                getattr(block.attention, side),
                module=Rolled(getattr(block.attention, side).module, architecture.head_width),
            )
            for side in "kv"
        }
        blocks.append(
            dataclasses.replace(block, attention=dataclasses.replace(block.attention, **sides))
        )
    return dataclasses.replace(architecture, blocks=tuple(blocks))


def rotary_of_the_first(architecture):
    """All layers rotate as the first does."""
    return each_block(rotary=architecture.blocks[0].attention.rotary)(architecture)


def unscaled_linear(layer: int, factor: int):
    """Positions that are not divided by a factor, in one layer."""

    def change(architecture):
        rotary = architecture.blocks[layer].attention.rotary

        def tables(positions, like):
            cos, sin = rotary.tables(factor * positions, like)
            return cos[::factor], sin[::factor]

        return block(layer, rotary=Rotary(tables, rotary.pairs))(architecture)

    return change


def from_row_zero(architecture):
    """OPT's positions without what their table begins with."""
    return dataclasses.replace(architecture, position=Unscaled(architecture.position.table))


class ByHead(Norm):
    """A norm of each head's numbers alone, with the gains of a norm of all heads."""

    def __call__(self, x):
        gains = self.module.weight.unflatten(0, (-1, 6))
        x = x.unflatten(-1, (-1, 6))
        return (x * self.scale(x) * gains).flatten(-2)


def normed_together(side: str, make):
    """Another norm of a layer's queries or keys, where all heads are normed together."""

    def change(architecture):
        blocks = []
        for block in architecture.blocks:
            linear = getattr(block.attention, side)
            linear = dataclasses.replace(linear, norm=make(linear.norm))
            attention = dataclasses.replace(block.attention, **{side: linear})
            blocks.append(dataclasses.replace(block, attention=attention))
        return dataclasses.replace(architecture, blocks=tuple(blocks))

    return change


def by_head(norm):
    return ByHead(norm.kind, norm.eps, norm.module)


def gains_as_stored(side: str):
    """Norms of each head whose gains are not stored less 1."""

    def change(architecture):
        norm = getattr(architecture.blocks[0].attention, side)
        return each_block(**{side: dataclasses.replace(norm, offset=0.0)})(architecture)

    return change


def gate_and_up_swapped(architecture):
    blocks = []
    for block in architecture.blocks:
        mlp = dataclasses.replace(block.mlp, gate=block.mlp.up, up=block.mlp.gate)
        blocks.append(dataclasses.replace(block, mlp=mlp))
    return dataclasses.replace(architecture, blocks=tuple(blocks))


def exact_gelu(x):
    return torch.nn.functional.gelu(x)


def tanh_gelu(x):
    return torch.nn.functional.gelu(x, approximate="tanh")


NONE = Norm("none")

MUTATIONS = [
    ("gpt2", "learned positions", whole(position=None)),
    ("gpt2", "causal attention", graph(causal=False)),
    ("gpt2", "attention scale", each_block(scale=1.0)),
    ("gpt2", "LayerNorm", norms("norm2", kind="rms")),
    ("gpt2", "norm before attention", norms("norm1", kind="none")),
    ("gpt2", "norm epsilon", norms("norm1", eps=0.0)),
    ("gpt2", "gain and bias of the final norm", norms("final_norm", module=None)),
    ("gpt2", "tanh GELU", each_mlp(activation=exact_gelu)),
    *[("gpt2", f"bias of {side}", no_bias(side)) for side in "qvo"],
    *[("gpt2", f"MLP bias, {side}", no_mlp_bias(side)) for side in ("up", "down")],
    ("gpt2, scaled by layer", "attention scaled by layer", block(1, scale=0.5)),
    ("neox", "parallel blocks", graph(parallel=False)),
    ("neox, sequential", "sequential blocks", graph(parallel=True)),
    ("neox", "rotary positions", each_block(rotary=None)),
    ("neox", "rotary pairs in halves", swapped_pairs),
    ("neox", "partial rotary", full_rotary),
    ("neox", "a norm of its own before the MLP", shared_norm),
    ("neox", "norm epsilon", norms("norm1", eps=0.0)),
    ("neox", "exact GELU", each_mlp(activation=tanh_gelu)),
    ("neox", "attention scale", each_block(scale=1.0)),
    *[("neox", f"bias of {side}", no_bias(side)) for side in "qkvo"],
    *[("neox", f"MLP bias, {side}", no_mlp_bias(side)) for side in ("up", "down")],
    *[(name, "parallel blocks", graph(parallel=False)) for name in ("gptj", "codegen")],
    *[(name, "one norm for attention and MLP", other_norm2) for name in ("gptj", "codegen")],
    *[(name, "rotary pairs, adjacent", swapped_pairs) for name in ("gptj", "codegen")],
    *[(name, "partial rotary", full_rotary) for name in ("gptj", "codegen")],
    *[(name, "attention scale", each_block(scale=1.0)) for name in ("gptj", "codegen")],
    *[(name, "tanh GELU", each_mlp(activation=exact_gelu)) for name in ("gptj", "codegen")],
    *[(name, "MLP bias, down", no_mlp_bias("down")) for name in ("gptj", "codegen")],
    *[(name, "unembedding bias", no_unembedding_bias) for name in ("gptj", "codegen")],
    ("codegen", "order of the fused projections", other_groups),
    ("gptneo", "learned positions", whole(position=None)),
    ("gptneo", "scores without a scale", each_block(scale=0.5)),
    ("gptneo", "sliding window in local layers", block(1, window=None)),
    ("gptneo", "window with the query itself", block(1, window=5)),
    ("gptneo", "full attention in global layers", block(0, window=4)),
    ("gptneo", "LayerNorm", norms("norm2", kind="rms")),
    ("gptneo", "norm epsilon", norms("norm1", eps=0.0)),
    ("gptneo", "tanh GELU", each_mlp(activation=exact_gelu)),
    ("gptneo", "bias of o", no_bias("o")),
    *[("gptneo", f"MLP bias, {side}", no_mlp_bias(side)) for side in ("up", "down")],
    ("opt", "learned positions", whole(position=None)),
    ("opt", "positions from row 2 on", from_row_zero),
    ("opt", "attention scale", each_block(scale=1.0)),
    ("opt", "LayerNorm", norms("norm2", kind="rms")),
    ("opt", "ReLU", each_mlp(activation=exact_gelu)),
    *[("opt", f"bias of {side}", no_bias(side)) for side in "qvo"],
    *[("opt", f"MLP bias, {side}", no_mlp_bias(side)) for side in ("up", "down")],
    ("opt, without biases and gains", "norms without gains", norms("norm1", kind="none")),
    ("llama", "rotary positions", each_block(rotary=None)),
    ("llama", "rotary pairs in halves", swapped_pairs),
    ("llama", "grouped queries", other_groups),
    ("llama", "gated MLP", each_mlp(gate=None)),
    ("llama", "SiLU", each_mlp(activation=exact_gelu)),
    ("llama", "head width of its own", each_block(scale=3**-0.5)),
    ("llama", "RMSNorm", norms("final_norm", kind="layer")),
    ("llama", "norm epsilon", norms("norm1", eps=0.0)),
    *[("llama", f"bias of {side}", no_bias(side)) for side in "qkvo"],
    *[("llama", f"MLP bias, {side}", no_mlp_bias(side)) for side in ("gate", "up", "down")],
    ("llama, llama3 rotary", "llama3 rotary scaling", plain_rotary),
    ("llama, linear rotary", "linear rotary scaling", plain_rotary),
    ("mistral", "sliding window", each_block(window=None)),
    ("mistral", "window with the query itself", each_block(window=5)),
    ("mistral, no window", "no window", each_block(window=4)),
    ("mistral", "rotary positions", each_block(rotary=None)),
    ("mistral", "grouped queries", other_groups),
    ("qwen2, linear rotary", "linear rotary scaling", plain_rotary),
    ("qwen2", "sliding window in the upper layers", block(1, window=None)),
    ("qwen2", "full attention in the lower layers", block(0, window=4)),
    ("qwen2", "rotary positions", each_block(rotary=None)),
    *[("qwen2", f"bias of {side}", no_bias(side)) for side in "qkv"],
    ("qwen3", "norm of queries", each_block(q_norm=NONE)),
    ("qwen3", "norm of keys", each_block(k_norm=NONE)),
    ("qwen3", "sliding window in the upper layers", block(1, window=None)),
    ("qwen3", "head width of its own", each_block(scale=3**-0.5)),
    ("qwen3", "rotary positions", each_block(rotary=None)),
    *[("qwen3", f"bias of {side}", no_bias(side)) for side in "qkvo"],
    ("qwen3, yarn rotary", "yarn rotary scaling: frequencies", plain_rotary),
    ("qwen3, yarn rotary", "yarn rotary scaling: factor", unscaled_rotary),
    ("smollm3", "layers that do not rotate", rotary_of_the_first),
    ("smollm3", "layers that rotate", each_block(rotary=None)),
    ("smollm3", "sliding window in layers that do not rotate", block(1, window=None)),
    ("smollm3", "full attention in layers that rotate", block(0, window=4)),
    ("smollm3", "grouped queries", other_groups),
    ("smollm3", "head width of its own", each_block(scale=3**-0.5)),
    *[("smollm3", f"bias of {side}", no_bias(side)) for side in "qkvo"],
    *[("smollm3", f"MLP bias, {side}", no_mlp_bias(side)) for side in ("gate", "up", "down")],
    ("smollm3, yarn rotary", "yarn rotary scaling: frequencies", plain_rotary),
    ("smollm3, yarn rotary", "yarn rotary scaling: factor", unscaled_rotary),
    ("phi3", "sliding window", each_block(window=None)),
    ("phi3", "window with the query itself", each_block(window=5)),
    ("phi3, no window", "no window", each_block(window=4)),
    ("phi3", "rotary positions", each_block(rotary=None)),
    ("phi3", "rotary pairs in halves", swapped_pairs),
    ("phi3", "partial rotary", full_rotary),
    ("phi3", "grouped queries", other_groups),
    ("phi3", "order of the fused gate", gate_and_up_swapped),
    ("phi3", "SiLU", each_mlp(activation=exact_gelu)),
    ("phi3", "RMSNorm", norms("final_norm", kind="layer")),
    ("stablelm", "LayerNorm", norms("norm2", kind="rms")),
    ("stablelm", "norm epsilon", norms("norm1", eps=0.0)),
    ("stablelm", "a norm of its own before the MLP", shared_norm),
    ("stablelm", "rotary positions", each_block(rotary=None)),
    ("stablelm", "rotary pairs in halves", swapped_pairs),
    ("stablelm", "partial rotary", full_rotary),
    ("stablelm", "grouped queries", other_groups),
    ("stablelm", "gated MLP", each_mlp(gate=None)),
    ("stablelm", "SiLU", each_mlp(activation=exact_gelu)),
    *[("stablelm", f"bias of {side}", no_bias(side)) for side in "qkv"],
    ("stablelm, parallel", "parallel blocks", graph(parallel=False)),
    ("stablelm, parallel", "one norm for attention and MLP", other_norm2),
    ("olmo2", "no norm before attention", norms("norm1", kind="rms")),
    ("olmo2", "no norm before the MLP", norms("norm2", kind="rms")),
    ("olmo2", "post-norm of attention", each_layer(post_norm1=None)),
    ("olmo2", "post-norm of the MLP", each_layer(post_norm2=None)),
    ("olmo2", "post-norm epsilon", norms("post_norm1", eps=0.0)),
    ("olmo2", "queries normed together", normed_together("q", by_head)),
    ("olmo2", "keys normed together", normed_together("k", by_head)),
    ("olmo2", "norm of queries", normed_together("q", lambda norm: None)),
    ("olmo2", "norm of keys", normed_together("k", lambda norm: None)),
    ("olmo2", "rotary positions", each_block(rotary=None)),
    ("olmo2", "grouped queries", other_groups),
    ("olmo2", "gated MLP", each_mlp(gate=None)),
    ("gemma", "scaled embedding", unscaled_embedding),
    ("gemma", "gains stored less 1", norms("norm1", offset=0.0)),
    ("gemma", "final gain stored less 1", norms("final_norm", offset=0.0)),
    ("gemma", "tanh GELU", each_mlp(activation=torch.nn.functional.silu)),
    ("gemma", "gated MLP", each_mlp(gate=None)),
    ("gemma", "rotary positions", each_block(rotary=None)),
    *[("gemma", f"bias of {side}", no_bias(side)) for side in "qkvo"],
    ("gemma2", "scaled embedding", unscaled_embedding),
    ("gemma2", "gains stored less 1", norms("norm2", offset=0.0)),
    ("gemma2", "post-norm of attention", each_layer(post_norm1=None)),
    ("gemma2", "post-norm of the MLP", each_layer(post_norm2=None)),
    ("gemma2", "post-norm epsilon", norms("post_norm1", eps=0.0)),
    ("gemma2", "attention soft-cap", each_block(soft_cap=None)),
    ("gemma2", "logit soft-cap", whole(logit_cap=None)),
    ("gemma2", "sliding window in even layers", block(0, window=None)),
    ("gemma2", "full attention in odd layers", block(1, window=4)),
    ("gemma2", "query_pre_attn_scalar", each_block(scale=6**-0.5)),
    ("gemma2", "rotary positions", each_block(rotary=None)),
    ("gemma3", "scaled embedding", unscaled_embedding),
    ("gemma3", "gains stored less 1", norms("norm2", offset=0.0)),
    ("gemma3", "gains of queries stored less 1", gains_as_stored("q_norm")),
    ("gemma3", "gains of keys stored less 1", gains_as_stored("k_norm")),
    ("gemma3", "norm of queries", each_block(q_norm=NONE)),
    ("gemma3", "norm of keys", each_block(k_norm=NONE)),
    ("gemma3", "post-norm of attention", each_layer(post_norm1=None)),
    ("gemma3", "post-norm of the MLP", each_layer(post_norm2=None)),
    ("gemma3", "sliding window in layers of that type", block(0, window=None)),
    ("gemma3", "full attention in the others", block(1, window=4)),
    ("gemma3", "rotary positions", each_block(rotary=None)),
    ("gemma3", "rotary frequencies of each type of layer", rotary_of_the_first),
    ("gemma3", "query_pre_attn_scalar", each_block(scale=6**-0.5)),
    ("gemma3, linear rotary", "linear rotary scaling in layers of full attention", unscaled_linear(1, 3)),
    ("gemma3, linear rotary", "logit soft-cap", whole(logit_cap=None)),
    ("native, layer norm", "causal attention", graph(causal=False)),
    ("native, bidirectional", "bidirectional attention", graph(causal=True)),
    ("native, layer norm", "learned positions", whole(position=None)),
    ("native, rotary", "rotary positions", each_block(rotary=None)),
    ("native, rotary", "rotary pairs, adjacent", swapped_pairs),
    ("native, grouped queries", "grouped queries", other_groups),
    ("native, attention scale", "attn_scale", each_block(scale=5**-0.5)),
    ("native, soft caps", "attention soft-cap", each_block(soft_cap=None)),
    ("native, soft caps", "logit soft-cap", whole(logit_cap=None)),
    ("native, layer norm, no parameters", "norm without parameters", norms("norm1", kind="none")),
    ("native, no norm", "no norm", norms("norm1", kind="layer")),
    ("native, final rms", "RMSNorm at the end only", norms("final_norm", kind="layer")),
    ("native, gated", "gated MLP", each_mlp(gate=None)),
    ("native, solu_ln", "SoLU with its norm", each_mlp(inner_norm=None)),
    ("native, relu", "ReLU", each_mlp(activation=exact_gelu)),
    ("native, gelu_new", "tanh GELU", each_mlp(activation=exact_gelu)),
]
