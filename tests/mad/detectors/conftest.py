"""A tiny model with a random circuit, edges told apart by position or not, and its prompts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from circuits.circuit import Circuit
from circuits.engine import Engine
from circuits.model.load import LoadedModel, ModelConfig, load_model
from circuits.prompts import Prompts, prompts_from_records
from circuits.selection import random_circuits
from mad.detector import Context
from tests import tiny

LENGTH = 7  # of prompts where edges are told apart by position
KINDS = ("edges", "positions")

Draw = Callable[[int, int], Prompts]


def prompts_of(engine: Engine, count: int, seed: int) -> Prompts:
    """Random prompts that begin alike, with one or two scored positions."""
    draw = torch.Generator().manual_seed(seed)
    records = []
    for _ in range(count):
        length = engine.graph.n_positions or int(torch.randint(4, 10, (1,), generator=draw))
        scored = [-1, 1] if int(torch.randint(2, (1,), generator=draw)) else [-1]
        tokens = [0, *torch.randint(1, 29, (length - 1,), generator=draw).tolist()]
        records.append({"clean": tokens, "positions": scored})
    return prompts_from_records(records, vocabulary=29)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> LoadedModel:
    """It lies in a folder."""
    folder = tmp_path_factory.mktemp("model")
    tiny.gpt2_module().to(torch.float64).save_pretrained(folder)
    return load_model(ModelConfig(path=str(folder), dtype="float64"))


@pytest.fixture(scope="session")
def contexts(model) -> dict[str, Context]:
    made = {}
    for kind, n_positions, n_edges in (("edges", None, 12), ("positions", LENGTH, 60)):
        engine = Engine(model, n_positions=n_positions)
        (kept,) = random_circuits(engine.graph, n_edges, 1, seed=1)
        made[kind] = Context(engine, Circuit(engine.graph, kept, kept.float()))
    return made


@pytest.fixture(params=KINDS)
def context(request, contexts) -> Context:
    return contexts[request.param]


@pytest.fixture
def draw(context) -> Draw:
    """Prompts that the context's engine takes: so many, by a seed."""
    return lambda count, seed: prompts_of(context.engine, count, seed)
