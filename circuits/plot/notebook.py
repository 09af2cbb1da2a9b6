"""What a circuit shows in a notebook: its picture, or a table where there can be none."""

from __future__ import annotations

from html import escape

from circuits.circuit import Circuit
from circuits.plot.circuit import circuit_svg

ROWS = 20  # of the table, the strongest edges


def circuit_html(circuit: Circuit) -> str:
    """Return the circuit's picture as an `<svg>` element, or a table and why there is none."""
    edges = circuit.edges_over_positions
    try:
        return circuit_svg(edges, caption=repr(circuit), kv_group=circuit.graph.kv_group)
    except ValueError as refusal:
        return _table(edges, f"{circuit!r}; no picture from draw_circuit: {refusal}")


def _table(edges: list[tuple[str, float]], caption: str) -> str:
    strongest = sorted(edges, key=lambda edge: -abs(edge[1]))[:ROWS]
    cells = [f"<td>{escape(name)}</td><td>{score:.3g}</td>" for name, score in strongest]
    rows = "".join(f"<tr>{cell}</tr>" for cell in cells)
    heading = f"<tr><th>strongest {len(strongest)} of {len(edges)} edges</th><th>score</th></tr>"
    return f"<table><caption>{escape(caption)}</caption>{heading}{rows}</table>"
