"""Discovery over units against gradients of the mask, small steps, and runs one at a time."""

from __future__ import annotations

import sys

import pytest
import torch

from circuits.ablation import AblationConfig, fit_ablation
from circuits.discovery import (
    ACDC,
    EAP,
    EAPIG,
    Exact,
    acdc_units,
    attribution_units,
    exact,
)
from circuits.engine import Engine
from circuits.metrics import METRICS
from circuits.objective import Objective
from circuits.parts import UnitsConfig, divide
from circuits.parts.objective import prepare_units
from circuits.prompts import Prompts, prompts_from_records
from circuits.selection import ranking
from tests import tiny

ENGINES = {
    "gpt2": Engine(tiny.gpt2(n_embd=8, n_head=2)),
    "gemma2": Engine(tiny.huggingface("gemma2")),
    "bidirectional": Engine(tiny.native(attention_dir="bidirectional", n_heads=2)),
}
PROMPTS = tiny.prompts(5, seed=1, longest=7)
REFERENCE = tiny.prompts(6, seed=2, longest=7)


def objective(
    name: str | Engine,
    config: UnitsConfig,
    metric: str = "logit_diff",
    ablation: str = "mean",
    prompts: Prompts = PROMPTS,
    memory: str = "200kB",
) -> Objective:
    engine = ENGINES[name] if isinstance(name, str) else name
    divided = divide(engine, config)
    fitted = fit_ablation(AblationConfig(ablation), engine, REFERENCE, source=divided)
    return prepare_units(divided, prompts, METRICS[metric], fitted, memory=memory)


def mean_metric(objective: Objective, mask: torch.Tensor) -> torch.Tensor:
    """The oriented metric under a mask, differentiable in it."""
    total = 0.0
    for batch in objective.batches:
        logits = objective.batches.divided.masked(batch.prompts, mask, batch.ablated)
        total = total + objective.metric.oriented(logits, batch.prompts, batch.clean.logits).sum()
    return total / len(PROMPTS)


@pytest.mark.parametrize("kind", ["nodes", "neurons"])
@pytest.mark.parametrize("ablation", ["mean", "counterfactual", "zero"])
@pytest.mark.parametrize("name", ENGINES)
def test_eap_is_the_gradient_in_the_mask(name, ablation, kind):
    ours = objective(name, UnitsConfig(kind), ablation=ablation)
    assert len(ours.batches) > 1
    mask = torch.ones(ours.space.shape, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(mean_metric(ours, mask), mask)
    found = attribution_units(EAP(), ours)
    torch.testing.assert_close(found.scores.double(), expected, atol=1e-5, rtol=1e-4)
    assert found.scores.abs().max() > 0.01


@pytest.mark.parametrize("ablation", ["mean", "counterfactual"])
def test_eap_ig_is_the_mean_slope_of_small_steps(ablation):
    """At each point of the way the numbers of a unit take a small step from the ablated numbers to
    the clean ones, whatever they are there.
    """
    ours = objective("gpt2", UnitsConfig("nodes"), "kl", ablation)
    steps, step, engine = 3, 1e-4, ENGINES["gpt2"]
    scores = torch.zeros(ours.space.shape, dtype=torch.float64)
    places = {"input": ("input", slice(None))}
    for layer in range(2):
        for head in range(2):
            places[f"a{layer}.h{head}"] = (f"a{layer}.z", slice(4 * head, 4 * head + 4))
        places[f"m{layer}"] = (f"m{layer}", slice(None))
    for batch in ours.batches:
        divided = ours.batches.divided
        clean = _by_place(divided, divided.read(engine, batch.prompts)[0])
        removed = _by_place(divided, batch.ablated)
        for point in range(steps):
            start = removed["input"] + point / steps * (clean["input"] - removed["input"])
            for unit, (place, part) in enumerate(places.values()):

                def moved(
                    size, place=place, part=part, batch=batch, start=start, c=clean, r=removed
                ):
                    def edit(at, value, given):
                        if at != place:
                            return value
                        value = value.clone()
                        value[..., part] += size * (c[place] - r[place])[..., part]
                        return value

                    logits = engine.edited(batch.prompts, edit, start)
                    return ours.metric.oriented(logits, batch.prompts, batch.clean.logits).sum()

                scores[unit] += (moved(step) - moved(-step)) / (2 * step)
    found = attribution_units(EAPIG(steps=steps), ours)
    expected = scores / steps / len(PROMPTS)
    torch.testing.assert_close(found.scores.double(), expected, atol=1e-5, rtol=1e-4)


def _by_place(divided, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = numbers.split([reading.numbers for reading in divided.readings], -1)
    return {reading.place: part for reading, part in zip(divided.readings, parts, strict=True)}


@pytest.mark.parametrize("kind", ["nodes", "neurons"])
def test_exact_scores_are_runs_without_one_unit(kind):
    ours = objective("gpt2", UnitsConfig(kind, layers=[1]))
    found = exact(Exact(), ours)
    ones = torch.ones(ours.space.shape)
    for unit in range(ours.space.n_units):
        mask = ones.clone()
        mask[unit] = 0
        expected = mean_metric(ours, ones) - mean_metric(ours, mask)
        assert found.scores[unit].item() == pytest.approx(expected.item(), abs=1e-6)
    order = ranking(ours.space, found.scores)  # as the exact ones, by a stable sort
    assert order.edges[:, 0].tolist() == sorted(
        range(ours.space.n_units), key=lambda unit: -found.scores[unit].item()
    )


@pytest.mark.parametrize("order", ["sweep", "shuffle"])
def test_acdc_is_the_sequential_rule(order):
    ours = objective("gpt2", UnitsConfig("nodes"), "kl", "counterfactual")
    tau = 0.15
    found = acdc_units(ACDC(tau=tau, order=order, seed=1), ours)
    assert found.kept is not None and 0 < int(found.kept.sum()) < ours.space.n_parts
    if order == "sweep":
        kept = torch.ones(ours.space.shape)
        current = -mean_metric(ours, kept).item()
        for unit in reversed(range(ours.space.n_units)):
            kept[unit] = 0
            without = -mean_metric(ours, kept).item()
            if without - current < tau:
                current = without
            else:
                kept[unit] = 1
        assert torch.equal(found.kept, kept.bool())
    assert found.details["runs"] == ours.space.n_parts
    again = acdc_units(ACDC(tau=tau, order=order, seed=1), ours)
    assert torch.equal(found.kept, again.kept)


def test_scores_by_position_add_up():
    prompts = prompts_from_records(tiny.records(5, seed=4, shortest=6, longest=6))
    engine = Engine(tiny.gpt2(), n_positions=6)
    by_position = objective(engine, UnitsConfig("neurons"), prompts=prompts)
    whole = objective(Engine(tiny.gpt2()), UnitsConfig("neurons"), prompts=prompts)
    scores = attribution_units(EAP(), by_position).scores
    assert scores.shape == (96, 6) and int((scores.abs().max(0).values > 0).sum()) > 1
    torch.testing.assert_close(
        scores.sum(1), attribution_units(EAP(), whole).scores, atol=1e-5, rtol=1e-4
    )
    nodes = objective(engine, UnitsConfig("nodes"), prompts=prompts)
    kept = acdc_units(ACDC(tau=0.1), nodes).kept
    assert kept is not None and kept.shape == (9, 6) and 0 < int(kept.sum()) < 54


def test_what_cannot_be_found_is_refused():
    flat = objective("gpt2", UnitsConfig("nodes"), "kl")
    with pytest.raises(ValueError, match="metric=kl has zero gradient at the clean run"):
        attribution_units(EAP(), flat)
    with pytest.raises(ValueError, match="steps=0, but at least 1"):
        attribution_units(EAPIG(steps=0), flat)
    with pytest.raises(ValueError, match="metric=accuracy has no gradient"):
        attribution_units(EAP(), objective("gpt2", UnitsConfig("nodes"), "accuracy"))
    with pytest.raises(ValueError, match="tau=0, but it must be above 0"):
        acdc_units(ACDC(tau=0), flat)


def test_too_many_units_for_exact_scores_are_refused(monkeypatch):
    monkeypatch.setattr(sys.modules["circuits.discovery.exact"], "MOST_RUNS", 6)
    with pytest.raises(
        ValueError, match="7 units take as many runs, more than 6; use method=eap_ig"
    ):
        exact(Exact(), objective("gpt2", UnitsConfig("nodes")))


def test_an_ablation_of_something_else_is_refused():
    engine = ENGINES["gpt2"]
    fitted = fit_ablation(AblationConfig("mean"), engine, REFERENCE)
    with pytest.raises(ValueError, match="ablation=mean was not fitted to these units"):
        prepare_units(divide(engine, UnitsConfig("nodes")), PROMPTS, METRICS["kl"], fitted)
