"""Trained ground truth: transformers that were trained until a program's circuit is exactly theirs.

A compiled program is read off too easily: one-hot subspaces, idle heads.  A trained model looks
like any other, yet its circuit is known, because training went on until these gates held
(`measure`; GATES says how far each must go):

    accuracy        on fresh inputs
    keep_ABLATION   accuracy when only the program's edges are kept: resample, mean and zero
    interchange     accuracy, on the answer that the causal model gives, when an aligned node has
                    its value on another input: worst node, over pairs where it is another answer
    strict          accuracy when a node of none has its value on another input: worst node
    effect          KL(model || model without e) in nats, worst edge e of the program

Through some edges the program reads the position alone, which is the same on every input, so that
resampling need not touch them (it does where the model reads the token too); their effect is taken
under ablation=zero.  How models are trained is said in `abstraction.ground_truth.training`.

Shapes: batch B, scored positions P, readers R, writers W.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from abstraction.ground_truth.effects import accuracy, effects, mask_of
from abstraction.ground_truth.placement import groups, place
from abstraction.ground_truth.program import Program
from abstraction.ground_truth.programs import PROGRAMS
from circuits.ablation import AblationConfig, fit_ablation
from circuits.engine import Engine
from circuits.graph import Graph
from circuits.metrics import metric_named
from circuits.model.load import LoadedModel, ModelConfig, load_model, local_path
from circuits.objective import Objective, prepare
from circuits.prompts import Prompts, prompts_from_records

FOLDER = "pkg://abstraction/ground_truth/models"  # of the shipped ones: NAME/model.safetensors
GATES: Mapping[str, float] = {
    "accuracy": 0.99,
    "keep_resample": 0.99,
    "keep_mean": 0.99,
    "keep_zero": 0.99,
    "interchange": 0.98,
    "strict": 0.99,
    "effect": 0.05,  # nats; far above rounding, a twentieth of what changes a sure answer
}


@dataclass(frozen=True)
class TrainedTruth:
    """What to train, and how."""

    program: str = "recall"  # a name in abstraction.ground_truth.programs.PROGRAMS
    # edges that the program names but no valid input needs; not part of the circuit
    unused: tuple[str, ...] = ()
    # LayerNorm, GELU, and more heads and layers than the program needs: shortcuts to avoid
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
    behaviour: float = 1.0
    interchange: float = 2.0
    strict: float = 1.0
    edges: float = 2.0
    # share of the steps before interchange and strict join.  Where a head must learn to match
    # (recall), they keep it from doing so; elsewhere, what is learnt without them must be unlearnt
    alone: float = 0.0
    # standard deviation of the first embeddings; that of others is 1 / sqrt(width), and a tenth of
    # it for the unembedding
    embedding_std: float = 1.0
    gate_prompts: int = 512  # inputs to measure each gate on
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


@dataclass(frozen=True)
class Wanted:
    """The circuit that a model is trained to have: as if the program were compiled."""

    program: Program
    nodes: Mapping[str, str]  # in which each variable lives
    edges: tuple[str, ...]
    fixed_edges: tuple[str, ...]  # through which the program reads the position and nothing else


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model, and the program whose circuit it has."""

    config: TrainedTruth
    model: LoadedModel
    gates: Mapping[str, float]  # measured after training; empty before

    @cached_property
    def wanted(self) -> Wanted:
        return wanted(self.config)

    @property
    def program(self) -> Program:
        return self.wanted.program

    @property
    def nodes(self) -> Mapping[str, str]:
        """The node in which each variable lives."""
        return self.wanted.nodes

    @property
    def edges(self) -> tuple[str, ...]:
        """The names of the circuit's edges."""
        return self.wanted.edges

    @property
    def claimed_edges(self) -> tuple[tuple[str, ...], ...]:
        """The edges of the circuit, each to be removed alone."""
        return tuple((edge,) for edge in self.edges)

    def records(self, count: int, seed: int) -> list[dict[str, Any]]:
        """Prompts with a counterfactual twin (`Program.records`)."""
        return self.program.records(count, seed)


def wanted(config: TrainedTruth) -> Wanted:
    """Returns the circuit that a configuration names.

    Raises:
        ValueError: an unknown program, one that does not fit, or an unused edge that it lacks.
    """
    if config.program not in PROGRAMS:
        raise ValueError(
            f"program={config.program!r} is unknown; the programs are {', '.join(PROGRAMS)}"
        )
    program = PROGRAMS[config.program]()
    places = place(program, n_heads=config.heads)
    needed = 1 + max(where.layer for where in places.values())
    if config.layers < needed:
        raise ValueError(
            f"layers={config.layers}, but program {config.program!r} needs {needed}; raise layers"
        )
    found = {group.edges[0]: group.variables for group in groups(program, places)}
    if strange := [edge for edge in config.unused if edge not in found]:
        raise ValueError(
            f"unused edge {strange[0]!r} is none of {config.program!r}; those are "
            f"{', '.join(found)}"
        )
    edges = tuple(edge for edge in found if edge not in config.unused)
    fixed = tuple(edge for edge in edges if set(found[edge]) == {"position"})
    nodes = {variable: where.nodes[0] for variable, where in places.items()}
    return Wanted(program, nodes, edges, fixed)


def load_trained(name: str) -> Trained:
    """Returns a shipped model, or one in a folder, with its program, nodes and edges.

    >>> trained = load_trained("recall")
    >>> trained.nodes["value"], len(trained.edges)
    ('a1.h0', 7)

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
    config = TrainedTruth(**{**settings, "unused": tuple(settings["unused"])})
    return Trained(config, load_model(ModelConfig(f"{folder}/model.safetensors")), report["gates"])


# ---- gates ---------------------------------------------------------------------------------------


def measure(trained: Trained, *, prompts: int = 512, seed: int = 1) -> dict[str, float]:
    """Returns the value of every gate, measured on fresh inputs."""
    tested = objectives(trained, prompts=prompts, seed=seed)
    engine = tested["resample"].engine
    graph, keep = engine.graph, mask_of(engine.graph, trained.edges)
    tokens, source = (
        trained.program.sample(prompts, torch.Generator().manual_seed(seed + n)) for n in (2, 3)
    )
    aligned, nodes = set(trained.nodes.values()), graph.writers[graph.n_inputs :]
    right = {node: interchanged(trained, engine, node, tokens, source) for node in nodes}
    return {
        "accuracy": _mean(accuracy(tested["resample"], graph.exists)),
        **{f"keep_{name}": _mean(accuracy(objective, keep)) for name, objective in tested.items()},
        "interchange": min(right[node] for node in aligned),
        "strict": min((value for node, value in right.items() if node not in aligned), default=1.0),
        "effect": min(edge_effects(trained, tested).values()),
    }


def objectives(trained: Trained, *, prompts: int = 512, seed: int = 1) -> dict[str, Objective]:
    """Returns KL on fresh prompts, under each of the ablations that the gates speak of."""
    engine = Engine(trained.model)
    test = prompts_from_records(trained.records(prompts, seed))
    reference = prompts_from_records(trained.records(256, seed + 1))
    tested = {}
    for name in ("resample", "mean", "zero"):
        ablation = fit_ablation(AblationConfig(name), engine, reference)
        tested[name] = prepare(engine, test, metric_named("kl"), ablation)
    return tested


def interchanged(
    trained: Trained, engine: Engine, node: str, tokens: Tensor, source: Tensor
) -> float:
    """Returns how often the answer is the causal model's when a node has its value on the source.

    For an aligned node only pairs count for which that answer is another one than without the
    interchange.
    """
    program, held = trained.program, [name for name, home in trained.nodes.items() if home == node]
    expected, before = program.answered(tokens, held, source), program.answered(tokens)
    with torch.no_grad():
        ablated = engine.ablated(engine.writers(Prompts.from_tokens(source)))
        base = Prompts.from_tokens(tokens, positions=scored(program, len(tokens)))
        logits = engine.masked(base, without(engine.graph, node), ablated)  # [B, P, vocabulary]
    right = logits.argmax(-1) == expected
    if held:
        right = right[expected != before]
    if not right.numel():
        raise ValueError(
            f"no interchange at {node} changes an answer of {program.name}; draw more prompts"
        )
    return _mean(right)


def edge_effects(trained: Trained, tested: Mapping[str, Objective]) -> dict[str, float]:
    """Returns KL(model || model without the edge), in nats, for each edge of the circuit.

    Removed edges carry their value on another input, or nothing where the program reads the
    position alone.
    """
    found = {}
    for edge in trained.edges:
        ablation = "zero" if edge in trained.wanted.fixed_edges else "resample"
        (found[edge],) = effects(tested[ablation], [(edge,)])
    return found


def without(graph: Graph, node: str) -> Bool[Tensor, "R W"]:
    """Returns all edges but those out of a node."""
    mask = graph.exists.clone()
    mask[:, graph.writer_index[node]] = False
    return mask


def scored(program: Program, count: int) -> Int[Tensor, "B P"]:
    """Returns the scored positions of as many inputs."""
    return torch.tensor(program.scored_positions).expand(count, -1)


def _mean(values: Float[Tensor, "..."] | Bool[Tensor, "..."]) -> float:
    return values.double().mean().item()
