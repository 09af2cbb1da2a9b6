"""Tracr programs from its compiler (`pip install git+https://github.com/google-deepmind/tracr`).

Shapes: batch B, positions S, d_model D, outputs O.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Num
from torch import Tensor

from abstraction.ground_truth.native import attention_direction, native
from abstraction.ground_truth.tracr.program import (
    PAD,
    TracrProgram,
    check,
    in_order,
    read_labels,
    variable_of,
)
from circuits.engine import Engine
from circuits.model.load import LoadedModel
from circuits.prompts import Prompts

PROBES = 32  # random inputs on which a converted model is compared with its source
_PARTS = ("params", "model_config", "residual_labels", "input_encoder", "output_encoder", "forward")
_MODULES = {
    "attn.q": "attn/query",
    "attn.k": "attn/key",
    "attn.v": "attn/value",
    "attn.o": "attn/linear",
    "mlp.in": "mlp/linear_1",
    "mlp.out": "mlp/linear_2",
}
_AGREE = 1e-3  # two to three digits, added up: MLPs multiply by up to 100


def from_tracr(assembled: Any, *, output: str | None = None, name: str = "tracr") -> TracrProgram:
    """Returns what `tracr.compiler.compiling.compile_rasp_to_model` assembled, as a native model.

    The result is compared with `assembled.forward` on random inputs, residual stream and outputs.

    `output` is the variable of the program's output, by default the one that has its values there.

    Raises:
        ValueError: it is no assembled model, no or several variables could be the output, or the
            comparison fails.
    """
    if missing := [part for part in _PARTS if not hasattr(assembled, part)]:
        raise ValueError(
            f"{type(assembled).__name__} has no {missing[0]}; give what Tracr's "
            "compile_rasp_to_model returns (pip install "
            "git+https://github.com/google-deepmind/tracr)"
        )
    encoder, labels = assembled.input_encoder, tuple(assembled.residual_labels)
    tokens = in_order("input_encoder", encoder.encoding_map)
    encoding = getattr(assembled.output_encoder, "encoding_map", None)
    outputs = None if encoding is None else in_order("output_encoder", encoding)
    context = np.asarray(assembled.params["pos_embed"]["embeddings"]).shape[0]
    bos = tokens.index(str(encoder.bos_token))
    inside = [i for i, token in enumerate(tokens) if token not in (tokens[bos], PAD)]
    probes = np.random.default_rng(0).choice(inside, (PROBES, context)).astype(np.int32)
    probes[:, 0] = bos
    theirs = assembled.forward(assembled.params, probes)
    residual = np.asarray(theirs.transformer_output.output)  # [B, S, D]
    output = _output(labels, outputs, output, residual, np.asarray(theirs.unembedded_output))
    read = [labels.index(label) for label in read_labels(output, outputs)]
    model = _native(assembled, read, context, name)
    program = TracrProgram(name, model, tokens, tokens[bos], labels, output, outputs)
    check(program)
    ours = Engine(model).residual(Prompts.from_tokens(torch.from_numpy(probes).long())).numpy()
    worst = float(np.abs(ours - residual).max() / max(1.0, np.abs(residual).max()))
    if not worst <= _AGREE:
        raise ValueError(
            f"{name}: the converted model's residual stream and Tracr's differ by {worst:.2g} "
            f"(relative; bound {_AGREE:g}) on random inputs; it computes something that this "
            "version does not know"
        )
    return program


def _output(
    labels: tuple[str, ...],
    outputs: tuple[str, ...] | None,
    given: str | None,
    residual: Float[np.ndarray, "B S D"],
    unembedded: Num[np.ndarray, "B S"],
) -> str:
    """The variable that reads as the outputs do: its largest dimension, or its one dimension."""

    def fits(name: str) -> bool:
        wanted = read_labels(name, outputs)
        if not set(wanted) <= set(labels):
            return False
        read = residual[..., [labels.index(label) for label in wanted]]  # [B, S, O]
        said = read[..., 0] if outputs is None else read.argmax(-1)
        return np.allclose(said, unembedded, atol=1e-6)

    names = [given] if given is not None else list(dict.fromkeys(map(variable_of, labels)))
    found = [name for name in names if fits(name)]
    if len(found) != 1:
        raise ValueError(
            f"{'none' if not found else ' and '.join(found)} of {', '.join(names)} could be the "
            "output; give output=program.label"
        )
    return found[0]


def _native(assembled: Any, read: list[int], context: int, name: str) -> LoadedModel:
    config, params = assembled.model_config, assembled.params
    if config.layer_norm:
        raise ValueError(f"{name}: layer_norm={config.layer_norm}, but Tracr compiles without")

    def array(module: str, key: str) -> Tensor:
        return torch.from_numpy(np.array(params[module][key], dtype=np.float32))

    token, width = array("token_embed", "embeddings"), len(assembled.residual_labels)
    tensors = {
        "embed.weight": token,
        "pos_embed.weight": array("pos_embed", "embeddings"),
        "unembed.weight": torch.eye(width)[read],
        "unembed.bias": torch.zeros(len(read)),
    }
    for layer in range(config.num_layers):
        for ours, theirs in _MODULES.items():
            module = f"transformer/layer_{layer}/{theirs}"
            tensors[f"blocks.{layer}.{ours}.weight"] = array(module, "w").T
            tensors[f"blocks.{layer}.{ours}.bias"] = array(module, "b")
    fields = {
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "d_head": config.key_size,
        "d_model": width,
        "d_mlp": config.mlp_hidden_size,
        "n_ctx": context,
        "d_vocab": len(token),
        "d_vocab_out": len(read),
        "act_fn": "relu",
        "normalization_type": None,
        "attention_dir": attention_direction(config.causal),
    }
    return replace(native(fields, tensors, name), split_input=True)
