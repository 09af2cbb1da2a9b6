"""The fast sweep against the plain one: one run under a whole mask for each edge, nothing shared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.ablation import ABLATIONS, AblationConfig, fit_ablation
from circuits.discovery import ACDC, acdc
from circuits.discovery.removals import Removals
from circuits.discovery.sweeping import Sweep, sweep_order
from circuits.engine import Engine
from circuits.engine.incremental import Incremental
from circuits.graph import Graph
from circuits.metrics import METRICS
from circuits.model.load import LoadedModel
from circuits.objective import Objective, prepare
from tests import tiny
from tests.budget import memory_for

TOKENS = 5
MODELS = {
    "gpt2": lambda dtype: tiny.gpt2(dtype, n_embd=8, n_head=2),
    "grouped queries": lambda dtype: tiny.native(dtype, n_heads=4, n_key_value_heads=2, d_head=3),
    "post-norm": lambda dtype: tiny.huggingface("gemma2", dtype),
    "queries normed together": lambda dtype: tiny.huggingface("olmo2", dtype),
    "parallel": lambda dtype: tiny.huggingface("gptj", dtype),
    "bidirectional": lambda dtype: tiny.native(dtype, attention_dir="bidirectional", n_heads=2),
    "attention only": lambda dtype: tiny.native(dtype, attn_only=True, n_heads=2),
}
MADE: dict[tuple[str, torch.dtype], LoadedModel] = {}


def engine_of(name: str, dtype: torch.dtype = torch.float64, *, positions: bool = False) -> Engine:
    model = MADE.setdefault((name, dtype), MODELS[name](dtype))
    return Engine(model, n_positions=TOKENS if positions else None)


def prompts_of(engine: Engine, count: int, seed: int):
    shortest = 4 if engine.graph.n_positions is None else TOKENS
    longest = 7 if engine.graph.n_positions is None else TOKENS
    return tiny.prompts(count, seed, shortest=shortest, longest=longest)


def objective_of(engine: Engine, ablation: str = "mean", memory: str = "2GB") -> Objective:
    reference = prompts_of(engine, 6, seed=2)
    fitted = fit_ablation(AblationConfig(ablation), engine, reference)
    prompts = prompts_of(engine, 4, seed=1)
    if memory == "tight":
        memory = memory_for(2, engine, prompts, fitted)
    return prepare(engine, prompts, METRICS["kl"], fitted, memory=memory)


def sequential(objective: Objective, tau: float, seed: int | None):
    """The kept edges, and each judged edge's delta."""
    graph = objective.engine.graph

    def cost(kept) -> float:
        return -objective.measure(kept).double().mean().item()

    kept, deltas = graph.exists.clone(), torch.zeros(graph.exists.shape, dtype=torch.float64)
    current, reader = cost(kept), None
    for edge in sweep_order(graph, seed):
        if edge[0] != reader:
            reader = edge[0]
            read = graph.read(kept[None])[1][0, reader]  # [s]
            kept[reader] &= read
        if not kept[edge]:
            continue
        kept[edge] = False
        without = cost(kept)
        deltas[edge] = without - current
        if deltas[edge] < tau:
            current = without
        else:
            kept[edge] = True
    return kept, deltas


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=4, deadline=None)
@given(
    tau=st.sampled_from([3e-4, 3e-3, 0.02, 0.1]),
    seed=st.sampled_from([None, 0, 1]),
    ablation=st.sampled_from(sorted(ABLATIONS)),
    positions=st.sampled_from([False, False, True]),
)
def test_the_sweep_is_the_sequential_one(name, tau, seed, ablation, positions):
    objective = objective_of(engine_of(name, positions=positions), ablation)
    kept, deltas = sequential(objective, tau, seed)
    order = {"order": "sweep"} if seed is None else {"order": "shuffle", "seed": seed}
    found = acdc(ACDC(tau=tau, **order), objective)
    coarse = name in ("post-norm", "queries normed together", "parallel")  # computes in float32
    assert found.details["closest_to_tau"] > 1e-9, "too close to tau to compare"
    assert torch.equal(found.kept, kept)
    bound = 1e-5 if coarse else 1e-9
    exact = torch.from_numpy(found.details.pop("deltas")) if "deltas" in found.details else None
    ours = found.scores.double() if exact is None else exact
    torch.testing.assert_close(ours, deltas, atol=max(bound, 1e-7), rtol=1e-6)
    assert found.details["runs"] == int((deltas != 0).sum())
    assert found.details["batched_runs"] <= found.details["runs"] <= found.details["candidates"]
