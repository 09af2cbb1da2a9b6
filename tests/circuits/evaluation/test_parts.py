"""Completeness, minimality, known circuits and stability against slow versions of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from circuits.circuit import Circuit
from circuits.evaluation.completeness import completeness
from circuits.evaluation.known import against_known
from circuits.evaluation.minimality import minimality
from circuits.evaluation.stability import jaccard, redrawn, stability
from circuits.extraction import rediscover
from circuits.graph import Graph
from circuits.names import parse_edge
from circuits.regrouped import regrouped
from circuits.selection import random_circuits
from tests.circuits.evaluation.made import DISCOVERY, ENGINE, EVALUATION, GRAPH, circuit, scale

OWN = circuit(12)
CHANCE = random_circuits(GRAPH, len(OWN), 4, 0)


def named(edges: set[str]) -> torch.Tensor:
    mask = torch.zeros_like(GRAPH.exists)
    for name in edges:
        mask[GRAPH.edge_index(name)] = True
    return mask


EVERY = {GRAPH.edge_name(*edge) for edge in GRAPH.edges()}
KEPT = {name for name, _ in OWN.edges}


# ---- completeness --------------------------------------------------------------------------------


def test_knock_outs_take_a_nodes_edges_from_the_circuit_and_from_the_model():
    ours = scale()
    told = completeness(ours, OWN.kept, CHANCE, knockouts=6, seed=0)
    writers = {parse_edge(name).writer for name in KEPT} - {"input"}
    for one in told["knockouts"]:
        out = set(one["nodes"])
        assert out <= writers and 1 <= len(out) <= max(1, len(writers) // 2)
        values = [
            ours.faithfulness(named({n for n in edges if parse_edge(n).writer not in out})).value
            for edges in (KEPT, EVERY)
        ]
        assert [one["circuit"], one["model"]] == pytest.approx(values, abs=1e-6)
        assert one["gap"]["value"] == pytest.approx(abs(values[0] - values[1]), abs=1e-6)
    gaps = [one["gap"]["value"] for one in told["knockouts"]]
    assert told["gap"]["value"] == pytest.approx(sum(gaps) / 6) and told["gap"]["error"] > 0
    assert told["without_circuit"]["value"] == pytest.approx(
        ours.faithfulness(named(EVERY - KEPT)).value, abs=1e-6
    )
    others = [ours.faithfulness(GRAPH.exists & ~mask).value for mask in CHANCE]
    assert told["without_random_circuits"] == pytest.approx(sum(others) / 4, abs=1e-6)


def test_the_whole_model_is_complete():
    told = completeness(scale(), GRAPH.exists, [], knockouts=3, seed=0)
    assert [one["gap"]["value"] for one in told["knockouts"]] == [0.0, 0.0, 0.0]
    assert told["without_circuit"]["value"] == 0
    assert told["without_half_of_the_rest"]["value"] == pytest.approx(1)
    assert told["gap_of_random_circuits"] is None


# ---- minimality ----------------------------------------------------------------------------------


def test_the_effect_of_each_edge_is_what_its_removal_costs():
    ours = scale()
    told = minimality(ours, OWN.kept, CHANCE, edges=100)
    assert told["tested"] == told["edges_kept"] == len(OWN)
    before = ours.faithfulness(OWN.kept).value
    needed = harmful = 0
    for one in told["edges"]:
        after = ours.faithfulness(named(KEPT - {one["edge"]})).value
        assert one["effect"] == pytest.approx(before - after, abs=1e-6)
        needed += one["effect"] > 2 * one["error"]
        harmful += one["effect"] < -2 * one["error"]
    assert {one["edge"] for one in told["edges"]} == KEPT
    assert told["needed"] == pytest.approx(needed / len(OWN)) and needed
    assert told["harmful"] == pytest.approx(harmful / len(OWN))
    assert told["below_noise"] == pytest.approx(1 - (needed + harmful) / len(OWN))
    assert told["below_noise_of_random_circuits"] > told["below_noise"]


def test_so_many_edges_are_drawn():
    told = minimality(scale(), OWN.kept, [], edges=3)
    assert told["tested"] == 3 == len({one["edge"] for one in told["edges"]} & KEPT)
    assert told["below_noise_of_random_circuits"] is None


# ---- known circuits ------------------------------------------------------------------------------


def test_auc_is_the_share_of_pairs_ranked_right():
    known = circuit(6, "kl")
    told = against_known(OWN, known, CHANCE)
    pairs = right = 0.0
    true = {name for name, _ in known.edges}
    rank = {name: abs(OWN.scores[GRAPH.edge_index(name)].item()) for name in EVERY}
    for one in true:
        for other in EVERY - true:
            pairs += 1
            right += (rank[one] > rank[other]) + 0.5 * (rank[one] == rank[other])
    assert told["edges"]["auc"] == pytest.approx(right / pairs)
    assert told["edges"]["precision"] == pytest.approx(len(true & KEPT) / len(KEPT))
    assert told["edges"]["recall"] == pytest.approx(len(true & KEPT) / len(true))
    writers = {parse_edge(name).writer for name in EVERY}
    best = {w: max(rank[n] for n in EVERY if parse_edge(n).writer == w) for w in writers}
    used = {parse_edge(name).writer for name in true}
    pairs = [(best[a] > best[b]) + 0.5 * (best[a] == best[b]) for a in used for b in writers - used]
    assert told["nodes"]["auc"] == pytest.approx(sum(pairs) / len(pairs))
    assert told["edges"]["roc"][0] == [0.0, 0.0] and told["edges"]["roc"][-1] == [1.0, 1.0]
    assert told["edges"]["recall_of_random_circuits"] < told["edges"]["recall"]


def test_kept_edges_come_first_where_the_method_decided():
    low = torch.where(OWN.kept, 0.1, 1.0) * GRAPH.exists
    about = {"method": {"name": "acdc"}, "selection": None}
    decided = Circuit(GRAPH, OWN.kept, low, about)
    assert against_known(decided, OWN, [])["edges"]["auc"] == 1
    assert against_known(replace(decided, about={}), OWN, [])["edges"]["auc"] == 0


def test_a_known_circuit_without_edges_or_with_all_is_refused():
    for kept in (torch.zeros_like(GRAPH.exists), GRAPH.exists):
        with pytest.raises(ValueError, match=r"the known circuit has \d+ of 46 edges; to tell"):
            against_known(OWN, Circuit(GRAPH, kept, OWN.scores), [])


# ---- groups --------------------------------------------------------------------------------------


def test_the_largest_score_of_a_group_stands_for_it():
    theirs, ours = Graph(2, 4), Graph(2, 4, n_kv_heads=2)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(theirs.exists.shape, generator=generator) * theirs.exists
    kept = theirs.exists & (torch.rand(theirs.exists.shape, generator=generator) < 0.2)
    again = regrouped(Circuit(theirs, kept, scores), ours)
    for edge in ours.edges():
        name = parse_edge(ours.edge_name(*edge))
        nodes = ours.reader_nodes(edge[0])
        port = f"<{name.port}>" if name.port else ""
        members = [theirs.edge_index(f"{name.writer}->{node}{port}") for node in nodes]
        largest = max((scores[member].item() for member in members), key=abs)
        assert again.scores[edge].item() == largest
        assert bool(again.kept[edge]) == any(bool(kept[member]) for member in members)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (Graph(3, 4), "3 layers of 4 heads, 4 key-value heads, but here it must be 2 layers"),
        (Graph(2, 4, n_kv_heads=1), "1 key-value heads, but here it must be 2 layers of 4 heads"),
        (Graph(2, 4, parallel=True), "attention and MLP in parallel, but here"),
        (Graph(2, 4, n_positions=5), "5 positions, but here"),
    ],
)
def test_another_graph_is_refused(theirs, message):
    other = Circuit(theirs, theirs.exists, theirs.exists.float())
    with pytest.raises(ValueError, match=message):
        regrouped(other, Graph(2, 4, n_kv_heads=2))


# ---- stability -----------------------------------------------------------------------------------


def test_stability_is_the_overlap_with_circuits_of_redrawn_prompts():
    told = stability(OWN, ENGINE, DISCOVERY, CHANCE, redraws=2, seed=5)
    slow = []
    for seed in (6, 7):
        other = rediscover(OWN, ENGINE, redrawn(DISCOVERY, len(DISCOVERY), seed))
        names = {GRAPH.edge_name(*edge) for edge in other.nonzero().tolist()}
        slow.append(len(names & KEPT) / len(names | KEPT))
    assert told["jaccard"] == pytest.approx(slow) and told["mean"] == pytest.approx(sum(slow) / 2)
    assert told["of_random_circuits"] < told["mean"]
    assert told["found_always"] <= min(told["edges"])


def test_jaccard_of_the_same_and_of_nothing():
    nothing = torch.zeros_like(GRAPH.exists)
    assert jaccard(OWN.kept, OWN.kept) == jaccard(nothing, nothing) == 1
    assert jaccard(OWN.kept, nothing) == 0


def test_one_prompt_cannot_be_redrawn():
    with pytest.raises(ValueError, match="redraws=2 needs at least 2 discovery prompts"):
        stability(OWN, ENGINE, EVALUATION.select([0]), [], redraws=2)
