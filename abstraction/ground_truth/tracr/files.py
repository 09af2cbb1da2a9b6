"""Tracr programs from files, which need nothing of Tracr's."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from abstraction.ground_truth.tracr.program import Inputs, TracrProgram, check, in_order
from circuits.engine import Engine
from circuits.model.load import ModelConfig, load_model
from circuits.names import head_name, mlp_name, reader_name

BOS = ("BOS", "compiler_bos")  # the names in use
KINDS = {"cat": "categorical", "num": "numerical"}
FILES = (".pt", ".config.json", ".vocab.json")  # optional: .eval.npz and .circuit.json
_NODE = re.compile(r"^(?:A(?P<layer>\d+)\.(?P<head>\d+)(?:\.(?P<side>[QKV]))?|MLP(?P<mlp>\d+))$")


def load_tracr(
    folder: str | Path, name: str, *, device: str = "cpu", dtype: str = "float32"
) -> TracrProgram:
    """Returns a program from `name.pt`, `name.config.json` and `name.vocab.json`.

    Its inputs are in `name.eval.npz`, its published edges in `name.circuit.json`, where there are.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken, or the files do not fit each other.
    """
    folder = Path(folder)
    needed = [f"{name}{end}" for end in FILES]
    if missing := [file for file in needed if not (folder / file).is_file()]:
        raise FileNotFoundError(
            f"no {', '.join(missing)} in {folder}; a program is {', '.join(needed)}"
        )
    vocabulary = f"{name}.vocab.json"
    known = _json(folder / vocabulary, ("residual_labels", "input_encoding", "output", "kind"))
    if known["kind"] not in KINDS:
        raise ValueError(
            f"{vocabulary}: kind={known['kind']!r}, but it must be one of {', '.join(KINDS)}"
        )
    tokens = in_order(f"{vocabulary}: input_encoding", known["input_encoding"])
    outputs = None
    if known["kind"] == "cat":
        outputs = in_order(f"{vocabulary}: output_encoding", known.get("output_encoding"))
    config = ModelConfig(str(folder / f"{name}.pt"), device=device, dtype=dtype, split_input=True)
    labels = tuple(map(str, known["residual_labels"]))
    model, bos, output = load_model(config), _bos(name, tokens), str(known["output"])
    program = TracrProgram(name, model, tokens, bos, labels, output, outputs)
    check(program)
    inputs, circuit = folder / f"{name}.eval.npz", folder / f"{name}.circuit.json"
    return replace(
        program,
        inputs=_inputs(inputs, program) if inputs.is_file() else None,
        published=_published(circuit, program) if circuit.is_file() else {},
    )


def _json(path: Path, needed: Sequence[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if missing := [key for key in needed if not isinstance(found, dict) or key not in found]:
        raise ValueError(f"{path} has no {', '.join(missing)}")
    return found


def _bos(name: str, tokens: tuple[str, ...]) -> str:
    if not (found := [token for token in tokens if token in BOS]):
        raise ValueError(
            f"{name}: no token is called {' or '.join(BOS)}, but Tracr's inputs begin with it"
        )
    return found[0]


def _inputs(path: Path, program: TracrProgram) -> Inputs:
    try:
        with np.load(path, allow_pickle=False) as data:
            names = ("tokens", "labels", "answer_pos")
            tokens, labels, positions = (torch.tensor(data[name]) for name in names)
    except (KeyError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} has no tokens, labels and answer_pos that can be read ({error})"
        ) from None
    if tokens.shape[1] > program.model.context:
        raise ValueError(
            f"{path}: inputs of {tokens.shape[1]} tokens with BOS, but {program.name} was compiled "
            f"for {program.model.context}"
        )
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < len(program.tokens):
        raise ValueError(
            f"{path}: token ids from {int(tokens.min())} to {int(tokens.max())}, but "
            f"{program.name} has 0 to {len(program.tokens) - 1}"
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
    found = {}
    for key, edges in data.items():
        if key.startswith("edges_"):
            try:
                indices = sorted(graph.edge_index(our_name(edge)) for edge in edges)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            names = tuple(graph.edge_name(*index) for index in indices)
            found[key.removeprefix("edges_")] = names
    return found


def our_name(edge: str) -> str:
    """Returns an edge in the names of `circuits.graph`; unknown parts stay.

    >>> our_name("MLP2->A3.0.Q")
    'm2->a3.h0<q>'
    """
    return "->".join(_our_node(part) for part in edge.split("->"))


def _our_node(name: str) -> str:
    if (match := _NODE.match(name)) is None:
        return {"embed": "input.token", "pos_embed": "input.position"}.get(name, name)
    if match["mlp"] is not None:
        return mlp_name(int(match["mlp"]))
    head = head_name(int(match["layer"]), int(match["head"]))
    return reader_name(head, (match["side"] or "").lower())
