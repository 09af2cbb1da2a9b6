"""Distributions of gates against formulas in numpy, and circuits that are drawn."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from circuits.gates import OVER, gate_shapes, part_shares
from circuits.graph import Graph
from circuits.mask_distribution import KINDS, MaskDistribution

GRAPH = Graph(2, 2, 1)
BY_POSITION = Graph(1, 2, n_positions=3)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def random_mask(graph: Graph, over: str, kind: str = "window", seed: int = 0) -> MaskDistribution:
    generator = torch.Generator().manual_seed(seed)
    shapes = gate_shapes(graph, over)
    gates = {name: 2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return MaskDistribution(graph, kind, over, gates)


# ---- gates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [-4.0, -0.7, 0.0, 1.3, 5.0])
def test_hard_concrete_gates_are_distributed_as_numpy_draws_them(theta):
    u = np.random.default_rng(0).uniform(1e-6, 1 - 1e-6, 40_000)
    soft = sigmoid((np.log(u) - np.log(1 - u) + theta) / (2 / 3))
    expected = np.clip(soft * 1.2 - 0.1, 0, 1)
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = KINDS["hard_concrete"](torch.tensor(theta), uniform).numpy()
    assert ks_2samp(drawn, expected).pvalue > 1e-3
    reach = 2 / 3 * math.log(11)  # T log(-a / b)
    assert (drawn > 0).mean() == pytest.approx(sigmoid(theta + reach), abs=0.01)
    assert (drawn == 1).mean() == pytest.approx(sigmoid(theta - reach), abs=0.01)
    assert (drawn > 0.5).mean() == pytest.approx(sigmoid(theta), abs=0.01)


@pytest.mark.parametrize("theta", [-4.0, -0.7, 0.0, 1.3, 5.0])
def test_window_gates_have_the_mean_p_and_its_gradient(theta):
    uniform = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    at = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    drawn = KINDS["window"](at, uniform)
    p = sigmoid(theta)
    expected = 1 - np.clip((uniform.numpy() - p) / (p * (1 - p)) + 0.5, 0, 1)
    np.testing.assert_allclose(drawn.detach().numpy(), expected, atol=1e-9)
    assert drawn.mean().item() == pytest.approx(p, abs=1e-4)
    assert (drawn > 0.5).double().mean().item() == pytest.approx(p, abs=1e-4)
    inside = (drawn > 0) & (drawn < 1)
    assert inside.double().mean().item() == pytest.approx(p * (1 - p), abs=1e-4)
    (slope,) = torch.autograd.grad(drawn.mean(), at)
    assert slope.item() == pytest.approx(p * (1 - p), abs=1e-4)  # dp/dtheta


# ---- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [GRAPH, BY_POSITION])
@pytest.mark.parametrize("over", OVER)
def test_an_edge_is_as_probable_as_all_of_its_gates(graph, over):
    mask = random_mask(graph, over)
    expected = torch.zeros(graph.exists.shape)
    for edge in graph.edges():
        expected[edge] = math.prod(
            sigmoid(theta[edge if kind == "edge" else (0, *edge[1:])].item())
            for kind, theta in mask.gates.items()
        )
    torch.testing.assert_close(mask.probabilities(), expected)
    assert mask.size() == pytest.approx(expected.sum().item(), rel=1e-5)


@pytest.mark.parametrize("over", OVER)
def test_circuits_are_drawn_with_those_probabilities_and_have_no_dead_ends(over):
    graph = Graph(1, 1, attention_only=True)
    gates = {
        name: torch.linspace(-1, 2, math.prod(shape)).view(shape)
        for name, shape in gate_shapes(graph, over).items()
    }
    mask = MaskDistribution(graph, "hard_concrete", over, gates)
    drawn = mask.sample(1500, seed=3)
    assert torch.equal(mask.sample(20, seed=3), mask.sample(20, seed=3))
    assert not torch.equal(mask.sample(20, seed=3), mask.sample(20, seed=4))
    for kept in drawn[:50]:
        assert torch.equal(kept, graph.without_dead_ends(kept))
    expected = torch.zeros(graph.exists.shape)
    own = {name: theta.sigmoid() for name, theta in gates.items()}
    real = {
        name: graph.exists if theta.shape == graph.exists.shape else torch.ones_like(theta).bool()
        for name, theta in own.items()
    }
    states = [itertools.product((0.0, 1.0), repeat=int(gate.sum())) for gate in real.values()]
    for values in itertools.product(*states):  # every state of all gates that are an edge's
        state, chance = {}, 1.0
        for name, drawn_state in zip(own, values, strict=True):
            state[name] = torch.zeros(own[name].shape)
            state[name][real[name]] = at = torch.tensor(drawn_state)
            open_ = own[name][real[name]]
            chance *= (at * open_ + (1 - at) * (1 - open_)).prod().item()
        kept = (part_shares(state, graph) > 0).bool()
        expected += chance * graph.without_dead_ends(kept)
    torch.testing.assert_close(drawn.float().mean(0), expected, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "gauss"}, "a distribution 'gauss', but there are hard_concrete, window"),
        ({"over": "layers"}, "over='layers', but a mask is over edges, nodes, edges_and_nodes"),
        (
            {"over": "nodes"},
            r"a mask over nodes has gates of \{'writer': \(1, 7\)\}, but these are",
        ),
        ({"gates": {"edge": torch.zeros(3, 4)}}, r"has gates of .*\(11, 7\).*\(3, 4\)"),
        ({"gates": {}}, "has gates of"),
        ({"gates": {"edge": torch.full((11, 7), math.nan)}}, "are not finite"),
        ({"gates": {"edge": torch.zeros(11, 7, dtype=torch.int64)}}, "must be float"),
    ],
)
def test_what_is_no_mask_of_the_graph_is_refused(change, message):
    mask = random_mask(GRAPH, "edges")
    fields = {"space": GRAPH, "kind": mask.kind, "over": mask.over, "gates": mask.gates}
    with pytest.raises(ValueError, match=message):
        MaskDistribution(**{**fields, **change})


def test_fewer_than_one_circuit_is_refused():
    with pytest.raises(ValueError, match="n=0, but at least 1 circuit can be drawn"):
        random_mask(GRAPH, "edges").sample(0, seed=0)
