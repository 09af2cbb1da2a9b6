"""Attributions of all edges against gradients of the edge mask, on tiny models."""

from __future__ import annotations

import pytest
import torch

from circuits.ablation import AblationConfig, fit_ablation
from circuits.engine import Engine
from circuits.prompts import Prompts
from mad.detectors import DETECTORS, AttributionMahalanobis
from mad.detectors.attribution import attributions
from mad.detectors.measured import Instrument
from mad.statistics import gaussian
from tests import tiny

NEW = tiny.prompts(4, seed=1)  # of different lengths, 1 to 3 scored positions


def lead(engine: Engine, means, prompts: Prompts, mask: torch.Tensor) -> torch.Tensor:
    """The lead of the model's first choice over its second, under a mask, for one prompt."""
    logits = engine.masked(tiny.from_tokens(prompts.clean), mask, means.values(engine, prompts))[0]
    clean = engine.logits(tiny.from_tokens(prompts.clean))[0]
    leads = []
    for position in prompts.positions[0].tolist():
        first, second = clean[position].topk(2).indices.tolist()
        leads.append(logits[position, first] - logits[position, second])
    return torch.stack(leads).mean()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_attributions_are_gradients_of_the_edge_mask(name):
    engine = Engine(tiny.huggingface(name))
    means = fit_ablation(AblationConfig("mean"), engine, tiny.prompts(40))
    instrument = Instrument(AttributionMahalanobis(), engine, None, means)
    found = attributions(instrument, NEW, "2GB")
    assert found.shape == (4, engine.graph.n_edges)
    rows = list(engine.graph.edges())
    for row in range(4):
        one, mask = NEW.select([row]), engine.graph.exists.double().requires_grad_()
        (gradient,) = torch.autograd.grad(lead(engine, means, one, mask), mask)
        torch.testing.assert_close(
            found[row].double(), gradient[engine.graph.exists], rtol=1e-5, atol=1e-6
        )
        for edge in rows[5 :: len(rows) // 4]:
            step = torch.zeros_like(mask)
            step[edge] = 1e-5
            with torch.no_grad():
                up, down = (lead(engine, means, one, mask + sign * step) for sign in (1, -1))
            slope = float((up - down) / 2e-5)
            assert float(found[row, rows.index(edge)]) == pytest.approx(slope, rel=1e-4, abs=1e-5)


def test_the_score_is_the_distance_of_attributions_and_edges_have_no_positions(contexts):
    trusted = tiny.prompts(20, 0, shortest=7, longest=7)
    new = tiny.prompts(5, 1, shortest=7, longest=7)
    scores = []
    for context in contexts.values():
        config = AttributionMahalanobis()
        detector = DETECTORS[config.name].fit(config, context, trusted)
        scores.append(detector.score(new))
    torch.testing.assert_close(scores[0], scores[1])
    engine = contexts["edges"].engine
    means = fit_ablation(AblationConfig("mean"), engine, trusted)
    instrument = Instrument(config, engine, None, means)
    rows, own = (attributions(instrument, some, "2GB") for some in (trusted, new))
    expected = gaussian(rows, 0.1, standardised=True).squared_distance(own)
    torch.testing.assert_close(scores[0], expected.float())
