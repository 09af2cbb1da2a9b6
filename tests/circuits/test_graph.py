"""The graph: known sizes, names, what comes before what; dead ends against a search of paths."""

from __future__ import annotations

import json

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuits.graph import Graph

GRAPHS = {
    "plain": Graph(2, 2),
    "one layer": Graph(1, 3),
    "grouped queries": Graph(2, 4, 2),
    "one key-value head": Graph(2, 2, 1),
    "attention only": Graph(3, 2, attention_only=True),
    "parallel": Graph(2, 2, parallel=True),
    "split input": Graph(2, 2, split_input=True),
    "all at once": Graph(2, 4, 2, attention_only=False, parallel=True, split_input=True),
}


@st.composite
def graphs(draw, most_layers: int = 4) -> Graph:
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    flags = [draw(st.booleans()) for _ in range(3)]
    layers = draw(st.integers(1, most_layers))
    return Graph(
        layers,
        kv_heads * group,
        kv_heads,
        attention_only=flags[0],
        parallel=flags[1],
        split_input=flags[2],
    )


def when(name: str, parallel: bool) -> tuple[int, int]:
    """When a writer is written or a reader read, from its name alone; later is larger."""
    if name.startswith("input"):
        return -1, 0
    if name == "logits":
        return 10**6, 0
    layer = int(name[1:].split(".")[0])
    return layer, int(name[0] == "m" and not parallel)


def comes_before(writer: str, reader: str, parallel: bool) -> bool:
    """A writer can be read by what is read strictly later: an MLP sees its own block's heads unless
    in parallel.
    """
    return when(writer, parallel) < when(reader, parallel)


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("graph", "edges"),
    [
        (Graph(2, 4), 110),
        (Graph(4, 8), 1519),
        (Graph(6, 8), 3628),
        (Graph(12, 12), 32491),  # GPT-2 small; as many as in MIB's files
        (Graph(5, 8, 4), 1701),  # stories260K
        (Graph(2, 1, attention_only=True), 12),  # 3 + 6 + 3
        (Graph(1, 1, split_input=True), 13),  # 2 x 3, 2 + 1, 2 + 2
        (Graph(1, 2, parallel=True), 11),  # 6, 1, 4
    ],
)
def test_number_of_edges(graph, edges):
    assert graph.n_edges == edges == len(list(graph.edges())) == int(graph.exists.sum())


@given(st.integers(1, 6), st.integers(1, 6))
def test_number_of_edges_is_the_formula(layers, heads):
    before = [1 + layer * (heads + 1) for layer in range(layers + 1)]
    formula = sum(3 * heads * s + s + heads for s in before[:-1]) + before[-1]
    assert Graph(layers, heads).n_edges == formula


@given(graphs())
def test_an_edge_exists_where_the_writer_comes_before_the_reader(graph):
    for row, reader in enumerate(graph.readers):
        for column, writer in enumerate(graph.writers):
            assert bool(graph.exists[row, column]) == comes_before(
                writer, reader, graph.parallel
            ), (writer, reader)


# ---- names ---------------------------------------------------------------------------------------


def test_names_of_a_small_graph():
    graph = Graph(1, 2)
    assert graph.writers == ("input", "a0.h0", "a0.h1", "m0")
    assert graph.readers == (
        "a0.h0<q>",
        "a0.h1<q>",
        "a0.h0<k>",
        "a0.h1<k>",
        "a0.h0<v>",
        "a0.h1<v>",
        "m0",
        "logits",
    )


def test_names_with_grouped_queries_and_split_input():
    graph = Graph(1, 4, 2, attention_only=True, split_input=True)
    assert graph.writers == ("input.token", "input.position", "a0.h0", "a0.h1", "a0.h2", "a0.h3")
    assert graph.readers[4:] == ("a0.kv0<k>", "a0.kv1<k>", "a0.kv0<v>", "a0.kv1<v>", "logits")
    nodes = [
        graph.reader_nodes(graph.reader_index[name]) for name in ("a0.h2<q>", "a0.kv1<k>", "logits")
    ]
    assert nodes == [("a0.h2",), ("a0.h2", "a0.h3"), ("logits",)]


@given(graphs())
def test_names_and_indices_round_trip(graph):
    names = [graph.edge_name(*edge) for edge in graph.edges()]
    assert [graph.edge_index(name) for name in names] == list(graph.edges())
    assert len(set(names)) == graph.n_edges


@given(graphs())
def test_blocks_start_where_their_names_do(graph):
    for layer in range(graph.n_layers):
        assert graph.writers[graph.first_writer(layer)] == f"a{layer}.h0"
        assert graph.readers[graph.first_reader(layer)] == f"a{layer}.h0<q>"
    assert graph.first_writer(graph.n_layers) == len(graph.writers)
    assert graph.readers[graph.first_reader(graph.n_layers)] == "logits"


@given(graphs())
def test_the_graph_survives_json(graph):
    assert Graph.from_json(json.loads(json.dumps(graph.to_json()))) == graph


@given(graphs())
def test_the_sweep_goes_from_the_output_to_the_input(graph):
    """Layer descending; logits > mlp > v > k > q; head descending; writer descending: a key made
    from names.
    """

    def key(edge):
        reader, writer = graph.readers[edge[0]], graph.writers[edge[1]]
        if reader == "logits":
            place = (10**6, 0, 0)
        elif reader[0] == "m":
            place = (int(reader[1:]), 3, 0)
        else:
            layer, head = reader[1:-3].split(".")
            place = (int(layer), "qkv".index(reader[-2]), int(head.lstrip("hkv")))
        kind = {"i": 0, "a": 1, "m": 2}[writer[0]]
        layer = -1 if kind == 0 else int(writer[1:].split(".")[0])
        last = {"input": 0, "input.token": 0, "input.position": 1}.get(writer)
        last = last if last is not None else int(writer.split(".h")[1]) if kind == 1 else 0
        return (*place, layer, kind, last)

    assert graph.sweep_order() == sorted(graph.edges(), key=key, reverse=True)


# ---- dead ends -----------------------------------------------------------------------------------


def on_a_path(graph: Graph, kept: torch.Tensor) -> torch.Tensor:
    """The kept edges met by walking every path of kept edges from an input; those of paths that end
    at logits.
    """
    found = torch.zeros_like(kept)

    def walk(node: str, path: list[tuple[int, int]]) -> None:
        if node == "logits":
            for edge in path:
                found[edge] = True
            return
        column = graph.writer_index[node]
        for row in kept[:, column].nonzero()[:, 0].tolist():
            for following in graph.reader_nodes(row):
                walk(following, [*path, (row, column)])

    for node in graph.writers:
        if node.startswith("input"):
            walk(node, [])
    return found


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("share", [0.15, 0.4])
def test_dead_ends_are_what_no_path_uses(name, share):
    graph = GRAPHS[name]
    for seed in range(8):
        draw = torch.rand(graph.exists.shape, generator=torch.Generator().manual_seed(seed))
        kept = graph.exists & (draw < share)
        alive = graph.without_dead_ends(kept)
        assert torch.equal(alive, on_a_path(graph, kept))
        assert torch.equal(graph.without_dead_ends(alive), alive)


@given(graphs(2))
def test_the_full_graph_has_no_dead_ends_and_the_empty_one_stays_empty(graph):
    assert torch.equal(graph.without_dead_ends(graph.exists), graph.exists)
    assert not graph.without_dead_ends(torch.zeros_like(graph.exists)).any()


def test_a_dead_end_of_either_kind_is_dropped():
    graph = Graph(2, 1, attention_only=True)
    kept = torch.zeros_like(graph.exists)
    path = ["input->a0.h0<v>", "a0.h0->logits"]
    unread = ["input->a1.h0<v>", "a0.h0->a1.h0<q>"]  # nothing reads a1.h0
    for name in path + unread:
        kept[graph.edge_index(name)] = True
    assert [
        graph.edge_name(*edge) for edge in graph.without_dead_ends(kept).nonzero().tolist()
    ] == path
    kept[graph.edge_index("input->a0.h0<v>")] = False  # now nothing from the input arrives
    assert not graph.without_dead_ends(kept).any()


# ---- networkx ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
def test_networkx_has_an_edge_for_each_node_that_a_reader_feeds(name):
    graph = GRAPHS[name]
    view = graph.networkx()
    expected = {
        (graph.writers[writer], node, graph.readers[reader])
        for reader, writer in graph.edges()
        for node in graph.reader_nodes(reader)
    }
    assert set(view.edges(keys=True)) == expected
    assert set(view.nodes) == {*graph.writers, "logits"}
    assert view.number_of_edges() == len(expected)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "",
        "input",
        "input->",
        "->logits",
        "input-logits",
        "a0.h9->logits",
        "a2.h0->logits",
        "m0->m2",
        "input->a0.h0",
        "input->a0.h0<w>",
        "input->a0.kv0<k>",
        "logits->input",
        "a0.h0->a1.h0<q> ",
        "input.token->logits",
    ],
)
def test_names_of_no_edge_are_refused(name):
    with pytest.raises(
        ValueError, match="is not in this graph of 2 layers, 4 heads and 4 key-value heads"
    ):
        Graph(2, 4).edge_index(name)


@pytest.mark.parametrize(
    "name", ["m0->a0.h0<q>", "m0->m0", "a1.h0->a0.h1<v>", "a1.h0->a1.h1<k>", "a1.h0->m0"]
)
def test_backward_edges_are_refused(name):
    with pytest.raises(
        ValueError, match=f"{name!r} runs backwards: {name.split('-')[0]} is computed after"
    ):
        Graph(2, 4).edge_index(name)


def test_a_parallel_block_has_no_edge_from_its_heads_to_its_mlp():
    assert Graph(1, 2).edge_index("a0.h0->m0") == (6, 1)
    with pytest.raises(ValueError, match="runs backwards"):
        Graph(1, 2, parallel=True).edge_index("a0.h0->m0")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 4), "n_layers=0, but a graph needs at least 1"),
        ((2, 0), "n_heads=0, but"),
        ((2, 4, 0), "n_kv_heads=0, but"),
        ((2, 4, 3), "n_heads=4 is not a multiple of n_kv_heads=3"),
    ],
)
def test_impossible_shapes_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        Graph(*shape)


# ---- edges per position --------------------------------------------------------------------------


def per_position(**shape) -> Graph:
    return Graph(**{"n_layers": 2, "n_heads": 2, **shape}, n_positions=3)


@pytest.mark.parametrize(
    "shape",
    [{}, {"causal": False}, {"n_kv_heads": 1}, {"parallel": True}, {"attention_only": True}],
)
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_dead_ends_per_position_are_what_no_path_uses(shape, share):
    graph = per_position(**shape)
    for seed in range(8):
        draw = torch.rand(graph.exists.shape, generator=torch.Generator().manual_seed(seed))
        kept = graph.exists & (draw < share)
        paths = nx.DiGraph()
        paths.add_nodes_from(("start", "end"))
        for name in graph.writers[: graph.n_inputs]:
            paths.add_edges_from(("start", (name, position)) for position in range(3))
        for reader, writer, position in kept.nonzero().tolist():
            moves = graph.readers[reader].endswith(("<k>", "<v>"))
            paths.add_edge((graph.writers[writer], position), (reader, position))
            for there in range(position if graph.causal else 0, 3) if moves else [position]:
                for node in graph.reader_nodes(reader):
                    paths.add_edge((reader, position), "end" if node == "logits" else (node, there))
        alive = (nx.descendants(paths, "start") | {"start"}) & (
            nx.ancestors(paths, "end") | {"end"}
        )
        expected = torch.zeros_like(kept)
        for reader, writer, position in kept.nonzero().tolist():
            expected[reader, writer, position] = (graph.writers[writer], position) in alive and (
                reader,
                position,
            ) in nx.ancestors(paths, "end")
        assert torch.equal(graph.without_dead_ends(kept), expected)


def test_edges_per_position_have_names():
    graph = per_position()
    assert (
        graph.n_edges
        == 3 * Graph(2, 2).n_edges
        == int(graph.exists.sum())
        == len(list(graph.edges()))
    )
    for edge in graph.edges():
        assert graph.edge_index(graph.edge_name(*edge)) == edge
    assert graph.edge_name(0, 0, 2) == "input->a0.h0<q>@2"
    assert graph.sweep_order()[0] == (len(graph.readers) - 1, len(graph.writers) - 1, 2)
    assert Graph.from_json(graph.to_json()) == graph
    for name in (
        "input->a0.h0<q>",
        "input->a0.h0<q>@3",
        "input->a0.h0<q>@",
        "input->a0.h0<q>@-1",
        "input->a0.h0<q>@01",
    ):
        with pytest.raises(
            ValueError, match="per position of 3 tokens; edges look like 'input->logits@0'"
        ):
            graph.edge_index(name)
    with pytest.raises(ValueError, match="edges look like 'input->logits'"):
        Graph(2, 2).edge_index("input->logits@0")
    with pytest.raises(ValueError, match="n_positions=0"):
        Graph(2, 2, n_positions=0)
