"""Learned masks over units: the gradient against finite differences, what is found beside chance,
and what is refused.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from circuits.ablation import AblationConfig
from circuits.discovery import METHODS, UGS, SubnetworkProbing
from circuits.discovery.masks import training
from circuits.discovery.masks.warm_start import first_parameters
from circuits.extraction import extract
from circuits.gates import gate_shapes
from circuits.minibatches import minibatch
from circuits.parts import UnitCircuit, UnitsConfig
from circuits.selection import Selection
from tests import tiny
from tests.circuits.discovery.test_over_units import ENGINES, PROMPTS, objective

LEARNED = ("subnetwork_probing", "ugs")
DISCOVERY, EVALUATION = (tiny.prompts(12, seed=seed, longest=6) for seed in (3, 4))


def extracted(method, **settings):
    return extract(
        ENGINES["gpt2"],
        DISCOVERY,
        EVALUATION,
        method,
        units=UnitsConfig("neurons", nodes=True),
        **{"random_draws": 10, **settings},
    )


@pytest.mark.parametrize("each", [0, 1])
@pytest.mark.parametrize("name", ENGINES)
def test_the_gradient_of_a_mask_over_units_is_the_finite_difference(name, each):
    ours = objective(name, UnitsConfig("neurons"), "kl", "counterfactual", memory="2GB")
    config = SubnetworkProbing(masks_per_prompt=each, batch=4)
    trainer = training.trainer_of(config, ours, "units", "hard_concrete")
    (shape,) = gate_shapes(ours.space, "units").values()
    theta = torch.randn(
        shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).requires_grad_()
    training._backward(trainer, {"unit": theta}, 2)
    assert theta.grad is not None
    gradient, step, seen = theta.grad, 1e-5 if name != "gemma2" else 1e-2, 0
    for place in gradient.abs().argsort(descending=True)[:4].tolist():
        ends = []
        for sign in (1, -1):
            moved = theta.detach().clone()
            moved[place] += sign * step
            ends.append(training._backward(trainer, {"unit": moved.requires_grad_()}, 2))
        expected = (ends[0] - ends[1]) / (2 * step)
        coarse = {"rel": 0.05, "abs": 1e-4} if name == "gemma2" else {"rel": 1e-3, "abs": 1e-7}
        assert gradient[place].item() == pytest.approx(expected, **coarse)
        seen += abs(expected) > 1e-5
    assert seen > 1


@pytest.mark.parametrize("ablation", ["mean", "counterfactual"])
def test_a_minibatch_of_units_is_its_prompts_prepared(ablation):
    rows = torch.tensor([4, 1, 2])
    for memory in ("2GB", "200kB"):
        ours = objective("gpt2", UnitsConfig("nodes"), "kl", ablation, memory=memory)
        own = minibatch(ours.batches, rows)
        engine, prompts = ours.engine, PROMPTS.select(rows.sort().values)
        mask = torch.linspace(0, 1, ours.space.n_parts, dtype=torch.float64)
        expected = ours.batches.ablation.values(engine, prompts)
        runs = [ours.batches.divided.masked(prompts, mask, one) for one in (own.ablated, expected)]
        real = prompts.positions >= 0
        torch.testing.assert_close(runs[0][real], runs[1][real])
        torch.testing.assert_close(own.logits[real], engine.logits(prompts)[real])


@pytest.mark.parametrize("name", LEARNED)
def test_a_mask_keeps_the_units_that_matter_and_is_saved_with_them(name, tmp_path):
    found = extracted(METHODS[name].schema(steps=80, units=12))
    circuit = found.circuit
    assert isinstance(circuit, UnitCircuit) and len(circuit) == 12
    assert found.metrics["faithfulness"] > found.metrics["random_circuits"]["percentile_95"] + 0.1
    circuit.save(tmp_path)
    again = UnitCircuit.load(tmp_path)
    drawn, expected = again.sample(3, seed=1), circuit.sample(3, seed=1)
    assert all(
        torch.equal(one.kept, other.kept) for one, other in zip(drawn, expected, strict=True)
    )
    assert len({len(one) for one in drawn}) > 1 and drawn[2].about["sample"]["draw"] == 2
    started = replace(METHODS[name].schema(steps=5), warm_start=str(tmp_path))
    ours = objective("gpt2", UnitsConfig("neurons", nodes=True), "kl", memory="2GB")
    theta = first_parameters(started, ours, "units")["unit"]
    assert theta.argmax() == circuit.scores.abs().argmax()


def test_a_mask_starts_by_the_rank_of_attribution_and_ends_at_a_selected_size():
    found = extracted(
        UGS(steps=40, warm_start="eap_ig"),
        selection=Selection(units=9),
        ablation=AblationConfig("optimal", steps=5),
        random_draws=0,
        accept_worse=True,
    )
    assert len(found.circuit) == 9 and found.metrics["method"]["expected_units"] < 9
    assert found.ablation.name == "optimal"


def test_a_mask_over_units_keeps_to_its_memory():
    ours = objective("gpt2", UnitsConfig("neurons"), "kl", memory="2GB")
    each, shared = ours.batches.training()
    tight = replace(ours, batches=replace(ours.batches, work=shared + 2 * each))
    assert training.trainer_of(UGS(), tight, "units", "window").parts == 2
    tight = replace(ours, batches=replace(ours.batches, work=each + shared - 1))
    with pytest.raises(ValueError, match="raise memory, or use shorter prompts"):
        training.trainer_of(UGS(), tight, "units", "window")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (UGS(edges=5), "method.edges=5, but the circuit is of units; give method.units=5"),
        (UGS(units=0), "method.units=0, but it must be 1 to"),
        (UGS(units=5, share=0.5), "method.units=5 and method.share=0.5 contradict each other"),
        (SubnetworkProbing(over="nodes"), "method.over='nodes' is for circuits of edges"),
        (METHODS["edge_pruning"].schema(), "method=edge_pruning finds circuits of edges only"),
    ],
)
def test_what_does_not_fit_units_is_refused(method, message):
    with pytest.raises(ValueError, match=message):
        extracted(method)


def test_a_size_in_units_does_not_fit_edges():
    with pytest.raises(ValueError, match="method.units=5, but the circuit is of edges; give"):
        extract(ENGINES["gpt2"], DISCOVERY, EVALUATION, UGS(units=5))
