"""Graphs that EAP-IG and MIB wrote: read where they are ours, else refused with the reason."""

from __future__ import annotations

import json

import pytest
import torch

from circuits.circuit import Circuit
from circuits.graph import Graph
from circuits.names import parse_edge


def written(graph: Graph, kept: set[str], **changes) -> dict:
    """What EAP-IG's `Graph.to_json` writes of a graph; edge number n scores n/8."""
    names = [graph.edge_name(*edge) for edge in graph.edges()]
    edges = {n: {"score": i / 8, "in_graph": n in kept} for i, n in enumerate(names)}
    nodes = {name: {"in_graph": True} for name in (*graph.writers, "logits")}
    cfg = {
        "n_layers": graph.n_layers,
        "n_heads": graph.n_heads,
        "parallel_attn_mlp": graph.parallel,
        "d_model": 8,
    }
    return {"cfg": cfg, "nodes": nodes, "edges": edges, **changes}


def loaded(tmp_path, data: dict) -> Circuit:
    (tmp_path / "mib.json").write_text(json.dumps(data))
    return Circuit.load(tmp_path / "mib.json")


KEPT = {"input->a0.h1<v>", "a0.h1->m1", "m1->logits"}


@pytest.mark.parametrize("parallel", [False, True])
def test_every_edge_is_read_with_its_score_and_whether_it_is_kept(tmp_path, parallel):
    graph = Graph(2, 3, parallel=parallel)
    data = written(graph, KEPT)
    circuit = loaded(tmp_path, data)
    assert circuit.graph == graph
    for name, edge in data["edges"].items():
        index = graph.edge_index(name)
        assert bool(circuit.kept[index]) == edge["in_graph"] == (name in KEPT)
        assert circuit.scores[index].item() == edge["score"]
        assert parse_edge(name).writer in data["nodes"]
    assert repr(circuit) == f"Circuit(3 of {graph.n_edges} edges)"


def test_edges_that_are_left_out_are_not_kept(tmp_path):
    data = written(Graph(2, 2), KEPT)
    data["edges"] = {name: edge for name, edge in data["edges"].items() if name in KEPT}
    circuit = loaded(tmp_path, data)
    assert {name for name, _ in circuit.edges} == KEPT
    assert not circuit.scores[~circuit.kept].any()


def test_it_is_kept_as_a_circuit_of_ours(tmp_path):
    circuit = loaded(tmp_path, written(Graph(2, 2), KEPT))
    circuit.save(tmp_path / "run")
    again = Circuit.load(tmp_path / "run")
    assert torch.equal(again.kept, circuit.kept) and torch.equal(again.scores, circuit.scores)


def test_scores_of_a_circuit_of_ours_beside_it_are_not_taken(tmp_path):
    graph = Graph(2, 2)
    Circuit(graph, graph.exists, torch.full(graph.exists.shape, 9.0)).save(tmp_path)
    circuit = loaded(tmp_path, written(graph, KEPT))
    assert circuit.scores[graph.edge_index("m1->logits")].item() < 9


def neurons(data: dict) -> None:
    data["nodes"]["m0"]["neurons"] = [True, False]


def no_edge_kept(data: dict) -> None:
    for edge in data["edges"].values():
        edge["in_graph"] = False


def change(name: str, **fields):
    def apply(data: dict) -> None:
        data["edges"].setdefault(name, {"score": 1.0, "in_graph": True}).update(fields)

    return apply


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (neurons, "EAP-IG graph file that keeps single neurons of node 'm0'"),
        (no_edge_kept, "EAP-IG graph file with scores alone: none of its 46 edges is in_graph"),
        (change("m1->logits", score=float("nan")), "edge 'm1->logits' has score nan"),
        (change("m1->logits", in_graph=1), "in_graph of edge 'm1->logits' is 1"),
        (change("m2->logits"), "edge 'm2->logits' is not in this graph of 2 layers"),
        (change("m1->m0"), "edge 'm1->m0' runs backwards"),
        (lambda data: data["cfg"].pop("n_heads"), "it lacks 'n_heads'"),
        (lambda data: data["cfg"].update(n_layers="2"), "cfg.n_layers is '2'"),
    ],
)
def test_what_is_no_graph_of_ours_is_refused_with_the_reason(tmp_path, apply, message):
    data = written(Graph(2, 2), KEPT)
    apply(data)
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path, data)


def test_the_reference_file(cases):
    circuit = Circuit.load(cases / "public" / "foreign_circuit_json" / "own_mib.json")
    assert dict(circuit.edges) == pytest.approx(
        {"input->a0.h0<v>": 0.5, "a0.h0->m0": 0.2, "m0->logits": 0.9}
    )
    assert circuit.graph == Graph(1, 2)


def test_it_can_be_drawn_but_not_scored_against(tmp_path, capsys):
    from mad.commands.main import main

    loaded(tmp_path, written(Graph(2, 2), KEPT))
    source = f"circuit={tmp_path / 'mib.json'}"
    assert main(["plot", source, f"out={tmp_path / 'pictures'}", "formats=[svg]"]) == 0
    assert "EAP-IG graph file" in (tmp_path / "pictures" / "circuit.svg").read_text()
    words = [source, "inputs=new.jsonl", f"out={tmp_path / 'scored.jsonl'}"]
    assert main(["score", *words]) == 1
    error = capsys.readouterr().err
    assert "is an EAP-IG graph file, which names no model" in error and error.count("\n") == 1
