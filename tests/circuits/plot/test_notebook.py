"""A circuit in a notebook: its picture, or a table that says what to do."""

from __future__ import annotations

from xml.etree import ElementTree

import torch

from circuits.circuit import Circuit
from circuits.graph import Graph


def circuit(graph: Graph, names: list[str]) -> Circuit:
    kept = torch.zeros_like(graph.exists)
    for name in names:
        kept[graph.edge_index(name)] = True
    scores = torch.arange(kept.numel()).view(kept.shape) * graph.exists / 7
    return Circuit(graph, kept, scores, {"method": {"name": "acdc"}})


def drawn_ids(html: str) -> set[str]:
    return {element.get("id", "") for element in ElementTree.fromstring(html).iter()}


def test_the_picture_holds_every_edge_and_says_what_it_is():
    names = ["input->a0.h3<q>", "input->a0.kv1<k>", "a0.h3->logits"]
    html = circuit(Graph(1, 4, 2), names)._repr_html_()
    assert html.startswith("<svg")
    assert {f"edge:{name}" for name in names} <= drawn_ids(html)
    assert "Circuit(3 of 19 edges, method=acdc)" in html


def test_positions_are_drawn_as_one_edge():
    html = circuit(Graph(1, 2, n_positions=3), ["input->logits@0", "input->logits@2"])._repr_html_()
    assert "edge:input->logits" in drawn_ids(html)


def test_too_many_edges_are_a_table_of_the_strongest_with_the_remedy():
    graph = Graph(4, 8)
    full = circuit(graph, [graph.edge_name(*edge) for edge in graph.edges()])
    html = full._repr_html_()
    rows = ElementTree.fromstring(html).findall("tr")
    assert len(rows) == 1 + 20
    assert [cell.text for cell in rows[1]] == ["m3->logits", f"{full.scores.max().item():.3g}"]
    caption = ElementTree.fromstring(html).findtext("caption") or ""
    assert "Circuit(1519 of 1519 edges, method=acdc)" in caption
    assert "at most maximum_edges=800; draw its strongest" in caption


def test_scores_that_cannot_be_drawn_are_a_table_that_says_so():
    bare = circuit(Graph(1, 2), ["input->logits"])
    bare.scores[bare.kept] = float("nan")
    assert "has score nan" in bare._repr_html_()
