"""Circuits as files of other programs: read back, they are what they were."""

from __future__ import annotations

import json

import networkx as nx
import pytest
import torch

from circuits.circuit import Circuit
from circuits.export import export_circuit
from circuits.graph import Graph
from circuits.names import parse_edge
from circuits.regrouped import regrouped

GRAPHS = {
    "plain": Graph(2, 4),
    "parallel": Graph(2, 2, parallel=True),
    "grouped": Graph(2, 4, n_kv_heads=2),
    "bidirectional": Graph(1, 2, causal=False),
}
BEYOND = {
    "no MLPs": Graph(1, 2, attention_only=True),
    "two inputs": Graph(1, 2, split_input=True),
    "by position": Graph(1, 2, n_positions=3),
}


def drawn(graph: Graph) -> Circuit:
    """About half of the edges, scores of both signs."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(graph.exists.shape, generator=generator) * graph.exists
    kept = graph.exists & (torch.rand(graph.exists.shape, generator=generator) < 0.5)
    return Circuit(graph, kept, scores, {"metric": "kl", "method": {"name": "eap_ig"}})


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_of_eap_ig_is_read_back_as_it_was(tmp_path, name):
    circuit = drawn(GRAPHS[name])
    again = Circuit.load(circuit.export(tmp_path / "theirs.json"))
    assert again.graph == circuit.graph
    assert torch.equal(again.kept, circuit.kept) and torch.equal(again.scores, circuit.scores)


def test_what_a_group_of_heads_reads_is_written_for_each_of_them(tmp_path):
    graph = GRAPHS["grouped"]
    circuit = drawn(graph)
    data = json.loads(circuit.export(tmp_path / "theirs.json").read_text())
    assert set(data["edges"]) == {
        each.edge_name(*edge) for each in [Graph(2, 4)] for edge in each.edges()
    }
    own = circuit.scores[graph.edge_index("input->a1.kv1<v>")].item()
    for head in (2, 3):
        assert data["edges"][f"input->a1.h{head}<v>"]["score"] == own


def test_of_a_group_the_largest_score_stands_for_it_and_any_kept_edge_keeps_it():
    theirs, ours = Graph(1, 4), Graph(1, 4, n_kv_heads=2)
    scores = torch.zeros(theirs.exists.shape)
    kept = torch.zeros_like(theirs.exists)
    for head, score in enumerate((0.5, -2.0, 0.25, 0.125)):
        scores[theirs.edge_index(f"input->a0.h{head}<k>")] = score
    kept[theirs.edge_index("input->a0.h3<k>")] = True
    again = regrouped(Circuit(theirs, kept, scores), ours)
    assert again.scores[ours.edge_index("input->a0.kv0<k>")].item() == -2.0
    assert again.scores[ours.edge_index("input->a0.kv1<k>")].item() == 0.25
    assert [name for name, _ in again.edges] == ["input->a0.kv1<k>"]
    with pytest.raises(ValueError, match="another graph: 1 layers of 4 heads.*must be 2 layers"):
        regrouped(again, Graph(2, 4))


@pytest.mark.parametrize("suffix", ["graphml", "dot"])
@pytest.mark.parametrize("graph", [*GRAPHS.values(), BEYOND["by position"]], ids=str)
def test_networkx_reads_the_kept_edges_with_scores(tmp_path, graph, suffix):
    circuit = drawn(graph)
    path = circuit.export(tmp_path / f"circuit.{suffix}")
    read = nx.read_graphml if suffix == "graphml" else nx.nx_agraph.read_dot
    found = read(path)
    expected = {
        (writer, node, edge): score
        for edge, score in circuit.edges
        for writer in [parse_edge(edge).writer]
        for node in graph.reader_nodes(graph.edge_index(edge)[0])
    }
    told = {
        (writer, node, data["edge"]): float(data["score"])
        for writer, node, data in found.edges(data=True)
    }
    assert told == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", BEYOND)
def test_what_their_graphs_cannot_say_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"which an EAP-IG graph file cannot say; export it as"):
        drawn(BEYOND[name]).export(tmp_path / "theirs.json")
    assert not list(tmp_path.iterdir())


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'.png' is none of .json, .dot, .graphml"):
        export_circuit(drawn(GRAPHS["plain"]), tmp_path / "circuit.png")


def test_a_node_that_no_model_of_the_size_has_is_refused(tmp_path):
    path = drawn(GRAPHS["plain"]).export(tmp_path / "theirs.json")
    data = json.loads(path.read_text())
    data["nodes"]["a7.h0"] = {"in_graph": True}
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"a node 'a7.h0', which is none of a model of 2 layers"):
        Circuit.load(path)


def test_the_published_scores_of_gpt2_survive_the_round_trip(tmp_path, cases):
    circuit = Circuit.load(cases / "prompts" / "mib_ioi_eap_ig_scores.json")
    assert (circuit.graph.n_edges, len(circuit)) == (32491, 756)
    again = Circuit.load(circuit.export(tmp_path / "again.json"))
    assert torch.equal(again.kept, circuit.kept) and torch.equal(again.scores, circuit.scores)
