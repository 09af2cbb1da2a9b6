"""Tracr programs as ground truth: RASP, compiled to weights by somebody else's compiler (Lindner et
al. 2023, arXiv 2301.05062).

Every dimension of the residual stream has a label, `variable:value` or `variable`; which edges that
makes is read off the weights by `abstraction.ground_truth.tracr_edges`.

A program comes from files (`load_tracr`), which need nothing of Tracr's, or from its compiler
(`from_tracr`), which is installed from its repository: `pip install
git+https://github.com/google-deepmind/tracr`.  Inputs begin with BOS.

Shapes: batch B, positions S, scored positions P, d_model D, vocabulary V, outputs O, readers R,
    writers W.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from circuits.engine import Engine
from circuits.model.load import LoadedModel, ModelConfig, from_bridge, load_model
from circuits.prompts import Prompts, prompts_from_records

PROBES = 32  # random inputs on which a converted model is compared with its source
BOS = ("BOS", "compiler_bos")  # the names in use
PAD = "compiler_pad"
KINDS = {"cat": "categorical", "num": "numerical"}
FILES = (
    ".pt",
    ".config.json",
    ".vocab.json",
)  # and .eval.npz and .circuit.json, where they are there
_NODE = re.compile(r"^(?:A(?P<layer>\d+)\.(?P<head>\d+)(?:\.(?P<side>[QKV]))?|MLP(?P<mlp>\d+))$")


@dataclass(frozen=True, eq=False)
class Inputs:
    """Inputs with what the program should say at the scored positions: numbers of outputs, or
    numbers.
    """

    tokens: Int[Tensor, "B S"]
    labels: Num[Tensor, "B P"]
    positions: tuple[int, ...]

    @property
    def prompts(self) -> Prompts:
        """The inputs as prompts, without answers."""
        return prompts_from_records(
            {"clean": row, "positions": list(self.positions)} for row in self.tokens.tolist()
        )


@dataclass(frozen=True, eq=False)
class TracrProgram:
    """A compiled program, and what is known about it."""

    name: str
    model: LoadedModel  # token and position embedding are two writers
    tokens: tuple[str, ...]  # the id is the index
    bos: str
    labels: tuple[str, ...]  # of the dimensions of the residual stream
    output: str  # the variable that the logits read
    outputs: tuple[str, ...] | None  # its values, one a logit; None: it is a number
    inputs: Inputs | None = None
    published: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # edges: all, input_varying, effective

    @property
    def kind(self) -> str:
        return "numerical" if self.outputs is None else "categorical"

    @property
    def length(self) -> int:
        """How many tokens an input may have, BOS not counted."""
        return self.model.context - 1

    @property
    def variables(self) -> dict[str, tuple[int, ...]]:
        """The dimensions of the residual stream that each variable has."""
        names = [variable_of(label) for label in self.labels]
        return {
            name: tuple(i for i, n in enumerate(names) if n == name)
            for name in dict.fromkeys(names)
        }

    def encode(self, names: Sequence[str]) -> list[int]:
        """Token ids of token names, with BOS put in front.

        Raises:
            ValueError: an unknown token, or more tokens than the program was compiled for.
        """
        known = [token for token in self.tokens if token not in (self.bos, PAD)]
        for name in names:
            if name not in known:
                raise ValueError(
                    f"token {name!r} is unknown to {self.name}; it has {', '.join(known)}"
                )
        if not 1 <= len(names) <= self.length:
            raise ValueError(
                f"{len(names)} tokens, but {self.name} was compiled for 1 to {self.length}; "
                "shorten the input"
            )
        return [self.tokens.index(name) for name in (self.bos, *names)]

    def decode(self, logits: Float[Tensor, "*batch O"]) -> Num[Tensor, "*batch"]:
        """What the program says: the number of an output, or a number."""
        return logits[..., 0] if self.outputs is None else logits.argmax(-1)

    @torch.no_grad()
    def run(self, names: Sequence[str]) -> list[str] | list[float]:
        """What the program says at each token of an input.

        Raises:
            ValueError: an unknown token, or more tokens than the program was compiled for.
        """
        said = self.decode(
            self.model.bridge(
                torch.tensor([self.encode(names)], device=self.model.bridge.cfg.device)
            )
        )
        return [
            value if self.outputs is None else self.outputs[value] for value in said[0, 1:].tolist()
        ]


# ---- from files ----------------------------------------------------------------------------------


def load_tracr(
    folder: str | Path, name: str, *, device: str = "cpu", dtype: str = "float32"
) -> TracrProgram:
    """Returns a program from `name.pt`, `name.config.json` and `name.vocab.json`; its inputs from
    `name.eval.npz` and its published edges from `name.circuit.json`, where these are there.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken, or the files do not fit each other.
    """
    folder = Path(folder)
    if missing := [f"{name}{end}" for end in FILES if not (folder / f"{name}{end}").is_file()]:
        raise FileNotFoundError(
            f"no {', '.join(missing)} in {folder}; a program is "
            f"{', '.join(f'{name}{end}' for end in FILES)}"
        )
    known = _json(
        folder / f"{name}.vocab.json", ("residual_labels", "input_encoding", "output", "kind")
    )
    if known["kind"] not in KINDS:
        raise ValueError(
            f"{name}.vocab.json: kind={known['kind']!r}, but it must be one of {', '.join(KINDS)}"
        )
    tokens = _in_order(f"{name}.vocab.json: input_encoding", known["input_encoding"])
    outputs = None
    if known["kind"] == "cat":
        outputs = _in_order(f"{name}.vocab.json: output_encoding", known.get("output_encoding"))
    model = load_model(
        ModelConfig(str(folder / f"{name}.pt"), device=device, dtype=dtype, split_input=True)
    )
    labels = tuple(map(str, known["residual_labels"]))
    program = TracrProgram(
        name, model, tokens, _bos(name, tokens), labels, str(known["output"]), outputs
    )
    check(program)
    inputs, circuit = folder / f"{name}.eval.npz", folder / f"{name}.circuit.json"
    return replace(
        program,
        inputs=_inputs(inputs, program) if inputs.is_file() else None,
        published=_published(circuit, program) if circuit.is_file() else {},
    )


def check(program: TracrProgram) -> None:
    """Raises ValueError where names and weights do not fit each other, or the model is none that
    Tracr compiles.
    """
    name, bridge = program.name, program.model.bridge
    count = len(program.outputs or ("a number",))
    for what, given, weighed in (
        ("tokens", len(program.tokens), program.model.vocabulary),
        ("residual labels", len(program.labels), bridge.cfg.d_model),
        ("outputs", count, program.model.outputs),
    ):
        if given != weighed:
            raise ValueError(
                f"{name}: {given} {what} are named, but the weights have {weighed}; name each one"
            )
    if bridge.cfg.normalization_type is not None:
        raise ValueError(
            f"{name}: normalization_type={bridge.cfg.normalization_type!r}, but Tracr compiles "
            "without; its edges "
            "cannot be read off the weights"
        )
    if biases := [
        key for key, value in bridge.named_parameters() if key.endswith("bias") and value.any()
    ]:
        raise ValueError(f"{name}: {biases[0]} is not zero, but Tracr compiles without biases")
    weights: Any = Engine(program.model).architecture
    for what, module, labels in (
        ("embedding of token", weights.token, [f"tokens:{token}" for token in program.tokens]),
        ("unembedding of output", weights.unembed, _read_labels(program.output, program.outputs)),
    ):
        for row, label in zip(module.weight, labels, strict=True):
            written = [program.labels[i] for i in row.nonzero()[:, 0].tolist()]
            if label not in written:
                raise ValueError(
                    f"{name}: the {what} {label!r} is {written}; names and weights are in another "
                    "order"
                )


def _json(path: Path, needed: Sequence[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if missing := [key for key in needed if not isinstance(found, dict) or key not in found]:
        raise ValueError(f"{path} has no {', '.join(missing)}")
    return found


def _in_order(where: str, encoding: Any) -> tuple[str, ...]:
    """The names of an encoding {name: id}, by id."""
    if not isinstance(encoding, Mapping) or set(encoding.values()) != set(range(len(encoding))):
        raise ValueError(f"{where} is {encoding}, but it must give each name its own id, from 0 up")
    names = tuple(str(name) for name, _ in sorted(encoding.items(), key=lambda item: item[1]))
    if len(set(names)) < len(names):
        raise ValueError(f"{where} has two names that read alike: {', '.join(names)}; rename one")
    return names


def _bos(name: str, tokens: tuple[str, ...]) -> str:
    if not (found := [token for token in tokens if token in BOS]):
        raise ValueError(
            f"{name}: no token is called {' or '.join(BOS)}, but Tracr's inputs begin with it"
        )
    return found[0]


def _inputs(path: Path, program: TracrProgram) -> Inputs:
    try:
        with np.load(path, allow_pickle=False) as data:
            tokens, labels, positions = (
                torch.tensor(data[key]) for key in ("tokens", "labels", "answer_pos")
            )
    except (KeyError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} has no tokens, labels and answer_pos that can be read ({error})"
        ) from None
    if tokens.shape[1] > program.model.context:
        raise ValueError(
            f"{path}: inputs of {tokens.shape[1]} tokens with BOS, but {program.name} was compiled "
            "for "
            f"{program.model.context}"
        )
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < len(program.tokens):
        raise ValueError(
            f"{path}: token ids from {int(tokens.min())} to {int(tokens.max())}, but "
            f"{program.name} has 0 to "
            f"{len(program.tokens) - 1}"
        )
    if labels.shape != (len(tokens), len(positions)):
        raise ValueError(
            f"{path}: labels of shape {tuple(labels.shape)} for {len(tokens)} inputs and "
            f"{len(positions)} positions"
        )
    return Inputs(tokens.long(), labels, tuple(positions.tolist()))


def _published(path: Path, program: TracrProgram) -> dict[str, tuple[str, ...]]:
    """The lists of edges of a file, each in our names and in forward order."""
    graph, data = Engine(program.model).graph, _json(path, ("edges_all",))
    lists = {
        key.removeprefix("edges_"): value for key, value in data.items() if key.startswith("edges_")
    }
    try:
        indices = {
            key: sorted(graph.edge_index(our_name(edge)) for edge in edges)
            for key, edges in lists.items()
        }
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return {
        key: tuple(graph.edge_name(*index) for index in found) for key, found in indices.items()
    }


def our_name(edge: str) -> str:
    """Returns an edge such as `embed->A0.0.Q` or `A0.0->MLP0` in the names of `circuits.graph`;
    unknown parts stay.

    >>> our_name("MLP2->A3.0.Q")
    'm2->a3.h0<q>'
    """

    def node(name: str) -> str:
        if (match := _NODE.match(name)) is None:
            return {"embed": "input.token", "pos_embed": "input.position"}.get(name, name)
        if match["mlp"] is not None:
            return f"m{match['mlp']}"
        return f"a{match['layer']}.h{match['head']}" + (
            f"<{match['side'].lower()}>" if match["side"] else ""
        )

    return "->".join(node(part) for part in edge.split("->"))


# ---- from the compiler ---------------------------------------------------------------------------

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
    """Returns what `tracr.compiler.compiling.compile_rasp_to_model` assembled, as a TransformerLens
    native model.

    The result is compared with `assembled.forward` on random inputs, residual stream and outputs.

    Args:
        output: the label of the program's output; None: the variable that has its values, on those
            inputs.

    Raises:
        ValueError: it is no assembled model, no or several variables could be the output, or the
            comparison fails.
    """
    if missing := [part for part in _PARTS if not hasattr(assembled, part)]:
        raise ValueError(
            f"{type(assembled).__name__} has no {missing[0]}; give what Tracr's "
            "compile_rasp_to_model returns (pip "
            "install git+https://github.com/google-deepmind/tracr)"
        )
    encoder, labels = assembled.input_encoder, tuple(assembled.residual_labels)
    tokens = _in_order("input_encoder", encoder.encoding_map)
    encoding = getattr(assembled.output_encoder, "encoding_map", None)
    outputs = None if encoding is None else _in_order("output_encoder", encoding)
    context = np.asarray(assembled.params["pos_embed"]["embeddings"]).shape[0]
    bos = tokens.index(str(encoder.bos_token))
    inside = [i for i, token in enumerate(tokens) if token not in (tokens[bos], PAD)]
    probes = np.random.default_rng(0).choice(inside, (PROBES, context)).astype(np.int32)
    probes[:, 0] = bos
    theirs = assembled.forward(assembled.params, probes)
    residual = np.asarray(theirs.transformer_output.output)  # [B, S, D]
    output = _output(labels, outputs, output, residual, np.asarray(theirs.unembedded_output))
    model = _native(
        assembled, [labels.index(label) for label in _read_labels(output, outputs)], context, name
    )
    program = TracrProgram(name, model, tokens, tokens[bos], labels, output, outputs)
    check(program)
    ours = Engine(model).residual(torch.from_numpy(probes).long()).numpy()
    worst = float(np.abs(ours - residual).max() / max(1.0, np.abs(residual).max()))
    if not worst <= _AGREE:
        raise ValueError(
            f"{name}: the converted model's residual stream and Tracr's differ by {worst:.2g} "
            "(relative; bound "
            f"{_AGREE:g}) on random inputs; it computes something that this version does not know"
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
        wanted = _read_labels(name, outputs)
        if not set(wanted) <= set(labels):
            return False
        read = residual[..., [labels.index(label) for label in wanted]]  # [B, S, O]
        return np.allclose(
            read[..., 0] if outputs is None else read.argmax(-1), unembedded, atol=1e-6
        )

    names = [given] if given is not None else list(dict.fromkeys(map(variable_of, labels)))
    found = [name for name in names if fits(name)]
    if len(found) != 1:
        raise ValueError(
            f"{'none' if not found else ' and '.join(found)} of {', '.join(names)} could be the "
            "output; give "
            "output=program.label"
        )
    return found[0]


def _read_labels(name: str, outputs: tuple[str, ...] | None) -> list[str]:
    """The labels of the dimensions that the logits read."""
    return [name] if outputs is None else [f"{name}:{value}" for value in outputs]


def variable_of(label: str) -> str:
    """The variable that a label of the residual stream belongs to."""
    return label.partition(":")[0]


def _native(assembled: Any, read: list[int], context: int, name: str) -> LoadedModel:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

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
    fields: dict[str, Any] = {
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
        "architecture": "TransformerLensNative",
        "attention_dir": "causal" if config.causal else "bidirectional",
    }
    bridge: Any = TransformerBridge.boot_native(  # pyright: ignore[reportAttributeAccessIssue]
        TransformerBridgeConfig(**fields)
    )
    bridge.load_state_dict(tensors, strict=True)
    return replace(from_bridge(bridge, path=name), split_input=True)
