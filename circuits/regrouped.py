"""A circuit on the graph of a model whose query heads share keys and values.

Tools that do not know of groups tell edges into the keys and values of each query head apart,
although the model reads them once per group.  Of such edges the one with the largest |score| stands
for the group, which is kept if any of them is.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from circuits.circuit import Circuit
from circuits.graph import Graph
from circuits.names import reader_name, split_reader


def regrouped(circuit: Circuit, graph: Graph) -> Circuit:
    """Returns a circuit as one of another graph, which may differ in how heads share keys.

    >>> theirs, ours = Graph(n_layers=1, n_heads=2), Graph(n_layers=1, n_heads=2, n_kv_heads=1)
    >>> scores = theirs.exists.float()
    >>> scores[theirs.edge_index("input->a0.h1<k>")] = -3
    >>> again = regrouped(Circuit(theirs, theirs.exists, scores), ours)
    >>> again.scores[ours.edge_index("input->a0.kv0<k>")].item()
    -3.0

    Raises:
        ValueError: they differ in anything else.
    """
    theirs = circuit.graph
    if _plain(theirs) == _plain(graph):
        return replace(circuit, graph=graph)
    if _plain(theirs) != replace(_plain(graph), n_kv_heads=graph.n_heads):
        raise ValueError(
            f"the circuit is of another graph: {_shape(theirs)}, but here it must be "
            f"{_shape(graph)}"
        )
    rows, kept = [], []
    for reader, name in enumerate(graph.readers):
        port = split_reader(name)[1]
        nodes = graph.reader_nodes(reader)
        members = [theirs.reader_index[reader_name(node, port)] for node in nodes]
        scores = circuit.scores[members]  # [members, W, *S]
        rows.append(scores.gather(0, scores.abs().argmax(0, keepdim=True))[0])
        kept.append(circuit.kept[members].any(0))
    return replace(circuit, graph=graph, kept=torch.stack(kept), scores=torch.stack(rows))


def _plain(graph: Graph) -> Graph:
    """The graph with the number of key-value heads told."""
    return replace(graph, n_kv_heads=graph.kv_heads)


def _shape(graph: Graph) -> str:
    """What tells graphs apart, in words."""
    parts = [f"{graph.n_layers} layers of {graph.n_heads} heads"]
    parts.append(f"{graph.kv_heads} key-value heads")
    words = {
        "no MLPs": graph.attention_only,
        "attention and MLP in parallel": graph.parallel,
        "token and position apart": graph.split_input,
        "bidirectional": not graph.causal,
        f"{graph.n_positions} positions": graph.n_positions is not None,
    }
    return ", ".join([*parts, *(word for word, told in words.items() if told)])
