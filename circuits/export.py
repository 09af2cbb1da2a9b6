"""A circuit as a file that other programs read; the format is the path's suffix.

    .json       EAP-IG and MIB: all edges with their scores (`circuits.foreign`); read back by
                `Circuit.load`
    .dot        Graphviz: the kept edges; blue ones support the behaviour, red ones work against it
    .graphml    Gephi, yEd, Cytoscape, networkx: the kept edges

In the latter two, an edge into keys or values that several heads share stands once for each head;
its `edge` is the name that it has here, `score` its score, `port` what it feeds (q, k, v), and
`position` the token where edges are told apart by position.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import networkx as nx

from circuits.files import write_text
from circuits.foreign import to_eap_ig
from circuits.names import edge_name, parse_edge, parse_node, reader_name
from circuits.plot.style import NEGATIVE, POSITIVE

if TYPE_CHECKING:
    from circuits.circuit import Circuit

WIDEST = 5.0  # of a line of Graphviz, in points


def export_circuit(circuit: Circuit, path: str | Path) -> Path:
    """Returns the file written, as a whole, in the format of its suffix.

    Raises:
        ValueError: another suffix, or a graph that the format cannot say.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(
            f"cannot export to {path.name}: the format {path.suffix!r} is none of "
            f"{', '.join(FORMATS)}"
        )
    text = FORMATS[path.suffix](circuit)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def exported_graph(circuit: Circuit) -> nx.MultiDiGraph:
    """Returns the kept edges between nodes, with plain attributes that every format can hold."""
    view, graph = nx.MultiDiGraph(), circuit.graph
    view.graph.update(_about(circuit))
    for edge in circuit.kept.nonzero().tolist():
        name = graph.edge_name(*edge)
        parsed = parse_edge(name)
        said = {"edge": name, "score": circuit.scores[tuple(edge)].item(), "port": parsed.port}
        said |= {} if parsed.position is None else {"position": parsed.position}
        for node in graph.reader_nodes(edge[0]):
            reader = reader_name(node, parsed.port)
            key = edge_name(parsed.writer, reader, parsed.position)
            view.add_edge(parsed.writer, node, key=key, **said)
    for node, data in view.nodes(data=True):
        parsed = parse_node(node)
        data["kind"] = parsed.kind
        data |= {"layer": parsed.layer} if parsed.kind in ("head", "mlp") else {}
        data |= {"head": parsed.head} if parsed.kind == "head" else {}
    return view


def _about(circuit: Circuit) -> dict[str, str | int]:
    """What the graph as a whole says: its sizes, and how the circuit was found."""
    names = ("task", "method", "metric", "ablation")
    sizes = {name: int(size) for name, size in asdict(circuit.graph).items() if size is not None}
    return {**sizes, **{name: said for name in names if (said := circuit.says(name))}}


def _json(circuit: Circuit) -> str:
    return json.dumps(to_eap_ig(circuit), allow_nan=False) + "\n"


def _graphml(circuit: Circuit) -> str:
    return "\n".join(nx.generate_graphml(exported_graph(circuit), named_key_ids=True)) + "\n"


def _dot(circuit: Circuit) -> str:
    view = exported_graph(circuit)
    largest = max((abs(score) for *_, score in view.edges(data="score")), default=0.0) or 1.0
    for *_, data in view.edges(data=True):
        data["color"] = POSITIVE if data["score"] >= 0 else NEGATIVE
        data["penwidth"] = round(max(0.5, WIDEST * abs(data["score"]) / largest), 3)
        data["label"] = data["port"]
    view.graph["graph"] = {"rankdir": "BT"}  # inputs at the bottom
    return nx.nx_agraph.to_agraph(view).to_string()


FORMATS: dict[str, Callable[[Circuit], str]] = {".json": _json, ".dot": _dot, ".graphml": _graphml}
