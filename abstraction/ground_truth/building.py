"""From a program and options to the weights of a model: sizes, layout of the residual stream,
rotation, state dict.

The rotation Q acts on row vectors: what is written as x is written as x Q, and a reader W becomes W
Q.  A variable in the dimensions d of the layout is then spanned by the rows Q[d].

Shapes: d_model D, heads H, head width E, neurons N, vocabulary V.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from abstraction.ground_truth.placement import Place
from abstraction.ground_truth.placement import neurons as neuron_count
from abstraction.ground_truth.program import Attend, Lookup, Program
from abstraction.ground_truth.weights import (
    LONGEST,
    Head,
    Layout,
    Neurons,
    Votes,
    head,
    head_width,
    neurons,
)
from circuits.model.load import LoadedModel, from_bridge

CONSTANT = 2.0**14  # what the constant dimension holds, under RMS normalisation
_EPS = 1e-5
SCALE = 0.5  # standard deviation of distractors' weights


@dataclass(frozen=True)
class Options:
    """How to compile.  Sizes left at None are as small as the program allows."""

    n_layers: int | None = None
    n_heads: int | None = None  # distractors included
    d_model: int | None = None
    d_head: int | None = None
    d_mlp: int | None = None  # distractors included
    norm: str = "none"  # none or rms
    rotate: bool = False  # the residual stream, at random
    distractor_heads: int = 0  # per layer
    distractor_neurons: int = 0  # per MLP
    junk: int = 8  # dimensions that distractors write into
    redundant: str | None = None  # a variable that several heads compute
    copies: int = 2  # how many
    needed: int = 1  # how many of them its readers need
    logit: float = 10.0  # of the answer; all others have 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"  # any torch device
    split_input: bool = False  # the engine takes token and position embedding as two writers
    seed: int = 0  # of rotation and distractors

    @property
    def votes(self) -> Votes:
        return (
            Votes() if self.redundant is None else Votes(self.redundant, self.copies, self.needed)
        )


def check_options(program: Program, options: Options) -> None:
    """Raises ValueError for options that this program cannot be compiled with."""
    if options.norm not in ("none", "rms"):
        raise ValueError(f"norm={options.norm!r}, but it must be none or rms")
    if program.length > LONGEST:
        raise ValueError(
            f"length={program.length}, but attention is hard only up to {LONGEST} tokens; shorten "
            "it"
        )
    for name in ("distractor_heads", "distractor_neurons"):
        if getattr(options, name) < 0:
            raise ValueError(f"{name}={getattr(options, name)}, but it cannot be below 0")
    if options.junk < 1:
        raise ValueError(
            f"junk={options.junk}, but distractors need at least 1 dimension to write into"
        )
    if options.redundant is not None:
        _check_redundancy(program, options, options.redundant)


def _check_redundancy(program: Program, options: Options, name: str) -> None:
    if not isinstance(program.by_name.get(name), Attend) or program.sizes[name] is None:
        able = [
            s.name
            for s in program.steps
            if isinstance(s, Attend) and program.sizes[s.name] is not None
        ]
        raise ValueError(
            f"redundant={name!r} is no categorical variable that a head computes; those are {able}"
        )
    if not 1 <= options.needed < options.copies:
        raise ValueError(
            f"copies={options.copies}, needed={options.needed}: it must be 1 <= needed < copies"
        )
    for step in program.steps:
        matched = isinstance(step, Attend) and name in (step.key, step.query) and step.value != name
        if name not in step.parents or (isinstance(step, Lookup) and step.inputs.count(name) == 1):
            continue
        if not matched or options.needed > 1:
            raise ValueError(
                f"redundant={name!r} cannot be read by step {step.name!r}: only lookups count "
                "votes, and heads that "
                "match on it with needed=1"
            )
    if name == program.output:
        raise ValueError(f"redundant={name!r} is the output, and logits do not count votes")


def sizes(program: Program, options: Options, places: Mapping[str, Place]) -> dict[str, int]:
    """Returns the model's sizes: those given, or the smallest that do.

    Raises:
        ValueError: one that is given is too small; the message names all that are needed.
    """
    layers = [place.layer for place in places.values()]
    heads = [max((*place.heads, -1)) + 1 for place in places.values()]
    in_mlp = {layer: 0 for layer in layers}
    for name, place in places.items():
        in_mlp[place.layer] += neuron_count(program, program.by_name[name], options.redundant)
    widths = [head_width(program, step) for step in program.steps if isinstance(step, Attend)]
    distracting = options.distractor_heads or options.distractor_neurons
    stream = sum(1 if size is None else size for size in program.sizes.values())
    needed = {
        "n_layers": max(layers, default=0) + 1,
        "n_heads": max(1, max(heads, default=0) + options.distractor_heads),
        "d_model": stream + (options.norm == "rms") + (options.junk if distracting else 0),
        "d_head": max(widths, default=1),
        "d_mlp": max(1, max(in_mlp.values(), default=0) + options.distractor_neurons),
    }
    given = {name: getattr(options, name) for name in needed}
    small = [name for name, value in given.items() if value is not None and value < needed[name]]
    if small:
        raise ValueError(
            f"program {program.name!r} needs "
            f"{', '.join(f'{name}={value}' for name, value in needed.items())}, but "
            f"{', '.join(f'{name}={given[name]}' for name in small)} was given; raise it"
        )
    return {name: needed[name] if value is None else value for name, value in given.items()}


def lay_out(program: Program, options: Options, width: int) -> Layout:
    """Returns which dimensions hold which variable."""
    dims, first = {}, 0
    for name, size in program.sizes.items():
        dims[name] = range(first, first + (1 if size is None else size))
        first = dims[name].stop
    junk = range(
        first,
        first + (options.junk if options.distractor_heads or options.distractor_neurons else 0),
    )
    return Layout(dims, junk, width - 1 if options.norm == "rms" else None, width)


def rotation(layout: Layout, options: Options) -> Float[Tensor, "D D"]:
    """Returns the orthogonal matrix that turns the residual stream; the constant dimension stays
    where it is.
    """
    turned = torch.eye(layout.width, dtype=torch.float64)
    if options.rotate:
        size = layout.width - (layout.constant is not None)
        generator = torch.Generator().manual_seed(options.seed)
        q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
        turned[:size, :size] = (
            q * r.diagonal().sign()
        )  # uniformly distributed over the rotations and reflections
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
        free = [index for index in range(size["n_heads"]) if index not in heads][
            : options.distractor_heads
        ]
        heads |= {index: _distracting_head(layout, size["d_head"], generator) for index in free}
        blocks = [
            neurons(program, step, layout, options.votes)
            for step in here
            if not isinstance(step, Attend)
        ]
        blocks.append(_distracting_neurons(layout, options.distractor_neurons, generator))
        tensors |= _layer(f"blocks.{layer}", heads, blocks, size, turn)
    if layout.constant is not None:
        scale = math.sqrt(CONSTANT**2 / layout.width + _EPS)
        norms = [
            f"blocks.{layer}.{norm}" for layer in range(size["n_layers"]) for norm in ("ln1", "ln2")
        ]
        tensors |= {
            f"{norm}.weight": torch.full((layout.width,), scale) for norm in [*norms, "ln_final"]
        }
    return native(program, options, size, tensors)


def native(
    program: Program, options: Options, size: Mapping[str, int], tensors: Mapping[str, Tensor]
) -> LoadedModel:
    """Returns a native model of these sizes with these weights."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    fields: dict[str, Any] = {
        **size,
        "n_ctx": program.length,
        "d_vocab": len(program.tokens),
        "act_fn": "relu",
        "eps": _EPS,
        "normalization_type": "RMS" if options.norm == "rms" else None,
        "attention_dir": "causal" if program.causal else "bidirectional",
        "architecture": "TransformerLensNative",
        "dtype": options.dtype,
        "device": options.device,
    }
    config = TransformerBridgeConfig(**fields)
    bridge: Any = TransformerBridge.boot_native(config)  # pyright: ignore[reportAttributeAccessIssue]
    bridge.original_model.to(device=options.device, dtype=options.dtype)
    bridge.load_state_dict(
        {name: tensor.to(options.dtype) for name, tensor in tensors.items()}, strict=True
    )
    return replace(from_bridge(bridge, path=program.name), split_input=options.split_input)


def _embeddings(
    program: Program, options: Options, layout: Layout, turn: Tensor
) -> dict[str, Tensor]:
    position = layout.reader("position")
    if layout.constant is not None:
        position[:, layout.constant] = CONSTANT
    ids = torch.tensor([program.tokens.index(name) for name in program.answers])
    unembed = torch.zeros(len(program.tokens), layout.width, dtype=torch.float64)
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
    width, d_head = len(turn), size["d_head"]
    q, k, v = (torch.zeros(size["n_heads"], d_head, width, dtype=torch.float64) for _ in range(3))
    q_bias, o = (
        torch.zeros(size["n_heads"], d_head).double(),
        torch.zeros(width, size["n_heads"], d_head).double(),
    )
    for index, one in heads.items():
        q[index], k[index], v[index], q_bias[index], o[:, index] = (
            one.q,
            one.k,
            one.v,
            one.q_bias,
            one.o,
        )
    into, out = (torch.zeros(size["d_mlp"], width, dtype=torch.float64) for _ in range(2))
    bias, used = torch.zeros(size["d_mlp"]).double(), sum(len(block.bias) for block in blocks)
    into[:used] = torch.cat([block.into for block in blocks])
    bias[:used] = torch.cat([block.bias for block in blocks])
    out[:used] = torch.cat([block.out for block in blocks])
    nothing = torch.zeros(size["n_heads"] * d_head)
    return {
        f"{name}.attn.q.weight": q.flatten(0, 1) @ turn,
        f"{name}.attn.q.bias": q_bias.flatten(),
        f"{name}.attn.k.weight": k.flatten(0, 1) @ turn,
        f"{name}.attn.k.bias": nothing,
        f"{name}.attn.v.weight": v.flatten(0, 1) @ turn,
        f"{name}.attn.v.bias": nothing.clone(),
        f"{name}.attn.o.weight": turn.T @ o.flatten(1),
        f"{name}.attn.o.bias": torch.zeros(width),
        f"{name}.mlp.in.weight": into @ turn,
        f"{name}.mlp.in.bias": bias,
        f"{name}.mlp.out.weight": turn.T @ out.T,
        f"{name}.mlp.out.bias": torch.stack([block.out_bias for block in blocks]).sum(0) @ turn,
    }


# ---- distractors: they read everything but the constant, and write into the junk dimensions
# ------------------------


def _random(rows: int, layout: Layout, generator: torch.Generator) -> Float[Tensor, "rows D"]:
    values = SCALE * torch.randn(rows, layout.width, dtype=torch.float64, generator=generator)
    if layout.constant is not None:
        values[:, layout.constant] = 0
    return values


def _into_junk(rows: int, layout: Layout, generator: torch.Generator) -> Float[Tensor, "rows D"]:
    values = torch.zeros(rows, layout.width, dtype=torch.float64)
    values[:, list(layout.junk)] = torch.randn(
        rows, len(layout.junk), dtype=torch.float64, generator=generator
    )
    return values / max(rows, 1) ** 0.5


def _distracting_head(layout: Layout, d_head: int, generator: torch.Generator) -> Head:
    q, k, v = (_random(d_head, layout, generator) for _ in range(3))
    bias = torch.randn(d_head, dtype=torch.float64, generator=generator)
    return Head(q, bias, k, v, _into_junk(d_head, layout, generator).T)


def _distracting_neurons(layout: Layout, count: int, generator: torch.Generator) -> Neurons:
    bias = SCALE * torch.randn(count, dtype=torch.float64, generator=generator)
    nothing = torch.zeros(layout.width, dtype=torch.float64)
    return Neurons(
        _random(count, layout, generator), bias, _into_junk(count, layout, generator), nothing
    )
