"""From a program and options to the weights of a model: layout, rotation, state dict.

The rotation Q acts on row vectors: what is written as x is written as x Q, a reader W becomes W Q,
and a variable in the dimensions d of the layout is spanned by the rows Q[d].

Shapes: d_model D, heads H, head width E, neurons N, vocabulary V.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from abstraction.ground_truth.native import attention_direction, native
from abstraction.ground_truth.options import Options
from abstraction.ground_truth.placement import Place
from abstraction.ground_truth.program import Program
from abstraction.ground_truth.steps import Attend
from abstraction.ground_truth.weights import Head, Layout, Neurons, head, neurons
from circuits.model.load import LoadedModel

CONSTANT = 2.0**14  # what the constant dimension holds, under RMS normalisation
_EPS = 1e-5
SCALE = 0.5  # standard deviation of distractors' weights


def lay_out(program: Program, options: Options, width: int) -> Layout:
    """Returns which dimensions hold which variable."""
    dims, first = {}, 0
    for name, size in program.sizes.items():
        dims[name] = range(first, first + (1 if size is None else size))
        first = dims[name].stop
    junk = range(first, first + options.junk_width)
    return Layout(dims, junk, width - 1 if options.norm == "rms" else None, width)


def rotation(layout: Layout, options: Options) -> Float[Tensor, "D D"]:
    """Returns the orthogonal matrix that turns the residual stream, but not its constant."""
    turned = torch.eye(layout.width, dtype=torch.float64)
    if options.rotate:
        size = layout.width - (layout.constant is not None)
        generator = torch.Generator().manual_seed(options.seed)
        q, r = torch.linalg.qr(_normal(size, size, generator=generator))
        # uniformly distributed over the rotations and reflections
        turned[:size, :size] = q * r.diagonal().sign()
    return turned


def build(
    program: Program,
    options: Options,
    places: Mapping[str, Place],
    layout: Layout,
    turn: Float[Tensor, "D D"],
    size: Mapping[str, int],
) -> LoadedModel:
    """Returns the model."""
    generator = torch.Generator().manual_seed(options.seed + 1)
    tensors = _embeddings(program, options, layout, turn)
    for layer in range(size["n_layers"]):
        here = [program.by_name[name] for name, place in places.items() if place.layer == layer]
        heads = {
            index: head(program, step, layout, size["d_head"])
            for step in here
            if isinstance(step, Attend)
            for index in places[step.name].heads
        }
        free = [index for index in range(size["n_heads"]) if index not in heads]
        for index in free[: options.distractor_heads]:
            heads[index] = _distracting_head(layout, size["d_head"], generator)
        steps = [step for step in here if not isinstance(step, Attend)]
        blocks = [neurons(program, step, layout, options.votes) for step in steps]
        blocks.append(_distracting_neurons(layout, options.distractor_neurons, generator))
        tensors |= _layer(f"blocks.{layer}", heads, blocks, size, turn)
    return compiled_model(program, options, size, {**tensors, **_norms(layout, size["n_layers"])})


def compiled_model(
    program: Program, options: Options, size: Mapping[str, int], tensors: Mapping[str, Tensor]
) -> LoadedModel:
    """Returns a native model of these sizes with these weights."""
    fields = {
        **size,
        "n_ctx": program.length,
        "d_vocab": len(program.tokens),
        "act_fn": "relu",
        "eps": _EPS,
        "normalization_type": "RMS" if options.norm == "rms" else None,
        "attention_dir": attention_direction(program.causal),
        "dtype": options.dtype,
        "device": options.device,
    }
    return replace(native(fields, tensors, program.name), split_input=options.split_input)


def _norms(layout: Layout, n_layers: int) -> dict[str, Tensor]:
    """Weights that undo the division by the constant, where there is one."""
    if layout.constant is None:
        return {}
    scale = math.sqrt(CONSTANT**2 / layout.width + _EPS)
    inner = [f"blocks.{layer}.{norm}" for layer in range(n_layers) for norm in ("ln1", "ln2")]
    return {f"{norm}.weight": torch.full((layout.width,), scale) for norm in [*inner, "ln_final"]}


def _embeddings(
    program: Program, options: Options, layout: Layout, turn: Tensor
) -> dict[str, Tensor]:
    position = layout.reader("position")
    if layout.constant is not None:
        position[:, layout.constant] = CONSTANT
    ids = torch.tensor([program.tokens.index(name) for name in program.answers])
    unembed = _zeros(len(program.tokens), layout.width)
    unembed.index_add_(0, ids, options.logit * layout.reader(program.output))
    return {
        "embed.weight": layout.reader("token") @ turn,
        "pos_embed.weight": position @ turn,
        "unembed.weight": unembed @ turn,
        "unembed.bias": torch.zeros(len(program.tokens)),
    }


def _layer(
    name: str,
    heads: Mapping[int, Head],
    blocks: list[Neurons],
    size: Mapping[str, int],
    turn: Tensor,
) -> dict[str, Tensor]:
    width, d_head, n_heads = len(turn), size["d_head"], size["n_heads"]
    q, k, v = (_zeros(n_heads, d_head, width) for _ in range(3))
    q_bias, o = _zeros(n_heads, d_head), _zeros(width, n_heads, d_head)
    for index, one in heads.items():
        q[index], k[index], v[index], o[:, index] = one.q, one.k, one.v, one.o
        q_bias[index] = one.q_bias
    idle = size["d_mlp"] - sum(len(block.bias) for block in blocks)
    into = torch.cat([*(block.into for block in blocks), _zeros(idle, width)])
    bias = torch.cat([*(block.bias for block in blocks), _zeros(idle)])
    out = torch.cat([*(block.out for block in blocks), _zeros(idle, width)])
    return {
        f"{name}.attn.q.weight": q.flatten(0, 1) @ turn,
        f"{name}.attn.q.bias": q_bias.flatten(),
        f"{name}.attn.k.weight": k.flatten(0, 1) @ turn,
        f"{name}.attn.k.bias": _zeros(n_heads * d_head),
        f"{name}.attn.v.weight": v.flatten(0, 1) @ turn,
        f"{name}.attn.v.bias": _zeros(n_heads * d_head),
        f"{name}.attn.o.weight": turn.T @ o.flatten(1),
        f"{name}.attn.o.bias": _zeros(width),
        f"{name}.mlp.in.weight": into @ turn,
        f"{name}.mlp.in.bias": bias,
        f"{name}.mlp.out.weight": turn.T @ out.T,
        f"{name}.mlp.out.bias": torch.stack([block.out_bias for block in blocks]).sum(0) @ turn,
    }


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


def _normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


# ---- distractors: they read everything but the constant, and write into the junk dimensions ------


def _random(rows: int, layout: Layout, generator: torch.Generator) -> Float[Tensor, "rows D"]:
    values = SCALE * _normal(rows, layout.width, generator=generator)
    if layout.constant is not None:
        values[:, layout.constant] = 0
    return values


def _into_junk(rows: int, layout: Layout, generator: torch.Generator) -> Float[Tensor, "rows D"]:
    values = _zeros(rows, layout.width)
    values[:, list(layout.junk)] = _normal(rows, len(layout.junk), generator=generator)
    return values / max(rows, 1) ** 0.5


def _distracting_head(layout: Layout, d_head: int, generator: torch.Generator) -> Head:
    q, k, v = (_random(d_head, layout, generator) for _ in range(3))
    bias = _normal(d_head, generator=generator)
    return Head(q, bias, k, v, _into_junk(d_head, layout, generator).T)


def _distracting_neurons(layout: Layout, count: int, generator: torch.Generator) -> Neurons:
    bias, into = SCALE * _normal(count, generator=generator), _random(count, layout, generator)
    return Neurons(into, bias, _into_junk(count, layout, generator), _zeros(layout.width))
