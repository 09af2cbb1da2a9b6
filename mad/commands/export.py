"""Write a circuit for other programs: EAP-IG and MIB, Graphviz, Gephi and networkx.

    madcap export circuit=runs/ioi to=ioi.json
    madcap export circuit=runs/ioi to=ioi.graphml
    madcap export circuit=mib.json to=mib.dot

The format is the suffix of `to`: .json is the graph of EAP-IG and MIB, with the scores of all edges
and which are kept; .dot (Graphviz) and .graphml hold the kept edges. Where heads share keys and
values, an edge into them is repeated for each head. What EAP-IG or MIB wrote is read wherever
`circuit=` or `against=` is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from circuits.circuit import Circuit


@dataclass
class Export:
    """Which circuit is written, and where to."""

    circuit: str = "???"  # a run folder, a circuit.json, or a graph file of EAP-IG or MIB
    to: str = "???"  # the file: .json, .dot or .graphml
    overwrite: bool = False  # replace `to`


def run(config: Export) -> None:
    """Writes the file and names it."""
    target = Path(config.to)
    if target.exists() and not config.overwrite:
        raise FileExistsError(f"{target} exists; overwrite=true replaces it")
    circuit = Circuit.load(config.circuit)
    print(f"{len(circuit)} of {circuit.graph.n_edges} edges -> {circuit.export(target)}")
