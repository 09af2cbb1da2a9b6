"""Tracr programs: what they compute, the edges that their weights make, those that matter, and
conversion.

The compiler itself is not needed.  `assemble` stands in for what it returns: the same attributes,
and a forward pass in numpy that is written after Tracr's own definition and shares nothing with
ours.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import numpy as np
import pytest
import torch

from abstraction.ground_truth.effects import mask_of
from abstraction.ground_truth.tracr.conversion import from_tracr
from abstraction.ground_truth.tracr.edges import BOUND, Effect, derived_edges, effective_edges
from abstraction.ground_truth.tracr.files import load_tracr, our_name
from abstraction.ground_truth.tracr.program import TracrProgram
from circuits.ablation import AblationConfig, fit_ablation
from circuits.engine import Engine
from circuits.prompts import Prompts, prompts_from_records
from tests import tiny

NAMES = ("reverse", "xproportion")
WITHOUT_TWIN = [name for name in tiny.UNTRAINED if name != "counterfactual"]

# What is not among the true edges, of all that the weights make.
LENGTH = {"input.token->a0.h0<v>", "a0.h0->m0"}  # the same where all inputs are equally long
ALL_MATCH = {
    "input.token->a0.h0<q>",
    "input.token->a0.h0<k>",
}  # the selector is true everywhere: uniform without it
NONE_MATCHES = {
    "input.token->a3.h0<q>",
    "input.token->a3.h0<k>",
}  # sends what matches nothing to BOS: all match one
CONSTANTS = {"input.token->m0", "input.token->m1", "m0->m1"}  # the same at every position but BOS
BY_POSITION = {"input.position->m1", "m1->m2", "m2->a3.h0<q>", "input.position->a3.h0<k>"}
OF_POSITION = {"input.position->a1.h0<q>", "input.position->a1.h0<k>"}
TO_BOS = {"input.token->a1.h0<q>", "input.token->a1.h0<k>"}  # as above
IDLE = {
    ("reverse", "zero"): LENGTH | ALL_MATCH | NONE_MATCHES,
    ("reverse", "mean"): LENGTH | ALL_MATCH | NONE_MATCHES | CONSTANTS,
    ("reverse", "positional_mean"): LENGTH | ALL_MATCH | NONE_MATCHES | CONSTANTS | BY_POSITION,
    ("reverse", "resample"): LENGTH | ALL_MATCH | NONE_MATCHES | CONSTANTS | BY_POSITION,
    ("xproportion", "zero"): TO_BOS,
    ("xproportion", "mean"): TO_BOS,
    ("xproportion", "positional_mean"): TO_BOS | OF_POSITION,
    ("xproportion", "resample"): TO_BOS | OF_POSITION,
}


@cache
def loaded(folder: Path, name: str) -> tuple[TracrProgram, Engine]:
    program = load_tracr(folder, name)
    return program, Engine(program.model)


@pytest.fixture(params=NAMES)
def case(request, cases) -> tuple[TracrProgram, Engine]:
    return loaded(cases / "tracr_compiled", request.param)


@cache
def effective(folder: Path, name: str, ablation: str) -> tuple[Effect, ...]:
    """The edges that matter on a program's own inputs."""
    program, engine = loaded(folder, name)
    assert program.inputs is not None
    prompts = program.inputs.prompts
    return effective_edges(program, engine, prompts, fitted(engine, prompts, ablation))


def fitted(engine: Engine, prompts: Prompts, name: str):
    return fit_ablation(AblationConfig(name), engine, prompts)


def said(
    program: TracrProgram, engine: Engine, edges: Sequence[str], ablation: str
) -> torch.Tensor:
    """What the program says of its inputs when only these edges are kept."""
    assert program.inputs is not None
    prompts, graph = program.inputs.prompts, engine.graph
    values = fitted(engine, prompts, ablation).values(engine, prompts)
    logits = engine.masked(prompts, mask_of(graph, edges), values)
    return program.decode(logits)


def right(program: TracrProgram, values: torch.Tensor) -> bool:
    assert program.inputs is not None
    labels = program.inputs.labels
    if program.kind == "categorical":
        return torch.equal(values, labels)
    return bool((values - labels).abs().max() <= 1e-4)


# ---- the two programs ----------------------------------------------------------------------------


def test_labels_are_computed_right(case):
    program, engine = case
    where = list(program.inputs.positions)
    assert right(
        program, program.decode(engine.logits(tiny.from_tokens(program.inputs.tokens))[:, where])
    )
    assert not right(
        program,
        program.decode(engine.logits(tiny.from_tokens(program.inputs.tokens.flip(0)))[:, where]),
    )


def test_programs_say_what_their_names_say(cases):
    reverse, _ = loaded(cases / "tracr_compiled", "reverse")
    proportion, _ = loaded(cases / "tracr_compiled", "xproportion")
    assert (reverse.kind, reverse.length, reverse.outputs) == ("categorical", 5, ("1", "2", "3"))
    assert reverse.run(["1", "2", "2", "3"]) == ["3", "2", "2", "1"]
    assert (proportion.kind, proportion.length, proportion.outputs) == ("numerical", 5, None)
    assert proportion.run(["x", "w", "x"]) == pytest.approx([1, 1 / 2, 2 / 3], abs=1e-5)
    assert proportion.variables["is_x_9"] == (6,) and reverse.variables["tokens"] == (
        36,
        37,
        38,
        39,
        40,
    )


def test_edges_of_the_weights_are_the_published_ones(case):
    program, engine = case
    assert tuple(derived_edges(program, engine)) == program.published["all"]
    assert set(program.published) == {"all", "input_varying", "effective"}


def test_edges_say_which_variables_they_carry(cases):
    assert derived_edges(*loaded(cases / "tracr_compiled", "xproportion")) == {
        "input.token->m0": ("tokens",),
        "input.token->a1.h0<q>": ("one",),
        "input.position->a1.h0<q>": ("indices",),
        "input.token->a1.h0<k>": ("tokens",),
        "input.position->a1.h0<k>": ("indices",),
        "m0->a1.h0<v>": ("is_x_9",),
        "a1.h0->logits": ("frac_prevs_7",),
    }


@pytest.mark.parametrize("ablation", WITHOUT_TWIN)
def test_only_derived_edges_are_needed_whatever_the_others_carry(case, ablation):
    program, engine = case
    assert right(program, said(program, engine, tuple(derived_edges(program, engine)), ablation))


@pytest.mark.parametrize(
    ("name", "ablation"),
    [
        # both kinds of mean are tested on `reverse`; on `xproportion` they take long
        pytest.param(name, ablation, marks=pytest.mark.slow)
        if name == "xproportion" and "mean" in ablation
        else (name, ablation)
        for name in NAMES
        for ablation in WITHOUT_TWIN
    ],
)
def test_true_edges_are_enough_and_none_of_them_can_go(cases, name, ablation):
    program, engine = loaded(cases / "tracr_compiled", name)
    found = effective(cases / "tracr_compiled", name, ablation)
    true = [effect.edge for effect in found if effect.true]
    assert {effect.edge for effect in found} - set(true) == IDLE[program.name, ablation]
    assert true == [effect.edge for effect in found if effect.effect > 1e-2], (
        "an effect alone, and no other has one"
    )
    assert max(effect.effect for effect in found if not effect.true) < 1e-6
    assert right(program, said(program, engine, true, ablation))
    for edge in true:
        assert not right(
            program, said(program, engine, [e for e in true if e != edge], ablation)
        ), edge


@pytest.mark.parametrize("name", NAMES)
def test_resampling_sees_the_published_effective_edges(cases, name):
    program, _ = loaded(cases / "tracr_compiled", name)
    found = effective(cases / "tracr_compiled", name, "resample")
    assert tuple(effect.edge for effect in found if effect.true) == program.published["effective"]


def test_with_inputs_of_several_lengths_the_length_matters(cases):
    program, engine = loaded(cases / "tracr_compiled", "reverse")
    rows = [["1", "2", "3", "1", "2"][:length] for length in range(1, 6)]
    prompts = prompts_from_records(
        {"clean": program.encode(row), "positions": list(range(1, len(row) + 1))} for row in rows
    )
    found = effective_edges(program, engine, prompts, fitted(engine, prompts, "zero"))
    assert {effect.edge for effect in found if not effect.true} == ALL_MATCH | NONE_MATCHES


# ---- the compiler's own objects ------------------------------------------------------------------

MODULES = {"query": "W_Q", "key": "W_K", "value": "W_V"}


def assemble(
    params: Mapping[str, Mapping[str, np.ndarray]],
    labels: Sequence[str],
    encoding: Mapping[Any, int],
    output: Sequence[str],
    outputs: Mapping[Any, int] | None,
    heads: int,
    causal: bool = False,
) -> Namespace:
    """What Tracr's compiler returns, for these parameters; `output` are the labels that it
    unembeds.
    """
    layers = 1 + max(
        int(name.split("_")[1].split("/")[0]) for name in params if name.startswith("transformer")
    )
    width, hidden = params["transformer/layer_0/mlp/linear_1"]["w"].shape
    size = params["transformer/layer_0/attn/query"]["w"].shape[1] // heads

    def linear(params, name, x):
        return x @ params[name]["w"] + params[name]["b"]

    def forward(params, tokens):
        x = (
            params["token_embed"]["embeddings"][tokens]
            + params["pos_embed"]["embeddings"][: tokens.shape[1]]
        )
        for layer in (f"transformer/layer_{index}" for index in range(layers)):
            q, k, v = (
                linear(params, f"{layer}/attn/{side}", x).reshape(
                    *tokens.shape, heads, size
                )  # [B, S, H, E]
                for side in ("query", "key", "value")
            )
            scores = np.einsum("bshe,bthe->bhst", q, k) / np.sqrt(size)
            if causal:
                scores = np.where(np.tril(np.ones(scores.shape[-2:])) > 0, scores, -1e30)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            moved = np.einsum("bhst,bthe->bshe", weights, v).reshape(*tokens.shape, heads * size)
            x = x + linear(params, f"{layer}/attn/linear", moved)
            x = x + linear(
                params,
                f"{layer}/mlp/linear_2",
                np.maximum(linear(params, f"{layer}/mlp/linear_1", x), 0),
            )
        out = x[..., [labels.index(label) for label in output]]
        out = out[..., 0] if outputs is None else out.argmax(-1)
        return Namespace(transformer_output=Namespace(output=x), unembedded_output=out)

    bos = next(name for name in encoding if "bos" in str(name).lower())
    return Namespace(
        params=params,
        model_config=Namespace(
            num_heads=heads,
            num_layers=layers,
            key_size=size,
            mlp_hidden_size=hidden,
            layer_norm=False,
            causal=causal,
        ),
        residual_labels=list(labels),
        input_encoder=Namespace(
            encoding_map=dict(encoding), bos_token=bos, pad_token="compiler_pad"
        ),
        output_encoder=Namespace() if outputs is None else Namespace(encoding_map=dict(outputs)),
        forward=forward,
    )


def layers_of_nothing(
    layers: int, width: int, size: int, hidden: int
) -> dict[str, dict[str, np.ndarray]]:
    """Parameters of layers that compute nothing, as Tracr starts."""
    shapes = {side: (width, size) for side in ("attn/query", "attn/key", "attn/value")}
    shapes |= {
        "attn/linear": (size, width),
        "mlp/linear_1": (width, hidden),
        "mlp/linear_2": (hidden, width),
    }
    return {
        f"transformer/layer_{layer}/{name}": {
            "w": np.zeros(shape, np.float32),
            "b": np.zeros(shape[1], np.float32),
        }
        for layer in range(layers)
        for name, shape in shapes.items()
    }


def assembled_case(folder: Path, name: str, causal: bool = False) -> Namespace:
    """A program of the reference cases as Tracr's compiler would return it."""
    weights = {
        key: value.numpy()
        for key, value in torch.load(folder / f"{name}.pt", weights_only=True).items()
    }
    known = json.loads((folder / f"{name}.vocab.json").read_text())
    layers, width = (
        1 + max(int(key.split(".")[1]) for key in weights if "blocks" in key),
        len(known["residual_labels"]),
    )
    heads, size, hidden = (
        *weights["blocks.0.attn.W_O"].shape[:2],
        weights["blocks.0.mlp.W_in"].shape[1],
    )
    params = layers_of_nothing(layers, width, heads * size, hidden)
    params["token_embed"] = {"embeddings": weights["embed.W_E"]}
    params["pos_embed"] = {"embeddings": weights["pos_embed.W_pos"]}
    for layer in range(layers):
        ours, theirs = f"blocks.{layer}", f"transformer/layer_{layer}"
        for side, key in MODULES.items():
            matrix = weights[f"{ours}.attn.{key}"]  # [H, D, E]
            params[f"{theirs}/attn/{side}"]["w"] = matrix.transpose(1, 0, 2).reshape(width, -1)
        params[f"{theirs}/attn/linear"]["w"] = weights[f"{ours}.attn.W_O"].reshape(-1, width)
        params[f"{theirs}/mlp/linear_1"]["w"] = weights[f"{ours}.mlp.W_in"]
        params[f"{theirs}/mlp/linear_2"]["w"] = weights[f"{ours}.mlp.W_out"]

    def values(encoding):  # integers are integers in RASP
        return (
            None
            if encoding is None
            else {int(k) if k.isdigit() else k: i for k, i in encoding.items()}
        )

    read = (
        [known["output"]]
        if known["kind"] == "num"
        else [f"{known['output']}:{v}" for v in known["output_encoding"]]
    )
    encodings = values(known["input_encoding"]), read, values(known["output_encoding"])
    return assemble(params, known["residual_labels"], *encodings, heads, causal)


TOKENS = {"a": 0, "b": 1, "compiler_bos": 2, "compiler_pad": 3}
TOKEN_LABELS = ("tokens:a", "tokens:b", "tokens:compiler_bos", "tokens:compiler_pad")


def assembled_at_random(*, causal: bool, categorical: bool, seed: int = 0) -> Namespace:
    """Three layers of two heads, with all weights drawn at random."""
    outputs = ("out:x", "out:y", "out:z") if categorical else ("out", "other")
    labels = (*outputs, *TOKEN_LABELS)
    params, generator = layers_of_nothing(3, len(labels), 2 * 5, 6), np.random.default_rng(seed)
    for module in params.values():
        module["w"] = generator.normal(size=module["w"].shape, scale=0.5).astype(np.float32)
    for name, rows in (("token_embed", len(TOKENS)), ("pos_embed", 7)):
        params[name] = {"embeddings": generator.normal(size=(rows, len(labels))).astype(np.float32)}
    read = outputs if categorical else outputs[:1]
    return assemble(
        params, labels, TOKENS, read, {"x": 0, "y": 1, "z": 2} if categorical else None, 2, causal
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("categorical", [False, True])
def test_conversion_keeps_every_output(causal, categorical):
    assembled = assembled_at_random(causal=causal, categorical=categorical)
    program = from_tracr(assembled)
    engine = Engine(program.model)
    assert (engine.graph.causal, engine.graph.n_layers, engine.graph.n_heads) == (causal, 3, 2)
    assert (program.output, program.bos, program.length) == ("out", "compiler_bos", 6)
    assert program.outputs == (("x", "y", "z") if categorical else None)
    names = ["b", "a", "a", "b", "b"]
    theirs = assembled.forward(
        assembled.params, np.array([program.encode(names)])
    ).unembedded_output[0, 1:]
    assert program.run(names) == (
        ["xyz"[index] for index in theirs] if categorical else pytest.approx(theirs, 1e-4)
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_assembled_program_is_the_one_of_its_files(cases, name):
    program, engine = loaded(cases / "tracr_compiled", name)
    again = from_tracr(assembled_case(cases / "tracr_compiled", name), name=name)
    converted = Engine(again.model)
    assert (again.tokens, again.outputs, again.output, again.bos) == (
        program.tokens,
        program.outputs,
        program.output,
        program.bos,
    )
    assert program.inputs is not None
    assert torch.equal(
        converted.logits(tiny.from_tokens(program.inputs.tokens)),
        engine.logits(tiny.from_tokens(program.inputs.tokens)),
    )
    assert derived_edges(again, converted) == derived_edges(program, engine)


def test_a_converted_model_that_computes_something_else_is_refused():
    assembled = assembled_at_random(causal=False, categorical=False)
    other = assembled_at_random(causal=True, categorical=False)  # the same weights
    assembled.forward = other.forward
    with pytest.raises(ValueError, match="residual stream and Tracr's differ by .*bound 0.001"):
        from_tracr(assembled)


def test_what_is_no_assembled_model_is_refused_and_tracr_named():
    with pytest.raises(
        ValueError, match="dict has no params; give what .* returns .pip install git.https://github"
    ):
        from_tracr({})


def test_layer_norm_is_refused():
    assembled = assembled_at_random(causal=False, categorical=True)
    assembled.model_config.layer_norm = True
    with pytest.raises(ValueError, match="layer_norm=True, but Tracr compiles without"):
        from_tracr(assembled)


def test_the_output_can_be_named_where_it_cannot_be_told():
    params = layers_of_nothing(1, 6, 4, 3)
    params["token_embed"] = {"embeddings": np.eye(6, dtype=np.float32)[2:]}
    params["pos_embed"] = {"embeddings": np.zeros((4, 6), np.float32)}
    assembled = assemble(params, ("p", "q", *TOKEN_LABELS), TOKENS, ["p"], None, 1)
    with pytest.raises(
        ValueError, match="p and q of p, q, tokens could be the output; give output=program.label"
    ):
        from_tracr(assembled)
    with pytest.raises(ValueError, match="none of r could be the output"):
        from_tracr(assembled, output="r")
    assert [from_tracr(assembled, output=name).output for name in "pq"] == ["p", "q"]


# ---- edges of programs made by hand --------------------------------------------------------------


def by_hand(**weights: Sequence[tuple[str | int, str | int]]) -> tuple[TracrProgram, Engine]:
    """One layer, one head of width 2, two neurons; `out` is 1 where the head looks at BOS alone.

    The query is a constant that token and position embedding both write (`one`, `here`).  Given
    weights, by module, are the places of ones in its matrix, (from, to): a label or the number of a
    neuron.
    """
    labels = ["here", "junk", "one", "out", *TOKEN_LABELS]
    at = {label: np.eye(len(labels), dtype=np.float32)[index] for index, label in enumerate(labels)}
    params = layers_of_nothing(1, len(labels), 2, 2)
    params["token_embed"] = {
        "embeddings": np.stack([at[label] + at["one"] for label in TOKEN_LABELS])
    }
    params["pos_embed"] = {"embeddings": np.stack([at["here"]] * 4)}
    head = "transformer/layer_0/attn"
    params[f"{head}/query"]["w"][:, 0] = 100 * (at["one"] + at["here"])
    params[f"{head}/key"]["w"][:, 0] = at["tokens:compiler_bos"]
    params[f"{head}/value"]["w"][:, 0] = at["tokens:compiler_bos"]
    params[f"{head}/linear"]["w"][0] = at["out"]
    for name, ones in weights.items():
        matrix = params[f"transformer/layer_0/{name.replace('__', '/')}"]["w"]
        matrix[:] = 0
        for place in ones:
            matrix[
                tuple(labels.index(part) if isinstance(part, str) else part for part in place)
            ] = 1
    program = from_tracr(assemble(params, labels, TOKENS, ["out"], None, 1), output="out")
    return program, Engine(program.model)


HEAD = {"input.token->a0.h0<k>", "input.token->a0.h0<v>", "a0.h0->logits"}
QUERIES = {"input.token->a0.h0<q>", "input.position->a0.h0<q>"}


def test_of_edges_that_can_stand_in_for_each_other_one_is_true():
    program, engine = by_hand()
    assert set(derived_edges(program, engine)) == HEAD | QUERIES
    prompts = prompts_from_records(
        [{"clean": program.encode(["a", "b", "a"]), "positions": [1, 2, 3]}]
    )
    found = effective_edges(program, engine, prompts, fitted(engine, prompts, "zero"))
    assert {effect.edge for effect in found if effect.true} == HEAD | {"input.token->a0.h0<q>"}
    assert {effect.edge for effect in found if effect.effect > BOUND} == HEAD


@pytest.mark.parametrize(
    ("weights", "edges"),
    [
        pytest.param({"attn__value": []}, set(), id="a head that moves nothing"),
        pytest.param(
            {"attn__value": [("junk", 0)]}, set(), id="a head that moves what nobody writes"
        ),
        pytest.param(
            {"attn__value": [("tokens:a", 0), ("here", 1)]},
            HEAD | QUERIES,
            id="a value that goes nowhere",
        ),
        pytest.param(
            {"attn__key": []}, HEAD - {"input.token->a0.h0<k>"}, id="keys that are all alike"
        ),
        pytest.param(
            {"attn__key": [("junk", 0)]},
            HEAD - {"input.token->a0.h0<k>"},
            id="keys of what nobody writes",
        ),
        pytest.param(
            {"attn__query": []}, HEAD - {"input.token->a0.h0<k>"}, id="queries of nothing"
        ),
        pytest.param(
            {"attn__query": [("junk", 0)]},
            HEAD - {"input.token->a0.h0<k>"},
            id="queries of the unwritten",
        ),
        pytest.param(
            {"mlp__linear_1": [("one", 0)]}, HEAD | QUERIES, id="an MLP that writes nothing"
        ),
        pytest.param(
            {"mlp__linear_2": [(0, "out")]}, HEAD | QUERIES, id="an MLP that reads nothing"
        ),
        pytest.param(
            {"mlp__linear_1": [("junk", 0)], "mlp__linear_2": [(0, "out")]},
            HEAD | QUERIES,
            id="an MLP that reads what nobody writes",
        ),
        pytest.param(
            {"mlp__linear_1": [("one", 0)], "mlp__linear_2": [(0, "junk")]},
            HEAD | QUERIES,
            id="an MLP that writes what nobody reads",
        ),
        pytest.param(
            {"mlp__linear_1": [("one", 0)], "mlp__linear_2": [(1, "out")]},
            HEAD | QUERIES,
            id="one neuron reads and another one writes",
        ),
        pytest.param(
            {"mlp__linear_1": [("one", 0)], "mlp__linear_2": [(0, "junk"), (1, "out")]},
            HEAD | QUERIES,
            id="only a neuron that reads nothing writes what is read",
        ),
        pytest.param(
            {"mlp__linear_1": [("one", 0), ("here", 1)], "mlp__linear_2": [(0, "out")]},
            HEAD | QUERIES | {"input.token->m0", "m0->logits"},
            id="a neuron that writes nothing beside one",
        ),
        pytest.param(
            {"mlp__linear_1": [("out", 0)], "mlp__linear_2": [(0, "out")]},
            HEAD | QUERIES | {"a0.h0->m0", "m0->logits"},
            id="an MLP that reads the head",
        ),
    ],
)
def test_what_computes_nothing_has_no_edges(weights, edges):
    assert set(derived_edges(*by_hand(**weights))) == edges


def test_edges_are_refused_of_another_engine_and_without_a_bound():
    (program, engine), (_, other) = by_hand(), by_hand()
    prompts = prompts_from_records([{"clean": program.encode(["a", "b", "a"])}])
    for wrong in (other, Engine(program.model, n_positions=4)):
        with pytest.raises(ValueError, match="another model than tracr, or per position"):
            derived_edges(program, wrong)
    with pytest.raises(ValueError, match="tolerance=0, but it must be above 0"):
        derived_edges(program, engine, tolerance=0)
    with pytest.raises(ValueError, match="bound=0, but it must be above 0"):
        effective_edges(program, engine, prompts, fitted(engine, prompts, "zero"), bound=0)


def test_edges_of_one_input_writer_are_those_of_two():
    program, _ = by_hand()
    one = derived_edges(program, Engine(program.model, split_input=False))
    assert one == {
        "input->a0.h0<q>": ("here", "one"),
        "input->a0.h0<k>": ("tokens",),
        "input->a0.h0<v>": ("tokens",),
        "a0.h0->logits": ("out",),
    }


# ---- refusals ------------------------------------------------------------------------------------


def test_unknown_tokens_and_long_inputs_are_refused():
    program, _ = by_hand()
    for name in ("c", "compiler_bos", "compiler_pad"):
        with pytest.raises(ValueError, match=f"token '{name}' is unknown to tracr; it has a, b$"):
            program.encode([name])
    for names in ([], ["a"] * 4):
        with pytest.raises(
            ValueError, match=f"{len(names)} tokens, but tracr was compiled for 1 to 3"
        ):
            program.run(names)


@pytest.fixture
def folder(tmp_path, cases) -> Path:
    for path in (cases / "tracr_compiled").glob("reverse.*"):
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path


def test_missing_files_are_named_and_optional_ones_may_be_missing(folder):
    for name in ("reverse.eval.npz", "reverse.circuit.json"):
        (folder / name).unlink()
    program = load_tracr(folder, "reverse")
    assert program.inputs is None and not program.published
    (folder / "reverse.vocab.json").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"no reverse.vocab.json in .*; a program is reverse.pt, reverse.config",
    ):
        load_tracr(folder, "reverse")
    with pytest.raises(
        FileNotFoundError, match=r"no sort.pt, sort.config.json, sort.vocab.json in"
    ):
        load_tracr(folder, "sort")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", "bool", "kind='bool', but it must be one of cat, num"),
        (
            "input_encoding",
            {"1": 0, "2": 1, "BOS": 2, "compiler_pad": 3},
            "4 tokens are named, but the weights have 5",
        ),
        (
            "input_encoding",
            {"2": 0, "1": 1, "3": 2, "BOS": 3, "compiler_pad": 4},
            r"embedding of token 'tokens:2' is \['one', 'tokens:1'\]; names and weights are in "
            r"another order",
        ),
        (
            "input_encoding",
            {"1": 0, "2": 1, "3": 2, "BOS": 3, "compiler_pad": 5},
            "each name its own id, from 0 up",
        ),
        (
            "input_encoding",
            {"1": 0, "2": 1, "3": 2, "start": 3, "compiler_pad": 4},
            "no token is called BOS or",
        ),
        ("output_encoding", {"1": 0, "2": 1}, "2 outputs are named, but the weights have 3"),
        (
            "output_encoding",
            {"2": 0, "1": 1, "3": 2},
            r"unembedding of output 'reverse_1:2' is \['reverse_1:1'\]",
        ),
        ("output_encoding", None, "output_encoding is None, but it must give each name its own id"),
        ("output", "reverse", "unembedding of output 'reverse:1' is"),
        ("residual_labels", ["one"], "1 residual labels are named, but the weights have 41"),
    ],
)
def test_names_that_do_not_fit_the_weights_are_refused(folder, field, value, message):
    path = folder / "reverse.vocab.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=message):
        load_tracr(folder, "reverse")


def test_broken_files_are_refused(folder):
    path = folder / "reverse.vocab.json"
    path.write_text('{"kind": "cat"}')
    with pytest.raises(
        ValueError, match="reverse.vocab.json has no residual_labels, input_encoding, output"
    ):
        load_tracr(folder, "reverse")
    path.write_text("{")
    with pytest.raises(ValueError, match="reverse.vocab.json is no JSON"):
        load_tracr(folder, "reverse")


def test_published_edges_that_the_graph_does_not_have_are_refused(folder):
    path = folder / "reverse.circuit.json"
    path.write_text(json.dumps({"edges_all": ["embed->A9.0.Q"]}))
    with pytest.raises(
        ValueError, match="reverse.circuit.json: edge 'input.token->a9.h0<q>' is not in this graph"
    ):
        load_tracr(folder, "reverse")
    assert (
        our_name("A0.12->MLP3") == "a0.h12->m3"
        and our_name("pos_embed->logits") == "input.position->logits"
    )


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"tokens": np.zeros((2, 7), int)},
            "inputs of 7 tokens with BOS, but reverse was compiled for 6",
        ),
        ({"tokens": np.full((2, 6), 5)}, "token ids from 5 to 5, but reverse has 0 to 4"),
        (
            {"labels": np.zeros((2, 4), int)},
            r"labels of shape \(2, 4\) for 2 inputs and 5 positions",
        ),
        (
            {"labels": np.array([{}])},
            "no tokens, labels and answer_pos that can be read .*allow_pickle=False",
        ),
        ({"answer_pos": None}, "no tokens, labels and answer_pos that can be read"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(folder, arrays, message):
    good = {
        "tokens": np.zeros((2, 6), int),
        "labels": np.zeros((2, 5), int),
        "answer_pos": np.arange(1, 6),
    }
    np.savez(
        folder / "reverse.eval.npz",
        **{k: v for k, v in {**good, **arrays}.items() if v is not None},
    )
    with pytest.raises(ValueError, match=message):
        load_tracr(folder, "reverse")


def test_weights_that_tracr_does_not_make_are_refused(folder):
    path, config = folder / "reverse.pt", folder / "reverse.config.json"
    good = torch.load(path, weights_only=True)
    torch.save({**good, "blocks.1.mlp.b_in": torch.ones(30)}, path)
    with pytest.raises(ValueError, match="is not zero, but Tracr compiles without biases"):
        load_tracr(folder, "reverse")
    torch.save(good, path)
    config.write_text(json.dumps({**json.loads(config.read_text()), "normalization_type": "LNPre"}))
    with pytest.raises(
        ValueError, match="reverse: normalization_type='LNPre', but Tracr compiles without"
    ):
        load_tracr(folder, "reverse")
