"""Selections against their definitions, carried out one edge at a time over names."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.graph import Graph
from circuits.selection import HOW, random_circuits, ranking, select, sizes

GRAPHS = {
    "plain": Graph(2, 2),
    "grouped queries": Graph(2, 4, 2),
    "attention only": Graph(2, 2, attention_only=True),
    "parallel, split input": Graph(2, 2, parallel=True, split_input=True),
}
SCORES = st.integers(0, 2**31)


def random_scores(graph: Graph, seed: int, levels: int | None = None) -> torch.Tensor:
    """Normal scores; with `levels` only so many different values, so that there are ties."""
    scores = torch.randn(graph.exists.shape, generator=torch.Generator().manual_seed(seed))
    return scores if levels is None else (scores * levels).round() / levels


def rank_of(score: float, absolute: bool) -> float:
    if score == 0:
        return -math.inf
    return abs(score) if absolute else score


def as_mask(graph: Graph, edges) -> torch.Tensor:
    mask = torch.zeros_like(graph.exists)
    for edge in edges:
        mask[edge] = True
    return graph.without_dead_ends(mask)


def slow_top(graph: Graph, scores: torch.Tensor, count: int, absolute: bool) -> torch.Tensor:
    """Takes `count` times the best edge that is left, the first one of equals."""
    left, taken = list(graph.edges()), []
    for _ in range(count):
        best = max(rank_of(scores[edge].item(), absolute) for edge in left)
        first = min(
            e for e in left if rank_of(scores[e].item(), absolute) == best
        )  # (reader, writer): forward order
        left.remove(first)
        taken.append(first)
    return as_mask(graph, taken)


def depends(graph: Graph, edge: tuple[int, ...], node: str, position: int) -> bool:
    """Whether what a node does at a position depends on what an edge brings."""
    if node not in graph.reader_nodes(edge[0]):
        return False
    if graph.n_positions is None or edge[2] == position:
        return True
    moves = graph.readers[edge[0]].endswith(("<k>", "<v>"))
    return moves and (edge[2] < position or not graph.causal)


def slow_greedy(graph: Graph, scores: torch.Tensor, count: int, absolute: bool) -> torch.Tensor:
    """Takes `count` times the best edge into what is in the circuit; its writer's node joins."""
    included = {("logits", position) for position in range(graph.n_positions or 1)}
    taken: list[tuple[int, ...]] = []
    for _ in range(count):
        left = [edge for edge in graph.edges() if edge not in taken]
        open_ = [edge for edge in left if any(depends(graph, edge, *node) for node in included)]
        if not open_:
            break
        best = max(rank_of(scores[edge].item(), absolute) for edge in open_)
        first = min(e for e in open_ if rank_of(scores[e].item(), absolute) == best)
        taken.append(first)
        included.add((graph.writers[first[1]], first[2] if len(first) == 3 else 0))
    return as_mask(graph, taken)


def slow_threshold(
    graph: Graph, scores: torch.Tensor, threshold: float, absolute: bool
) -> torch.Tensor:
    return as_mask(
        graph, [e for e in graph.edges() if rank_of(scores[e].item(), absolute) >= threshold]
    )


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("how", ["top_n", "greedy"])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_number_of_edges_is_selected_by_definition(name, how, levels, absolute):
    graph = GRAPHS[name]
    slow = {"top_n": slow_top, "greedy": slow_greedy}[how]
    for seed, count in enumerate(
        (0, 1, 3, 8, graph.n_edges // 2, graph.n_edges - 1, graph.n_edges)
    ):
        scores = random_scores(graph, seed, levels)
        ours = select(graph, scores, how=how, edges=count, absolute=absolute)
        assert torch.equal(ours, slow(graph, scores, count, absolute)), (
            f"seed {seed}, {count} edges"
        )


SMALL = {
    "plain": Graph(1, 2),
    "by position": Graph(1, 1, n_positions=3),
    "by position, bidirectional, grouped queries": Graph(1, 2, 1, n_positions=2, causal=False),
    "by position, parallel, split input": Graph(
        1, 2, parallel=True, split_input=True, n_positions=2
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if "parallel" in n else ()) for n in SMALL],
)
@settings(max_examples=4)
@given(seed=SCORES, absolute=st.booleans(), levels=st.sampled_from([None, 2]))
def test_one_order_sliced_is_the_search_begun_anew_for_every_size(name, seed, absolute, levels):
    graph = SMALL[name]
    scores = random_scores(graph, seed, levels)
    ranked = ranking(graph, scores, absolute=absolute)
    for count in range(graph.n_edges + 1):
        slow = slow_greedy(graph, scores, count, absolute)
        assert torch.equal(ranked.circuit(count), slow), f"{count} edges"


@pytest.mark.parametrize("how", ["top_n", "greedy"])
def test_equal_scores_are_taken_in_edge_order(how):
    graph = Graph(1, 1, attention_only=True)
    names = [graph.edge_name(*e) for e in graph.edges()]
    assert names == [
        "input->a0.h0<q>",
        "input->a0.h0<k>",
        "input->a0.h0<v>",
        "input->logits",
        "a0.h0->logits",
    ]
    kept = select(graph, torch.ones(graph.exists.shape), how=how, edges=4)
    ours = [graph.edge_name(*e) for e in kept.nonzero().tolist()]
    # greedy: both edges into logits come first, then those into a0.h0; top_n: a0.h0 is a dead end
    # without its fifth
    assert ours == {"greedy": names[:2] + names[3:], "top_n": names[3:4]}[how]


@given(
    graph=st.sampled_from(list(GRAPHS.values())),
    seed=SCORES,
    absolute=st.booleans(),
    threshold=st.floats(-3, 3, allow_nan=False, width=32),
    levels=st.sampled_from([None, 2]),
)
def test_a_threshold_keeps_scores_from_there_on(graph, seed, absolute, threshold, levels):
    scores = random_scores(graph, seed, levels)
    threshold = (
        threshold if levels is None else round(threshold * levels) / levels
    )  # scores that equal it
    ours = select(graph, scores, how="threshold", threshold=threshold, absolute=absolute)
    assert torch.equal(ours, slow_threshold(graph, scores, threshold, absolute))


def test_infinite_thresholds_keep_nothing_or_everything():
    graph, scores = GRAPHS["plain"], random_scores(GRAPHS["plain"], 0)
    assert not select(graph, scores, how="threshold", threshold=math.inf).any()
    everything = select(graph, scores, how="threshold", threshold=-math.inf)
    assert torch.equal(everything, graph.exists)


@given(graph=st.sampled_from(list(GRAPHS.values())), seed=SCORES, share=st.floats(0, 1))
def test_greedy_keeps_a_smaller_circuit_when_fewer_edges_are_asked(graph, seed, share):
    """Greedy circuits are nested, before dead ends are dropped and after."""
    scores, count = random_scores(graph, seed), round(share * graph.n_edges)
    smaller, larger = (select(graph, scores, edges=n) for n in (max(0, count - 1), count))
    assert not (smaller & ~larger).any()


@pytest.mark.parametrize("how", HOW)
def test_scores_are_left_as_they_were(how):
    graph = GRAPHS["plain"]
    scores = random_scores(graph, 0)
    before = scores.clone()
    select(graph, scores, how=how, **({"threshold": 0.5} if how == "threshold" else {"edges": 9}))
    assert torch.equal(scores, before)


# ---- sizes and random circuits -------------------------------------------------------------------


@pytest.mark.parametrize(
    "graph", [*GRAPHS.values(), Graph(1, 1, attention_only=True), Graph(12, 12)]
)
def test_sizes_climb_from_two_to_all(graph):
    ladder = sizes(graph)
    assert ladder[0] == 2 and ladder[-1] == graph.n_edges and len(ladder) <= 25
    assert ladder == sorted(set(ladder))
    ratios = [b / a for a, b in zip(ladder, ladder[1:]) if a > 30]
    assert all(
        ratio == pytest.approx((graph.n_edges / 2) ** (1 / 24), rel=0.05) for ratio in ratios
    )


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 1.0])
def test_random_circuits_are_connected_and_as_large_as_asked(name, share):
    graph = GRAPHS[name]
    edges = max(1, round(share * graph.n_edges))
    drawn = random_circuits(graph, edges, 8, seed=3)
    assert len(drawn) == 8
    counts = [int(kept.sum()) for kept in drawn]
    assert min(counts) >= edges and sum(counts) / 8 <= 1.3 * edges + 3
    for kept in drawn:
        assert not (kept & ~graph.exists).any()
        assert torch.equal(graph.without_dead_ends(kept), kept)
    if share < 0.5:
        assert len({tuple(kept.flatten().tolist()) for kept in drawn}) > 1


def test_random_circuits_are_repeatable():
    graph = GRAPHS["plain"]
    one, same, other = (torch.stack(random_circuits(graph, 9, 5, seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.stack(random_circuits(graph, 9, 3, 1)), one[:3]), (
        "more draws do not change the first"
    )


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"how": "best", "edges": 3},
            "how='best', but the selections are greedy, top_n, threshold",
        ),
        ({"edges": 47}, "edges=47, but the graph has 46 edges; choose 0 to 46"),
        ({"how": "top_n", "edges": -1}, "edges=-1, but the graph has 46 edges"),
        ({"how": "top_n"}, "edges=None, but the graph has 46 edges"),
        ({"how": "threshold"}, "how=threshold needs threshold=VALUE"),
        ({"how": "threshold", "threshold": math.nan}, "how=threshold needs threshold=VALUE"),
    ],
)
def test_impossible_selections_are_refused(arguments, message):
    graph = GRAPHS["plain"]
    with pytest.raises(ValueError, match=message):
        select(graph, random_scores(graph, 0), **arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("how", HOW)
def test_scores_that_are_not_finite_are_refused(how, value):
    graph = GRAPHS["plain"]
    scores = random_scores(graph, 0)
    scores[graph.edge_index("input->m1")] = value
    with pytest.raises(ValueError, match="edge scores are not finite"):
        select(graph, scores, how=how, edges=3, threshold=0.1)


def test_more_random_edges_than_there_are_are_refused():
    with pytest.raises(ValueError, match="edges=47, but the graph has 46 edges"):
        random_circuits(GRAPHS["plain"], 47, 1, 0)


@pytest.mark.parametrize("how", ["greedy", "top_n"])
@pytest.mark.parametrize("absolute", [True, False])
def test_edges_that_score_0_come_last_whatever_the_sign_of_the_others(how, absolute):
    graph = GRAPHS["plain"]
    scores = random_scores(graph, 3)
    scores[:, graph.writer_index["a1.h0"]] = 0  # as of a head that writes nothing
    for row, reader in enumerate(graph.readers):
        if reader.startswith("a1.h0"):
            scores[row] = 0
    ranked = ranking(graph, scores, how=how, absolute=absolute)
    zero = [scores[tuple(edge)].item() == 0 for edge in ranked.edges]
    assert zero == sorted(zero) and any(zero)
    assert ranked.supported == zero.index(True)
    everything = ranking(graph, random_scores(graph, 3), how=how, absolute=absolute)
    assert everything.supported == graph.n_edges


def test_a_threshold_below_0_keeps_no_edge_that_scores_0():
    graph = GRAPHS["plain"]
    scores = torch.zeros(graph.exists.shape)
    scores[-1, 0] = -0.5
    assert select(graph, scores, how="threshold", threshold=-1.0).sum() == 1
