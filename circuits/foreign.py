"""Circuits in the files of other tools, where their graph is ours.

EAP-IG (Hanna et al. 2024, arXiv 2403.17806) and the MIB benchmark keep a graph as JSON:

    {"cfg": {"n_layers", "n_heads", "parallel_attn_mlp", "d_model"},
     "nodes": {NAME: {"in_graph"}}, "edges": {NAME: {"score", "in_graph"}}}

Their edges have the names of ours.  Which nodes are in the graph follows from the edges; a graph
that keeps single neurons of a node is none of ours.

Where heads share keys and values, their graph has keys and values of every head.  What we write
repeats a group's edge for each of its heads, and says in `cfg` how many groups there are
(`n_kv_heads`, which they do not read), so that it is read back as it was.  A file that does not say
has the graph of a model without groups; `circuits.regrouped` puts it on one with groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from circuits.files import restored
from circuits.graph import Graph
from circuits.names import LOGITS, edge_name, reader_name, split_reader

if TYPE_CHECKING:
    from circuits.circuit import Circuit

EAP_IG = "EAP-IG graph file"
_KEYS = {"cfg", "nodes", "edges"}
_OURS = ("n_kv_heads", "causal")  # of `cfg`, beside what they read


def is_eap_ig(data: Any) -> bool:
    """Whether what a JSON file holds is a graph of EAP-IG or MIB.

    >>> is_eap_ig({"cfg": {}, "nodes": {}, "edges": {}}), is_eap_ig({"format": 1})
    (True, False)
    """
    return isinstance(data, Mapping) and set(data) >= _KEYS and "format" not in data


def from_eap_ig(data: Mapping[str, Any]) -> tuple[Graph, list[tuple[str, float, bool]]]:
    """A graph of EAP-IG as ours, and the name and score of each edge, and whether it is kept.

    The graph has keys and values of each head, whatever `n_kv_heads` says; see `grouped`.

    >>> sizes = {"n_layers": 1, "n_heads": 1, "parallel_attn_mlp": False, "d_model": 4}
    >>> edges = {"input->m0": {"score": 0.5, "in_graph": True}}
    >>> from_eap_ig({"cfg": sizes, "nodes": {}, "edges": edges})[1]
    [('input->m0', 0.5, True)]

    Raises:
        ValueError: it keeps single neurons, has a node that is none of ours, or keeps no edge.
        KeyError, TypeError, AttributeError: a field is missing or of another kind.
    """
    graph = replace(grouped(data), n_kv_heads=None)
    for name, node in data["nodes"].items():
        _check_node(graph, name, node)
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
    return graph, entries


def grouped(data: Mapping[str, Any]) -> Graph:
    """The graph of the model that a file is of, with its groups of heads where it tells them."""
    sizes = data["cfg"]
    told = {name: sizes[name] for name in ("n_layers", "n_heads")}
    told |= {name: sizes[name] for name in _OURS if name in sizes}
    return restored(Graph, {**told, "parallel": sizes["parallel_attn_mlp"]}, "cfg")


def _check_node(graph: Graph, name: str, node: Any) -> None:
    if name != LOGITS and name not in graph.writer_index:
        raise ValueError(
            f"it is an {EAP_IG} with a node {name!r}, which is none of a model of "
            f"{graph.n_layers} layers and {graph.n_heads} heads; nodes look like input, a0.h0, m0 "
            "or logits"
        )
    if isinstance(node, Mapping) and "neurons" in node and not all(node["neurons"]):
        raise ValueError(
            f"it is an {EAP_IG} that keeps single neurons of node {name!r}, but circuits here keep "
            "whole nodes; write it at the level of edges"
        )


def to_eap_ig(circuit: Circuit) -> dict[str, Any]:
    """What EAP-IG and MIB read of a circuit: all edges, with scores and whether they are kept.

    >>> from circuits import Circuit
    >>> graph = Graph(n_layers=1, n_heads=1)
    >>> written = to_eap_ig(Circuit(graph, graph.exists, graph.exists.float()))
    >>> written["edges"]["input->a0.h0<q>"], written["nodes"]["m0"]
    ({'score': 1.0, 'in_graph': True}, {'in_graph': True})

    Raises:
        ValueError: their graphs cannot say what ours does: no MLPs, token and position as two
            inputs, or edges by position.
    """
    graph = circuit.graph
    beyond = {
        "has no MLPs": graph.attention_only,
        "has token and position as two inputs": graph.split_input,
        "tells edges apart by position": graph.n_positions is not None,
    }
    for what, there in beyond.items():
        if there:
            raise ValueError(
                f"the graph of this circuit {what}, which an {EAP_IG} cannot say; export it as "
                ".dot or .graphml"
            )
    edges = {
        name: {"score": circuit.scores[edge].item(), "in_graph": bool(circuit.kept[edge])}
        for edge in graph.edges()
        for name in _names_of_heads(graph, edge)
    }
    writes, reads = circuit.kept.any(0), circuit.kept.any(1)
    read = {
        node for reader in reads.nonzero()[:, 0].tolist() for node in graph.reader_nodes(reader)
    }
    in_graph = {name for name, there in zip(graph.writers, writes.tolist()) if there} | read
    return {
        "cfg": {
            "n_layers": graph.n_layers,
            "n_heads": graph.n_heads,
            "parallel_attn_mlp": graph.parallel,
            "d_model": width(circuit),
            **({} if graph.kv_group == 1 else {"n_kv_heads": graph.n_kv_heads}),
            **({} if graph.causal else {"causal": False}),
        },
        "nodes": {name: {"in_graph": name in in_graph} for name in (*graph.writers, LOGITS)},
        "edges": edges,
    }


def width(circuit: Circuit) -> int:
    """The model's d_model as a circuit tells it; 0 where it does not (it counts neurons only)."""
    told: Any = circuit.about
    for name in ("model", "architecture", "d_model"):
        told = told.get(name) if isinstance(told, Mapping) else None
    told = circuit.about.get("d_model") if told is None else told
    return told if isinstance(told, int) else 0


def _names_of_heads(graph: Graph, edge: tuple[int, ...]) -> Iterator[str]:
    """An edge's names, one for each head of the group that it feeds."""
    reader, writer = edge
    _, port = split_reader(graph.readers[reader])
    for node in graph.reader_nodes(reader):
        yield edge_name(graph.writers[writer], reader_name(node, port))
