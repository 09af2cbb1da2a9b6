"""The picture of positions: sums by node and position, and what is refused."""

from __future__ import annotations

import pytest
import torch

from circuits.circuit import Circuit
from circuits.graph import Graph
from circuits.plot.positions import _into_nodes, draw_positions


def circuit(edges: dict[str, float], n_positions: int | None = 3) -> Circuit:
    graph = Graph(1, 2, n_positions=n_positions)
    kept, scores = torch.zeros_like(graph.exists), torch.full(graph.exists.shape, 9.0)
    for name, score in edges.items():
        kept[graph.edge_index(name)], scores[graph.edge_index(name)] = True, score
    return Circuit(graph, kept, scores)


def test_queries_keys_and_values_of_a_node_are_summed_at_each_position():
    nodes, values = _into_nodes(
        circuit(
            {
                "input->a0.h1<q>@2": 0.5,
                "input->a0.h1<v>@2": 0.25,
                "input->a0.h1<k>@0": -1.0,
                "a0.h1->logits@2": 2.0,
            }
        )
    )
    assert nodes == ["a0.h1", "logits"]
    nothing = float("nan")
    expected = torch.tensor([[-1.0, nothing, 0.75], [nothing, nothing, 2.0]])
    torch.testing.assert_close(values, expected, equal_nan=True)


@pytest.mark.parametrize(
    "edges", [{}, {"input->logits@1": -0.1}, {"input->m0@0": 1.0, "m0->logits@0": 1.0}]
)
@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_pictures_are_drawn_and_the_same_each_time(edges, suffix, tmp_path):
    paths = [
        draw_positions(circuit(edges), tmp_path / f"{n}.{suffix}", title="t", caption="c")
        for n in (1, 2)
    ]
    assert paths[0].stat().st_size > 1000 and paths[0].read_bytes() == paths[1].read_bytes()


def test_a_circuit_without_positions_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="does not tell edges apart by position; extract it with positions=true"
    ):
        draw_positions(circuit({}, None), tmp_path / "p.png")
