"""Rank correlations against ranks counted one by one, and samples of every kind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.ablation import AblationConfig, fit_ablation
from circuits.discovery import EAP, EAPIG, Exact, eap, exact
from circuits.engine import Engine
from circuits.evaluation.agreement import agreement, drawn, rank_correlations
from circuits.extraction import extract
from circuits.graph import Graph
from circuits.metrics import METRICS
from circuits.objective import prepare
from circuits.parts import UnitsConfig, divide
from circuits.parts.objective import prepare_units
from circuits.selection import Selection
from tests import tiny

ENGINE = Engine(tiny.gpt2(n_embd=8, n_head=2))
PROMPTS = tiny.prompts(4, seed=1, longest=6)
REFERENCE = tiny.prompts(6, seed=2, longest=7)
FITTED = fit_ablation(AblationConfig("mean"), ENGINE, REFERENCE)
OBJECTIVE = prepare(ENGINE, PROMPTS, METRICS["logit_diff"], FITTED)
VALUES = st.lists(st.integers(-3, 3), min_size=2, max_size=8)


def slow_spearman(one: list[float], other: list[float]) -> float | None:
    """The correlation of ranks; equals share the mean of theirs."""

    def ranks(values):
        return torch.tensor(
            [
                sum(low < value for low in values) + sum(same == value for same in values) / 2
                for value in values
            ],
            dtype=torch.float64,
        )

    a, b = (rank - rank.mean() for rank in (ranks(one), ranks(other)))
    size = (a.square().sum() * b.square().sum()).sqrt()
    return None if size == 0 else float((a * b).sum() / size)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=8))
def test_rank_correlations_are_those_of_ranks(pairs):
    scores, effects = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs))
    told = rank_correlations(scores, effects)
    assert told["spearman"] == pytest.approx(slow_spearman(scores.tolist(), effects.tolist()))
    absolute = slow_spearman(scores.abs().tolist(), effects.abs().tolist())
    assert told["spearman_absolute"] == pytest.approx(absolute)


def test_the_whole_graph_as_a_sample():
    scores, effects = eap(EAP(), OBJECTIVE).scores, exact(Exact(), OBJECTIVE).scores
    graph = ENGINE.graph
    told = agreement(OBJECTIVE, scores, 10_000)
    assert told["sampled"] == graph.n_edges
    here = graph.exists
    assert told["spearman"] == pytest.approx(
        slow_spearman(scores[here].tolist(), effects[here].tolist())
    )
    assert sum(kind["sampled"] for kind in told["by_reader"].values()) == graph.n_edges
    assert set(told["by_reader"]) == {"q", "k", "v", "mlp", "logits"}
    assert set(told["by_writer"]) == {"input", "head", "mlp"}
    rows = [row for row, name in enumerate(graph.readers) if name.endswith("<q>")]
    queries = here[rows]
    assert told["by_reader"]["q"]["spearman"] == pytest.approx(
        slow_spearman(scores[rows][queries].tolist(), effects[rows][queries].tolist())
    )
    assert agreement(OBJECTIVE, effects, 10_000)["spearman"] == pytest.approx(1)
    assert agreement(OBJECTIVE, -effects, 10_000)["spearman"] == pytest.approx(-1)


def test_a_sample_has_as_many_of_each_kind_as_there_are():
    graph = Graph(n_layers=3, n_heads=4)
    parts = drawn(graph, 50, seed=0)
    kinds = [graph.readers[reader].partition("<")[2] or "other" for reader, _ in parts.tolist()]
    assert len(parts) == 50 == len({tuple(part) for part in parts.tolist()})
    assert [kinds.count(port) for port in ("q>", "k>", "v>", "other")] == [10, 10, 10, 20]
    assert graph.exists[tuple(parts.T)].all()
    assert torch.equal(parts, drawn(graph, 50, seed=0))
    assert not torch.equal(parts, drawn(graph, 50, seed=1))


def test_units_are_told_apart_by_kind():
    divided = divide(ENGINE, UnitsConfig("nodes"))
    fitted = fit_ablation(AblationConfig("mean"), ENGINE, REFERENCE, source=divided)
    ours = prepare_units(divided, PROMPTS, METRICS["logit_diff"], fitted)
    told = agreement(ours, exact(Exact(), ours).scores, 100)
    assert told["spearman"] == pytest.approx(1) and set(told["by_kind"]) == {"input", "head", "mlp"}


@pytest.mark.parametrize("sample", [-1, 1])
def test_a_sample_that_has_no_ranks_is_refused(sample):
    with pytest.raises(ValueError, match=f"exact_sample={sample}, but .* at least 2 .* 0 is for"):
        agreement(OBJECTIVE, torch.zeros(ENGINE.graph.exists.shape), sample)


def test_an_extraction_tells_it_where_scores_estimate_effects():
    made = {
        "discovery": tiny.prompts(16, seed=5, longest=6),
        "evaluation": tiny.prompts(16, seed=6, longest=6),
    }
    told = {}
    for sample in (0, 12):
        told[sample] = extract(
            ENGINE,
            *made.values(),
            EAPIG(rule="gim"),
            metric="kl",
            selection=Selection(edges=20),
            random_draws=0,
            exact_sample=sample,
            accept_worse=True,
            seed=3,
        ).metrics
    assert "exact" not in told[0]
    assert told[12]["exact"]["sampled"] == 12 and told[12]["exact"]["seed"] == 3
    assert -1 <= told[12]["exact"]["spearman"] <= 1
