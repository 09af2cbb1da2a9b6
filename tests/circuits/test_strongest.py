"""The strongest part of a circuit: by a slow search, connected, and drawn by `madcap plot`."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.circuit import Circuit
from circuits.graph import Graph
from circuits.selection import select
from mad.commands.main import main

GRAPHS = [Graph(2, 2), Graph(2, 4, 2), Graph(1, 2, n_positions=3), Graph(2, 2, split_input=True)]


def drawn_circuit(
    graph: Graph, seed: int, share: float = 0.7, levels: int | None = None
) -> Circuit:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(graph.exists.shape, generator=generator) * graph.exists
    scores = scores if levels is None else (scores * levels).round() / levels
    kept = graph.exists & (torch.rand(graph.exists.shape, generator=generator) < share)
    return Circuit(graph, graph.without_dead_ends(kept), scores)


@given(
    graph=st.sampled_from(GRAPHS),
    seed=st.integers(0, 2**31),
    edges=st.integers(1, 30),
    levels=st.sampled_from([None, 2]),
)
@settings(max_examples=8, deadline=None)
def test_it_is_the_largest_greedy_circuit_of_kept_edges_that_fits(graph, seed, edges, levels):
    circuit = drawn_circuit(graph, seed, levels=levels)
    scores = torch.where(circuit.kept, circuit.scores.abs() + 1e-30, 0.0)
    sizes = range(graph.n_edges + 1)
    largest = max(
        (int(kept.sum()), n)
        for n in sizes
        if int((kept := select(graph, scores, edges=n) & circuit.kept).sum()) <= edges
    )[1]
    expected = graph.without_dead_ends(select(graph, scores, edges=largest) & circuit.kept)
    if not expected.any() and len(circuit) > edges:
        with pytest.raises(ValueError, match=f"edges={edges}, but no part .*; raise edges"):
            circuit.strongest(edges)
        return
    part = circuit.strongest(edges)
    assert len(part) <= edges and torch.equal(part.kept, expected)
    assert torch.equal(part.scores, circuit.scores)


def test_a_circuit_without_scores_has_a_strongest_part():
    bare = replace(drawn_circuit(GRAPHS[0], 1), scores=torch.zeros(GRAPHS[0].exists.shape))
    part = bare.strongest(10)
    assert 0 < len(part) <= 10 and not (part.kept & ~bare.kept).any()


def test_a_small_circuit_stays_as_it_is():
    circuit = drawn_circuit(GRAPHS[0], 2)
    assert circuit.strongest(len(circuit)) is circuit


def test_draw_says_what_part_it_draws(tmp_path):
    circuit = drawn_circuit(Graph(2, 4), 3)
    part = circuit.strongest(12)
    text = circuit.draw(tmp_path / "a.svg", edges=12).read_text()
    assert set(re.findall(r'id="edge:([^"]*)"', text)) == {
        name.replace(">", "&gt;").replace("<", "&lt;") for name, _ in part.edges
    }
    assert f"{len(part)} of {len(circuit)} edges drawn, of Circuit({len(circuit)}" in text
    assert "drawn" not in circuit.draw(tmp_path / "b.svg", edges=len(circuit)).read_text()


def test_plot_refuses_what_cannot_be_read_with_the_command_that_draws_its_strongest_part(
    tmp_path, capsys
):
    circuit = drawn_circuit(Graph(4, 8), 4, share=1.0)
    circuit.save(tmp_path / "run")
    assert main(["plot", f"circuit={tmp_path / 'run'}"]) == 1
    message = capsys.readouterr().err
    assert f"{tmp_path / 'run'} has 1519 edges" in message and "maximum_edges=800" in message
    command = re.search(r"madcap (plot circuit=\S+ edges=300)", message)
    assert command
    assert main([*command[1].split(), "formats=[svg]"]) == 0
    part = circuit.strongest(300)
    text = (tmp_path / "run" / "circuit.svg").read_text()
    assert f"the strongest {len(part)} of 1519 edges drawn; circuit: 1519 of 1519 edges" in text
    assert text.count('id="edge:') == len(part)
    assert main(["plot", f"circuit={tmp_path / 'run'}", "edges=0"]) == 1
    assert "edges=0, but no part of the circuit" in capsys.readouterr().err


def test_edges_of_positions_are_summed_before_the_strongest_are_taken(tmp_path):
    circuit = drawn_circuit(GRAPHS[2], 5)
    whole = circuit.over_positions
    assert whole.graph.n_positions is None and whole.edges == circuit.edges_over_positions
    part = whole.strongest(4)
    text = circuit.draw(tmp_path / "a.svg", edges=4).read_text()
    assert text.count('id="edge:') == len(part) <= 4
