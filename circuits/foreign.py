"""Circuits that other tools wrote, where their graph is ours.

EAP-IG (Hanna et al. 2024, arXiv 2403.17806) and the MIB benchmark write a graph as JSON:

    {"cfg": {"n_layers", "n_heads", "parallel_attn_mlp", "d_model"},
     "nodes": {NAME: {"in_graph"}}, "edges": {NAME: {"score", "in_graph"}}}

Their edges have the names of ours.  Which nodes are in the graph follows from the edges; a graph
that keeps single neurons of a node is none of ours.  Where heads share keys and values, their graph
has keys and values of every head, and fits no model of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from circuits.files import restored
from circuits.graph import Graph

EAP_IG = "EAP-IG graph file"
_KEYS = {"cfg", "nodes", "edges"}


def is_eap_ig(data: Any) -> bool:
    """Whether what a JSON file holds is a graph of EAP-IG or MIB.

    >>> is_eap_ig({"cfg": {}, "nodes": {}, "edges": {}}), is_eap_ig({"format": 1})
    (True, False)
    """
    return isinstance(data, Mapping) and set(data) >= _KEYS and "format" not in data


def from_eap_ig(data: Mapping[str, Any]) -> tuple[Graph, list[tuple[str, float, bool]]]:
    """A graph of EAP-IG as ours, and the name and score of each edge, and whether it is kept.

    >>> sizes = {"n_layers": 1, "n_heads": 1, "parallel_attn_mlp": False, "d_model": 4}
    >>> edges = {"input->m0": {"score": 0.5, "in_graph": True}}
    >>> from_eap_ig({"cfg": sizes, "nodes": {}, "edges": edges})[1]
    [('input->m0', 0.5, True)]

    Raises:
        ValueError: it keeps single neurons, or no edge.
        KeyError, TypeError, AttributeError: a field is missing or of another kind.
    """
    sizes = data["cfg"]
    if neurons := [name for name, node in data["nodes"].items() if _keeps_neurons(node)]:
        raise ValueError(
            f"it is an {EAP_IG} that keeps single neurons of node {neurons[0]!r}, but circuits "
            "here keep whole nodes; write it at the level of edges"
        )
    entries = []
    for name, edge in data["edges"].items():
        kept = edge["in_graph"]
        if not isinstance(kept, bool):
            raise TypeError(f"in_graph of edge {name!r} is {kept!r}, but it must be true or false")
        entries.append((name, edge["score"], kept))
    if not any(kept for *_, kept in entries):
        raise ValueError(
            f"it is an {EAP_IG} with scores alone: none of its {len(entries)} edges is in_graph; "
            "select edges (Graph.apply_topn, apply_greedy) before it is written"
        )
    ours = {"n_layers": sizes["n_layers"], "n_heads": sizes["n_heads"]}
    graph = restored(Graph, {**ours, "parallel": sizes["parallel_attn_mlp"]}, "cfg")
    return graph, entries


def _keeps_neurons(node: Any) -> bool:
    return isinstance(node, Mapping) and "neurons" in node and not all(node["neurons"])
