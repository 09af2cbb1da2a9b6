"""Trained ground truth: transformers that were trained until a program's circuit is exactly theirs.

A compiled program is read off too easily: one-hot subspaces, idle heads.  A trained model looks
like any other, yet its circuit is known, because training went on until these gates held
(`measure`; GATES says how far each must go):

    accuracy             on fresh inputs
    keep_ABLATION        accuracy when only the program's edges are kept: under resample, mean and zero
    interchange          accuracy, on the answer that the causal model gives, when an aligned node has the value that it
                         has on another input: worst node, over pairs for which that answer is
                             another one
    strict               accuracy when a node that the program does not use has its value on another input: worst node
    effect               KL(model || model without e) in nats, worst edge e of the program

Through some edges the program reads the position alone, which is the same on every input, so that
resampling need not touch them (it does where the model reads the token too); their effect is taken
under ablation=zero.  How models are trained is said in `abstraction.ground_truth.training`.

    >>> trained = load("recall")
    >>> trained.nodes["value"], len(trained.edges)
    ('a1.h0', 7)

Shapes: batch B, scored positions P, readers R, writers W.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from abstraction.causal_model import CausalModel
from abstraction.ground_truth.ground_truth import accuracy, effects, mask_of
from abstraction.ground_truth.placement import groups, nodes_of, place, reads
from abstraction.ground_truth.program import Program
from abstraction.ground_truth.programs import PROGRAMS
from circuits.ablation import AblationConfig, fit_ablation
from circuits.engine import Engine
from circuits.graph import Graph
from circuits.metrics import metric_named
from circuits.model.load import LoadedModel, ModelConfig, load_model, local_path
from circuits.objective import Objective, prepare
from circuits.prompts import prompts_from_records

FOLDER = (
    "pkg://abstraction/ground_truth/models"  # where the shipped ones are: NAME/model.safetensors
)
GATES: Mapping[str, float] = {
    "accuracy": 0.99,
    "keep_resample": 0.99,
    "keep_mean": 0.99,
    "keep_zero": 0.99,
    "interchange": 0.98,
    "strict": 0.99,
    # nats; far above rounding, and a twentieth of what it takes to change a sure answer
    "effect": 0.05,
}
DRAWS = 100  # rounds of drawing corrupt twins until each has another answer


@dataclass(frozen=True)
class TrainedTruth:
    """What to train, and how."""

    # a name in abstraction.ground_truth.programs.PROGRAMS
    program: str = "recall"
    # edges that the program names but no valid input needs, as ties that never arise; not part of
    # the circuit
    unused: tuple[str, ...] = ()
    # the model: LayerNorm, GELU, and more heads and layers than the program needs, so that there
    # are shortcuts to avoid
    layers: int = 2
    heads: int = 4
    d_model: int = 48
    d_mlp: int = 96
    # optimiser steps, and inputs in each for every loss that is on
    steps: int = 2500
    batch: int = 64
    # peak learning rate of AdamW, its weight decay, the steps of linear warm-up before the cosine
    # decay, and the largest gradient norm
    learning_rate: float = 5e-3
    weight_decay: float = 0.3
    warm_up: int = 100
    clip: float = 1.0
    # weights of the losses (abstraction.ground_truth.training); 0 turns one off
    objective: float = 1.0
    interchange: float = 2.0
    strict: float = 1.0
    edges: float = 2.0
    # share of the steps before interchange and strict join.  Where a head must learn to match (recall), they keep it
    # from doing so; elsewhere, what is learnt without them must be unlearnt
    alone: float = 0.0
    # standard deviation of the first embeddings; other weights have 1 / sqrt(width), the
    # unembedding a tenth of it
    embedding_std: float = 1.0
    # inputs to measure each gate on
    gate_prompts: int = 512
    # decides the first weights and all data; one seed gives one model for one number of threads
    seed: int = 0


# Each ships as models/NAME.
TRUTHS: Mapping[str, TrainedTruth] = {
    "recall": TrainedTruth(
        "recall",
        unused=("input->a1.h0<k>",),  # to break ties; its keys are distinct, so that no two match
        steps=1200,
        batch=96,
        learning_rate=2e-3,
        weight_decay=0.01,
        interchange=1.0,
        edges=1.0,
        alone=0.4,
    ),
    "modular_addition": TrainedTruth("modular_addition"),
    "greater_than": TrainedTruth(
        "greater_than", d_model=32, d_mlp=64, steps=3000, interchange=3.0, edges=1.0
    ),
}


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model, and the program whose circuit it has."""

    config: TrainedTruth
    model: LoadedModel
    gates: Mapping[str, float]  # measured after training; empty before

    @cached_property
    def program(self) -> Program:
        return program_of(self.config)

    @property
    def causal_model(self) -> CausalModel:
        return self.program.causal_model

    @cached_property
    def nodes(self) -> Mapping[str, str]:
        """The node in which each variable lives."""
        return nodes(self.config)

    @cached_property
    def edges(self) -> tuple[str, ...]:
        """The names of the circuit's edges."""
        return edges(self.config)

    def records(self, count: int, seed: int) -> list[dict[str, Any]]:
        """Prompts in the project's format (`records`)."""
        return records(self.program, count, seed)


def program_of(config: TrainedTruth) -> Program:
    """Returns the program that a configuration names.

    Raises:
        ValueError: there is no such program.
    """
    if config.program not in PROGRAMS:
        raise ValueError(
            f"program={config.program!r} is unknown; the programs are {', '.join(PROGRAMS)}"
        )
    return PROGRAMS[config.program]()


def nodes(config: TrainedTruth) -> dict[str, str]:
    """Returns the node in which each variable is to live: as if the program were compiled.

    Raises:
        ValueError: the model has too few layers or heads for the program.
    """
    places = place(program_of(config), n_heads=config.heads, d_mlp=None, redundant=None, copies=1)
    needed = 1 + max(where.layer for where in places.values())
    if config.layers < needed:
        raise ValueError(
            f"layers={config.layers}, but program {config.program!r} needs {needed}; raise layers"
        )
    return {variable: where.nodes[0] for variable, where in places.items()}


def edges(config: TrainedTruth) -> tuple[str, ...]:
    """Returns the names of the edges that the program reads through, but for the unused ones.

    Raises:
        ValueError: an unused edge that is no edge of the program.
    """
    program = program_of(config)
    places = place(program, n_heads=config.heads, d_mlp=None, redundant=None, copies=1)
    found = [
        e
        for group in groups(program, places, split_input=False, per_position=False)
        for e in group.edges
    ]
    if strange := [edge for edge in config.unused if edge not in found]:
        raise ValueError(
            f"unused edge {strange[0]!r} is none of {config.program!r}; those are "
            f"{', '.join(found)}"
        )
    return tuple(edge for edge in found if edge not in config.unused)


def fixed_edges(config: TrainedTruth) -> tuple[str, ...]:
    """Returns those edges of the circuit through which the program reads the position and nothing
    else.
    """
    program, kept = program_of(config), edges(config)
    places = place(program, n_heads=config.heads, d_mlp=None, redundant=None, copies=1)
    varying = set()
    for read in reads(program):
        if read.variable == "position":
            continue
        reader = places[read.step].nodes[0] if read.step in places else "logits"
        port = f"<{read.port}>" if read.port in ("q", "k", "v") else ""
        varying.add(f"{nodes_of(read.variable, places, False)[0]}->{reader}{port}")
    return tuple(edge for edge in kept if edge not in varying)


def load(name: str) -> Trained:
    """Returns a shipped model, or one in a folder, with its program, nodes and edges.

    Raises:
        ValueError: there is none of this name, and no such folder.
    """
    folder = f"{FOLDER}/{name}" if name in TRUTHS else name
    told = local_path(folder) / "config.json"
    if not told.is_file():
        raise ValueError(
            f"no trained truth {name!r}; name a folder with config.json, or one of "
            f"{', '.join(TRUTHS)}"
        )
    report = json.loads(told.read_text(encoding="utf-8"))
    settings = report["config"]
    model = load_model(ModelConfig(path=f"{folder}/model.safetensors"))
    return Trained(
        TrainedTruth(**{**settings, "unused": tuple(settings["unused"])}), model, report["gates"]
    )


def records(program: Program, count: int, seed: int) -> list[dict[str, Any]]:
    """Returns prompts with answers; the corrupt twin is another valid input with another answer.

    Raises:
        ValueError: no input with another answer was found.
    """
    generator, places = torch.Generator().manual_seed(seed), list(program.scored_positions)
    clean, corrupt = program.sample(count, generator), program.sample(count, generator)
    right = answers(program, clean)
    for _ in range(DRAWS):
        wrong = answers(program, corrupt)
        if not (same := (wrong == right).any(1)).any():
            break
        corrupt = torch.where(same[:, None], program.sample(count, generator), corrupt)
    else:
        raise ValueError(
            f"no input of {program.name} with other answers in {DRAWS} draws; check its sampler"
        )
    return [
        {
            "clean": c,
            "corrupt": d,
            "answers": [[a] for a in r],
            "wrong_answers": [[a] for a in w],
            "positions": places,
        }
        for c, d, r, w in zip(
            clean.tolist(), corrupt.tolist(), right.tolist(), wrong.tolist(), strict=True
        )
    ]


def answers(
    program: Program,
    tokens: Int[Tensor, "B S"],
    variables: Iterable[str] = (),
    source: Tensor | None = None,
) -> Int[Tensor, "B P"]:
    """Returns what the causal model answers, when some variables have the values that they have on
    the source.
    """
    sources = {} if source is None else {name: {"token": source} for name in variables}
    return program.causal_model.interchange({"token": tokens}, sources)["answer"][
        :, list(program.scored_positions)
    ]


# ---- gates ---------------------------------------------------------------------------------------


def measure(trained: Trained, *, prompts: int = 512, seed: int = 1) -> dict[str, float]:
    """Returns the value of every gate, measured on fresh inputs."""
    tested = objectives(trained, prompts=prompts, seed=seed)
    engine = tested["resample"].engine
    graph, keep = engine.graph, mask_of(engine.graph, trained.edges)
    tokens, source = (
        trained.program.sample(prompts, torch.Generator().manual_seed(seed + n)) for n in (2, 3)
    )
    aligned = set(trained.nodes.values())
    right = {
        node: interchanged(trained, engine, node, tokens, source)
        for node in graph.writers[graph.n_inputs :]
    }
    return {
        "accuracy": _mean(accuracy(tested["resample"], graph.exists)),
        **{f"keep_{name}": _mean(accuracy(objective, keep)) for name, objective in tested.items()},
        "interchange": min(right[node] for node in aligned),
        "strict": min((value for node, value in right.items() if node not in aligned), default=1.0),
        "effect": min(edge_effects(trained, tested).values()),
    }


def objectives(trained: Trained, *, prompts: int = 512, seed: int = 1) -> dict[str, Objective]:
    """Returns fresh prompts with KL as metric, under each of the ablations that the gates speak of."""
    engine = Engine(trained.model)
    test, reference = (
        prompts_from_records(trained.records(n, s)) for n, s in ((prompts, seed), (256, seed + 1))
    )
    return {
        name: prepare(
            engine, test, metric_named("kl"), fit_ablation(AblationConfig(name), engine, reference)
        )
        for name in ("resample", "mean", "zero")
    }


@torch.no_grad()
def interchanged(
    trained: Trained, engine: Engine, node: str, tokens: Tensor, source: Tensor
) -> float:
    """Returns how often the answer is the causal model's when a node has its value on the source
    inputs.

    For an aligned node only pairs count for which that answer is another one than without the
    interchange.
    """
    program, held = trained.program, [name for name, home in trained.nodes.items() if home == node]
    wanted, before = answers(program, tokens, held, source), answers(program, tokens)
    ablated = engine.ablated(engine.clean(source).writers)
    logits = engine.masked(
        tokens, without(engine.graph, node), ablated, positions=scored(program, len(tokens))
    )  # [B, P, vocabulary]
    right = (logits.argmax(-1) == wanted)[
        wanted != before if held else torch.ones_like(wanted, dtype=torch.bool)
    ]
    if not len(right):
        raise ValueError(
            f"no interchange at {node} changes an answer of {program.name}; draw more prompts"
        )
    return _mean(right)


def edge_effects(trained: Trained, tested: Mapping[str, Objective]) -> dict[str, float]:
    """Returns KL(model || model without the edge), in nats, for each edge of the circuit, on the
    given `behaviours`.

    Removed edges carry their value on another input, or nothing where the program reads the
    position alone.
    """
    fixed, found = fixed_edges(trained.config), {}
    for name, chosen in (
        ("resample", [e for e in trained.edges if e not in fixed]),
        ("zero", list(fixed)),
    ):
        if chosen:
            found |= dict(
                zip(chosen, effects(tested[name], [(edge,) for edge in chosen]), strict=True)
            )
    return {edge: found[edge] for edge in trained.edges}


def without(graph: Graph, node: str) -> Bool[Tensor, "R W"]:
    """Returns all edges but those out of a node."""
    mask = graph.exists.clone()
    mask[:, graph.writer_index[node]] = False
    return mask


def scored(program: Program, count: int) -> Int[Tensor, "B P"]:
    """Returns the scored positions of as many inputs."""
    return torch.tensor(program.scored_positions).expand(count, -1)


def _mean(values: Float[Tensor, " n"] | Bool[Tensor, " n"]) -> float:
    return values.double().mean().item()
