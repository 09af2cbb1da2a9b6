"""The fast sweep against the plain one: one run under a whole mask for each edge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from circuits.ablation import ABLATIONS, AblationConfig, fit_ablation
from circuits.discovery import ACDC, acdc
from circuits.discovery.acdc import swept
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


def quick(*names: str) -> list:
    """The names of all models, of which others than these are slow."""
    return [
        name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in MODELS
    ]


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
    if memory != "2GB":
        least = int(memory_for(1, engine, prompts, fitted))
        memory = str(least if memory == "some" else least // 2 + 1)
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
    return kept, deltas, current


def assert_sequential(objective: Objective, tau: float, seed: int | None, bound: float) -> Sweep:
    """The fast sweep keeps the same edges, at the same deltas; returns it."""
    kept, deltas, cost = sequential(objective, tau, seed)
    sweep, _ = swept(objective, sweep_order(objective.engine.graph, seed), tau)
    if sweep.closest > bound:  # else rounding decides
        assert torch.equal(torch.from_numpy(sweep.kept), kept)
        assert sweep.deltas == pytest.approx(deltas.numpy(), abs=bound)
        assert sweep.cost == pytest.approx(cost, abs=bound)
    return sweep


@pytest.mark.parametrize("name", quick("gpt2", "post-norm"))
@settings(max_examples=3, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    tau=st.sampled_from([3e-3, 0.02, 0.1]),
    seed=st.sampled_from([None, 0, 1]),
    ablation=st.sampled_from(sorted(ABLATIONS)),
    positions=st.sampled_from([False, False, True]),
)
def test_the_sweep_is_the_sequential_one(name, tau, seed, ablation, positions):
    objective = objective_of(engine_of(name, positions=positions), ablation)
    coarse = name in ("post-norm", "queries normed together", "parallel")  # computes in float32
    sweep = assert_sequential(objective, tau, seed, 1e-5 if coarse else 1e-9)
    assert 0 < sweep.windows <= sweep.judged <= sweep.candidates


def test_in_float32_too():
    sweep = assert_sequential(objective_of(engine_of("gpt2", torch.float32)), 0.01, None, 1e-5)
    assert sweep.closest > 1e-5, "rounding decided, so that nothing was shown"


@pytest.mark.parametrize("memory", ["some", "none"])
def test_batches_that_memory_cannot_hold_are_run_under_whole_masks(memory):
    objective = objective_of(engine_of("gpt2"), "counterfactual", memory)
    removals = Removals(objective, objective.engine.graph.exists)
    assert len(objective.batches) == 4 and removals.held < 4
    assert (len(objective.batches.kept) > 0) == (memory == "some")
    assert_sequential(objective, 0.02, None, 1e-9)


def test_a_sweep_costs_few_runs_and_says_what_they_cost():
    found = acdc(ACDC(tau=0.1), objective_of(engine_of("gpt2")))
    told = found.details
    assert told["batched_runs"] < told["runs"] / 2 and told["candidates"] < 2 * told["runs"]
    assert 0 < told["forwards"] < told["candidates"]


def test_wrong_forecasts_change_nothing():
    """Each edge is expected to do the opposite of what it does."""
    objective = objective_of(engine_of("gpt2"))
    order = sweep_order(objective.engine.graph, None)
    sweep, _ = swept(objective, order, 0.02)
    wrong, _ = swept(objective, order, 0.02, np.where(sweep.kept, -1.0, 1.0))
    assert np.array_equal(sweep.kept, wrong.kept) and wrong.windows > sweep.windows
    right, _ = swept(objective, order, 0.02, sweep.judgements)
    assert np.array_equal(sweep.kept, right.kept) and right.windows < sweep.windows


@pytest.mark.parametrize("seed", [None, 3])
def test_an_order_has_each_edge_once_and_readers_from_last_to_first(seed):
    graph = Graph(n_layers=2, n_heads=2, n_positions=2)
    order = sweep_order(graph, seed)
    assert sorted(order) == graph.edges()
    readers = [edge[0] for edge in order]
    assert readers == sorted(readers, reverse=True)
    assert (order == graph.sweep_order()) == (seed is None)


# ---- several thresholds --------------------------------------------------------------------------


def test_an_edge_scores_the_smallest_tau_at_which_it_was_removed():
    objective, taus = objective_of(engine_of("gpt2")), [0.02, 0.1, 3e-3]
    each = {tau: acdc(ACDC(tau=tau), objective) for tau in taus}
    found = acdc(ACDC(taus=taus), objective)
    assert torch.equal(found.kept, each[0.02].kept) and found.details["tau"] == 0.02
    assert [told["tau"] for told in found.details["taus"]] == sorted(taus)
    for edge in objective.engine.graph.edges():
        removed = [tau for tau in sorted(taus) if not each[tau].kept[edge]]
        expected = removed[0] if removed else each[0.1].scores[edge].item()
        assert found.scores[edge].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert removed or found.scores[edge] >= 0.1
    assert not found.scores[~objective.engine.graph.exists].any()


@pytest.mark.parametrize(
    ("settings_", "said"),
    [
        ({"taus": []}, r"taus=\[\] and tau=None: give several taus"),
        ({"taus": [0.1], "tau": 0.1}, r"taus=\[0.1\] and tau=0.1: give several"),
        ({"taus": [0.1, 0.0]}, r"taus\[1\]=0.0, but it must be above 0"),
    ],
)
def test_taus_that_say_nothing_or_two_things_are_refused(settings_, said):
    with pytest.raises(ValueError, match=said):
        acdc(ACDC(**settings_), objective_of(engine_of("gpt2")))


# ---- incremental runs ----------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("name", quick("grouped queries"))
def test_incremental_runs_are_those_under_whole_masks(name, positions):
    """From random circuits, by removals of any edges at once, whichever comes first."""
    engine = engine_of(name, positions=positions)
    prompts, graph, draw = prompts_of(engine, 4, seed=1), engine.graph, np.random.default_rng(0)
    scored, changed = prompts.positions >= 0, 0
    for ablation in ABLATIONS:
        fitted = fit_ablation(AblationConfig(ablation), engine, prompts_of(engine, 6, seed=2))
        ablated = fitted.values(engine, prompts)
        kept = graph.exists & torch.from_numpy(draw.random(graph.exists.shape) < 0.7)
        run = Incremental(engine, prompts, kept, ablated)
        for few in (2, 12, 3):
            edges = [
                tuple(edge) for edge in draw.permutation(kept.nonzero().numpy())[:few].tolist()
            ]
            removed = draw.random((3, len(edges))) < 0.6
            masks = kept[None].repeat(3, *[1] * kept.ndim)
            for candidate, number in np.argwhere(removed):
                masks[(candidate, *edges[number])] = False
            logits, expected = run.without(edges, removed), engine.masked(prompts, masks, ablated)
            torch.testing.assert_close(logits[:, scored], expected[:, scored], atol=1e-9, rtol=1e-9)
            run.accept(1)
            torch.testing.assert_close(run.logits[scored], expected[1, scored])
            changed += not torch.allclose(expected[0], expected[1])
            kept = masks[1]
    assert changed, "no removal did anything"
