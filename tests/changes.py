"""Changes of an architecture, each of which leaves out or alters one thing that it computes."""

from __future__ import annotations

import dataclasses
import functools

import torch

from circuits.model.architecture import Norm, Rotary


def each_part(which: str, **fields):
    """A change of one part of every block: its attention, its MLP or one of its norms."""

    def change(architecture):
        blocks = tuple(
            dataclasses.replace(
                block, **{which: dataclasses.replace(getattr(block, which), **fields)}
            )
            for block in architecture.blocks
        )
        return dataclasses.replace(architecture, blocks=blocks)

    return change


each_block = functools.partial(each_part, "attention")
each_mlp = functools.partial(each_part, "mlp")


def norms(which: str, **fields):
    if which != "final_norm":
        return each_part(which, **fields)
    return lambda architecture: dataclasses.replace(
        architecture, final_norm=dataclasses.replace(architecture.final_norm, **fields)
    )


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
