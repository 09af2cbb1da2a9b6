"""The deviation of outputs against a slow version of its formula, on a tiny model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from circuits.batches import joined
from circuits.engine.memory import footprint
from circuits.prompts import InputError, Prompts, prompts_from_records
from circuits.selection import random_circuits
from mad.attribution import explanation_bytes
from mad.detector import Explained, ExplainingDetector
from mad.detectors.output_deviation import Deviation, fit_deviation
from mad.redrawn import stacked
from tests import tiny


def explain(detector: ExplainingDetector, prompts: Prompts, **named) -> Explained:
    """All explanations together."""
    return joined(list(detector.explain(prompts, **named)))


@pytest.mark.parametrize("deviation", ["kl", "logit_diff"])
@pytest.mark.parametrize("ablation", ["mean", "positional_mean", "zero"])
def test_the_score_is_the_deviation_of_model_and_circuit(context, draw, deviation, ablation):
    config = Deviation(deviation=deviation, ablation=ablation)
    detector, new = fit_deviation(config, context, draw(20, 0)), draw(6, 1)
    engine = context.engine
    for row, score in enumerate(detector.score(new).tolist()):
        one = new.select([row])
        ablated = detector.ablation.values(engine, one)
        model = engine.clean(tiny.from_tokens(one.clean)).logits[0]
        circuit = engine.masked(tiny.from_tokens(one.clean), context.circuit.mask, ablated)[0]
        parts = []
        for position in one.positions[0].tolist():
            p, q = model[position].log_softmax(-1), circuit[position].log_softmax(-1)
            first, second = model[position].topk(2).indices.tolist()
            gap = (model[position][first] - model[position][second]) - (
                circuit[position][first] - circuit[position][second]
            )
            parts.append((p.exp() * (p - q)).sum().item() if deviation == "kl" else abs(gap.item()))
        assert score == pytest.approx(sum(parts) / len(parts), rel=1e-5)


def test_a_complete_circuit_never_departs(context, draw):
    engine = context.engine
    detector, new = fit_deviation(Deviation(), context, draw(20, 0)), draw(6, 1)
    complete = replace(detector, masks=engine.graph.exists.to(detector.masks)[None])
    assert complete.score(new).abs().max() < 1e-6
    least = torch.finfo(engine.dtype).eps
    torch.testing.assert_close(
        detector.noise(new), complete.score(new).abs().clamp(min=least), atol=least, rtol=0
    )
    assert torch.equal(explain(detector, new).noise, detector.noise(new))


def test_means_are_by_position_where_edges_are(context, draw):
    detector, new = fit_deviation(Deviation(), context, draw(20, 0)), draw(6, 1)
    by_position = context.engine.graph.n_positions is not None
    expected = "positional_mean" if by_position else "mean"
    assert detector.scores_under == expected
    same = fit_deviation(Deviation(ablation=expected), context, draw(20, 0))
    assert torch.equal(detector.score(new), same.score(new))


@pytest.mark.parametrize("deviation", ["kl", "logit_diff"])
def test_shares_sum_to_the_score(context, draw, deviation):
    config = Deviation(deviation=deviation, explain_steps=150)
    explained = explain(fit_deviation(config, context, draw(20, 0)), draw(3, 1))
    on_circuit = explained.shares * context.circuit.mask
    assert (on_circuit == 0).all(), "edges of the circuit have no share"
    torch.testing.assert_close(explained.residual, 1 - explained.shares.flatten(1).sum(1))
    assert explained.residual.abs().max() < 0.05


def test_explaining_one_prompt_equals_explaining_it_among_others(context, draw):
    detector = fit_deviation(Deviation(explain_steps=3), context, draw(20, 0))
    several = draw(4, 1)
    together = explain(detector, several).shares
    alone = torch.cat([explain(detector, several.select([row])).shares for row in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("config", [Deviation(), Deviation(ablation="zero")])
def test_scores_and_explanations_do_not_depend_on_the_memory(context, draw, config):
    detector, new = fit_deviation(config, context, draw(30, 0)), draw(6, 1)
    size = footprint(context.engine, new)
    each = size.plain + max(size.masked(), explanation_bytes(size))
    few = str(size.shared(False) + size.mask + 2 * each)
    torch.testing.assert_close(
        detector.score(new, memory=few), detector.score(new), atol=1e-6, rtol=1e-6
    )
    parts = list(detector.explain(new, memory=few))
    assert [len(part.residual) for part in parts] == [2, 2, 2], "no more are held than fit"
    ours, expected = joined(parts), explain(detector, new)
    torch.testing.assert_close(ours.shares, expected.shares, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.residual, expected.residual, atol=1e-5, rtol=1e-4)


def test_scores_and_shares_are_means_over_circuits(context, draw):
    engine, new = context.engine, draw(3, 1)
    detector = fit_deviation(Deviation(explain_steps=2), context, draw(20, 0))
    further = random_circuits(engine.graph, len(context.circuit) + 5, 2, seed=2)
    several = replace(detector, masks=stacked(context.circuit, further))
    alone = [replace(detector, masks=mask[None]) for mask in several.masks]
    scores = torch.stack([one.score(new) for one in alone])
    torch.testing.assert_close(several.score(new), scores.mean(0))
    parts = [
        (explain(one, new).shares.flatten(1) * score[:, None]).view(3, *engine.graph.exists.shape)
        for one, score in zip(alone, scores, strict=True)
    ]
    expected = torch.stack(parts).mean(0).flatten(1) / scores.mean(0)[:, None]
    found = explain(several, new).shares.flatten(1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_prompt_without_ablated_values_is_at_fault(contexts):
    context = contexts["edges"]
    trusted = tiny.prompts(5, 0)
    positional = fit_deviation(Deviation(ablation="positional_mean"), context, trusted)
    with pytest.raises(InputError, match="position 15"):
        positional.score(prompts_from_records([{"clean": [1] * 16}]))
