"""What nodes, heads and edges off the circuit do, put together by the formulas, on a tiny model."""

from __future__ import annotations

import pytest
import torch

from circuits.ablation import AblationConfig, fit_ablation
from circuits.circuit import Circuit
from mad.departure import departure
from mad.detector import Context
from mad.detectors import DETECTORS, Deviation, Effects, Nodes, Routing
from mad.detectors.edge_effects import effects
from mad.statistics import gaussian, standard, tails
from tests.mad.detectors.conftest import prompts_of


def means_of(context, trusted):
    positional = context.engine.graph.n_positions is not None
    config = AblationConfig("positional_mean" if positional else "mean")
    return fit_ablation(config, context.engine, trusted)


def score(config, context, trusted, new):
    return DETECTORS[config.name].fit(config, context, trusted).score(new)


def test_nodes_and_routing_are_compared_with_trusted_ones(context, draw):
    trusted, new = draw(40, 0), draw(5, 1)
    means = means_of(context, trusted)
    of_trusted, of_new = (
        departure(context.engine, context.circuit.kept, means, some) for some in (trusted, new)
    )
    logs = [(one.nodes + 1e-8).log() for one in (of_trusted, of_new)]
    distance = gaussian(logs[0], 0.1, standardised=True).squared_distance(logs[1])
    torch.testing.assert_close(score(Nodes(), context, trusted, new), distance.float())
    largest = standard(logs[0]).unusual(logs[1])
    found = score(Nodes(summary="max"), context, trusted, new)
    torch.testing.assert_close(found, largest.float())
    routed = gaussian(of_trusted.routing, 0.1, standardised=True)
    expected = routed.squared_distance(of_new.routing).float()
    torch.testing.assert_close(score(Routing(), context, trusted, new), expected)


def effects_of(context, trusted, some, steps: int) -> torch.Tensor:
    config = Effects(steps=steps)
    instrument = DETECTORS["effects"].fit(config, context, trusted).instrument
    return effects(instrument, some, "2GB")


def test_effects_against_their_formulas(context, draw):
    trusted, new = draw(20, 0), draw(4, 1)
    of_trusted, of_new = (effects_of(context, trusted, some, 3) for some in (trusted, new))
    off = context.engine.graph.exists & ~context.circuit.kept
    assert of_new.shape == (4, int(off.sum())) and (of_new >= 0).all()
    for summary, expected in (
        ("mass", of_new.sum(1)),
        ("max", standard(of_trusted).unusual(of_new)),
        ("tails", tails(of_trusted).unusual(of_new)),
    ):
        found = score(Effects(summary=summary, steps=3), context, trusted, new)
        torch.testing.assert_close(found, expected.float())


def test_eight_points_are_enough_near_the_model(context, draw):
    """One edge is removed, so that its part is all of the divergence."""
    graph, trusted, new = context.engine.graph, draw(20, 0), draw(4, 1)
    kept = graph.exists.clone()
    kept[-1, 1] = False  # the output of one head, to the logits
    near = Context(context.engine, Circuit(graph, kept, kept.float()))
    ablation = means_of(context, trusted).name
    whole = score(Deviation(ablation=ablation), near, trusted, new)
    parts = effects_of(near, trusted, new, 8)
    if graph.n_positions is None:
        torch.testing.assert_close(parts[:, 0], whole, rtol=0.02, atol=0)
    torch.testing.assert_close(score(Effects(), near, trusted, new), parts.sum(1))


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_the_ablation_may_be_chosen(contexts, ablation):
    context = contexts["edges"]
    trusted, new = (prompts_of(context.engine, count, seed) for count, seed in ((20, 0), (4, 1)))
    detector = DETECTORS["nodes"].fit(Nodes(ablation=ablation), context, trusted)
    assert detector.scores_under == ablation and detector.score(new).std() > 0
