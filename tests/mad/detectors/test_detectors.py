"""Detectors against slow versions of their formulas, on a tiny model."""

from __future__ import annotations

import pytest
import torch

from circuits.circuit import Circuit
from circuits.engine import Engine
from circuits.engine.memory import TooLittleMemory, footprint
from circuits.prompts import Prompts, prompts_from_records
from circuits.selection import random_circuits
from mad.detector import Context, ExplainingDetector
from mad.detectors import DETECTORS
from mad.detectors.baselines import Mahalanobis, MaxProbability
from mad.detectors.circuit import CircuitDetector, Deviation, fit_deviation
from tests import tiny


def prompts(count: int, seed: int, shortest: int = 4) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    records = []
    for _ in range(count):
        length = int(torch.randint(shortest, 10, (1,), generator=generator))
        records.append(
            {
                "clean": torch.randint(29, (length,), generator=generator).tolist(),
                "positions": [-1, 1],
            }
        )
    return prompts_from_records(records, vocabulary=29)


@pytest.fixture(scope="module")
def context() -> Context:
    engine = Engine(tiny.gpt2())
    (kept,) = random_circuits(engine.graph, 12, 1, seed=1)
    return Context(engine, Circuit(engine.graph, kept, kept.float()))


@pytest.mark.parametrize("deviation", ["kl", "logit_diff"])
@pytest.mark.parametrize("ablation", ["mean", "positional_mean", "zero"])
def test_fast_is_the_deviation_of_model_and_circuit(context, deviation, ablation):
    detector = fit_deviation(
        Deviation(deviation=deviation, ablation=ablation), context, prompts(20, 0)
    )
    new = prompts(6, 1)
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


def test_a_complete_circuit_never_departs(context):
    engine = context.engine
    complete = Circuit(engine.graph, engine.graph.exists, engine.graph.exists.float())
    detector = fit_deviation(Deviation(), Context(engine, complete), prompts(20, 0))
    assert detector.score(prompts(6, 1)).abs().max() < 1e-6


@pytest.mark.parametrize("deviation", ["kl", "logit_diff"])
def test_shares_sum_to_the_score(context, deviation):
    detector = fit_deviation(
        Deviation(deviation=deviation, explain_steps=400), context, prompts(20, 0)
    )
    explained = detector.explain(prompts(4, 1))
    assert (explained.shares * context.circuit.mask == 0).all(), (
        "edges of the circuit have no share"
    )
    torch.testing.assert_close(explained.residual, 1 - explained.shares.sum((1, 2)))
    assert explained.residual.abs().max() < 0.05


def test_explaining_one_prompt_equals_explaining_it_among_others(context):
    detector = fit_deviation(Deviation(explain_steps=3), context, prompts(20, 0))
    several = prompts(4, 1)
    together = detector.explain(several).shares
    alone = torch.cat([detector.explain(several.select([row])).shares for row in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-4)


def test_max_probability(context):
    config, fit, _ = DETECTORS["max_probability"]
    detector = fit(config(), context, prompts(5, 0))
    new = prompts(5, 1)
    logits = context.engine.logits(tiny.from_tokens(new.clean, new.key_mask))
    for row, score in enumerate(detector.score(new).tolist()):
        chosen = [logits[row, p].log_softmax(-1).max().item() for p in new.positions[row].tolist()]
        assert score == pytest.approx(-sum(chosen) / len(chosen), rel=1e-5)


def test_mahalanobis_is_the_largest_distance_over_positions(context):
    from sklearn.covariance import ShrunkCovariance

    config, fit, _ = DETECTORS["mahalanobis"]
    trusted, new = prompts(40, 0), prompts(5, 1)
    detector = fit(config(), context, trusted)

    def residuals(some: Prompts) -> list[list[torch.Tensor]]:
        out = []
        for row in range(len(some)):
            one = some.select([row])
            _, cache = context.engine.model.bridge.run_with_cache(one.clean)
            out.append([cache["blocks.1.hook_out"][0, p] for p in one.positions[0].tolist()])
        return out

    reference = ShrunkCovariance(shrinkage=1e-3).fit(
        torch.stack([r for row in residuals(trusted) for r in row]).numpy()
    )
    for row, score in zip(residuals(new), detector.score(new).tolist(), strict=True):
        assert score == pytest.approx(
            max(reference.mahalanobis(torch.stack(row).numpy())), rel=1e-5
        )


@pytest.mark.parametrize(
    "config", [Deviation(), Deviation(ablation="zero"), MaxProbability(), Mahalanobis()]
)
def test_a_restored_detector_scores_the_same(context, config):
    _, fit, restore = DETECTORS[config.name]
    detector = fit(config, context, prompts(30, 0))
    again = restore(config, context, detector.state())
    assert torch.equal(detector.score(prompts(6, 1)), again.score(prompts(6, 1)))
    assert isinstance(again, ExplainingDetector) == isinstance(again, CircuitDetector)


@pytest.mark.parametrize(
    "config", [Deviation(), Deviation(ablation="zero"), MaxProbability(), Mahalanobis()]
)
def test_scores_and_explanations_do_not_depend_on_the_memory(context, config):
    detector, new = DETECTORS[config.name][1](config, context, prompts(30, 0)), prompts(6, 1)
    size = footprint(context.engine, new)
    few = str(
        size.shared(False)
        + size.mask
        + 2 * max(size.plain + size.masked(), size.plain + size.explanation)
    )
    torch.testing.assert_close(
        detector.score(new, memory=few), detector.score(new), atol=1e-6, rtol=1e-6
    )
    with pytest.raises(TooLittleMemory, match="one prompt of 9 tokens"):
        detector.score(new, memory="1kB")
    if isinstance(detector, CircuitDetector):
        ours, expected = detector.explain(new, memory=few), detector.explain(new)
        torch.testing.assert_close(ours.shares, expected.shares, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.residual, expected.residual, atol=1e-5, rtol=1e-4)


def test_settings_that_cannot_score_are_refused(context):
    trusted = prompts(5, 0)
    for config, message in (
        (Deviation(deviation="l2"), "deviation='l2'"),
        (Deviation(ablation="counterfactual"), "no corrupt twin"),
        (Deviation(explain_steps=0), "explain_steps=0"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_deviation(config, context, trusted)
    with pytest.raises(ValueError, match="run `madcap extract` first"):
        fit_deviation(Deviation(), Context(context.engine), trusted)
    positional = fit_deviation(Deviation(ablation="positional_mean"), context, trusted)
    long = prompts_from_records([{"clean": [1] * 16}])
    with pytest.raises(ValueError, match="position 15"):
        positional.score(long)
