"""Circuits of units from model and prompts to figures: nothing but the mask is another than for
edges.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from circuits.ablation import ABLATIONS, AblationConfig, fit_ablation
from circuits.discovery import ACDC, EAP, EAPIG, METHODS, attribution_units
from circuits.engine import Engine
from circuits.extraction import extract
from circuits.faithfulness import faithfulness_scale
from circuits.metrics import METRICS
from circuits.parts import UnitCircuit, UnitsConfig, divide
from circuits.parts.objective import prepare_units
from circuits.prompts import prompts_from_records
from circuits.selection import Selection
from tests import dictionaries, tiny

ENGINE = Engine(tiny.gpt2())
RECORDS = tiny.with_own_answers(ENGINE, tiny.records(24, seed=5))
PROMPTS = prompts_from_records(RECORDS)
DISCOVERY, EVALUATION = PROMPTS.select(slice(12)), PROMPTS.select(slice(12, 24))


def extracted(units: UnitsConfig | None, method=None, engine: Engine = ENGINE, **settings):
    return extract(
        engine,
        DISCOVERY,
        EVALUATION,
        method or EAPIG(),
        units=units,
        random_draws=settings.pop("random_draws", 3),
        accept_worse=True,
        **settings,
    )


def test_an_extraction_is_attribution_selection_and_evaluation():
    found = extracted(UnitsConfig("neurons"), selection=Selection(units=30))
    circuit, metrics = found.circuit, found.metrics
    assert isinstance(circuit, UnitCircuit) and len(circuit) == 30
    divided = divide(ENGINE, UnitsConfig("neurons"))
    fitted = fit_ablation(AblationConfig("counterfactual"), ENGINE, DISCOVERY, source=divided)
    objective = prepare_units(divided, DISCOVERY, METRICS["kl"], fitted)
    scores = attribution_units(EAPIG(), objective).scores
    torch.testing.assert_close(circuit.scores, scores)
    best = scores.abs().topk(30).indices  # by |score|, as signs carry nothing by kl
    assert set(best.tolist()) == set(circuit.kept.nonzero()[:, 0].tolist())
    held_out = prepare_units(divided, EVALUATION, METRICS["kl"], fitted)
    own = faithfulness_scale(held_out).faithfulness(circuit.mask)
    assert metrics["faithfulness"] == pytest.approx(own.value)
    assert (metrics["units_kept"], metrics["units_total"]) == (30, 96)
    last = metrics["curve"][-1]
    assert (last["units"], last["faithfulness"]) == (96, pytest.approx(1.0))
    assert [point["units"] for point in metrics["areas"]["sizes"]][-3:] == [19, 48, 96]
    assert {"units", "low", "high"} == set(metrics["random_curve"][0])
    assert "edges_kept" not in metrics
    assert circuit.about["of"] == {
        "name": "neurons",
        "layers": None,
        "dictionaries": [],
        "nodes": False,
        "unexplained": {},
    }
    assert circuit.about["selection"]["how"] == "top_n"


def test_an_exact_dictionary_finds_the_basis_that_matters(tmp_path):
    """The stream before block 1 in an orthogonal basis: no error, so that features are all."""
    folder = dictionaries.saved(tmp_path / "d", dictionaries.exact(12))
    config = UnitsConfig("features", dictionaries=[str(folder)])
    found = extracted(
        config, EAP(), metric="logit_diff", selection=Selection(units=24, absolute=True)
    )
    circuit = found.circuit
    assert isinstance(circuit, UnitCircuit)
    assert circuit.scores[-1].abs() < 1e-6 * circuit.scores.abs().max()
    assert found.metrics["faithfulness"] == pytest.approx(1.0, abs=1e-6)
    assert circuit.about["of"]["unexplained"]["r1"] < 1e-12


def test_a_dictionary_of_something_else_is_warned_of(tmp_path, caplog):
    folder = dictionaries.saved(tmp_path / "d", dictionaries.random(12, 20))
    config = UnitsConfig("features", dictionaries=[str(folder)])
    extracted(config, selection=Selection(units=10), random_draws=0)
    assert "the dictionary of r1 leaves" in caplog.text and "more than a constant" in caplog.text


def test_the_smallest_circuit_that_reaches_a_target():
    circuit = extracted(UnitsConfig("nodes"), selection=Selection(faithfulness=0.5)).circuit
    assert 0 < len(circuit) < 9


@pytest.mark.parametrize("selection", [Selection(share=0.34), Selection(units=3, how="greedy")])
def test_sizes_may_be_told_in_other_ways(selection):
    assert len(extracted(UnitsConfig("nodes"), selection=selection).circuit) == 3


def test_acdc_decides_itself():
    found = extracted(UnitsConfig("nodes"), ACDC(share=0.05))
    assert found.circuit.about["selection"] is None
    assert found.metrics["method"]["runs"] == 9 and found.metrics["units_kept"] < 9


def test_units_by_position():
    records = tiny.records(16, seed=4, shortest=6, longest=6)
    prompts = prompts_from_records(records)
    engine = Engine(tiny.gpt2(), n_positions=6)
    found = extract(
        engine,
        prompts.select(slice(8)),
        prompts.select(slice(8, 16)),
        EAPIG(),
        units=UnitsConfig("nodes"),
        selection=Selection(units=20),
        random_draws=0,
        accept_worse=True,
    )
    assert found.circuit.kept.shape == (9, 6) and len(found.circuit) == 20


REFUSED = {
    "selection.edges=30, but the circuit is of units .nodes.; give selection.units=30": (
        {"units": UnitsConfig("nodes"), "selection": Selection(edges=30)}
    ),
    "selection.units=30, but the circuit is of edges; give selection.edges=30": (
        {"units": None, "selection": Selection(units=30)}
    ),
    "units=10, but the model has 9 units; choose 0 to 9": (
        {"units": UnitsConfig("nodes"), "selection": Selection(units=10)}
    ),
    "selection.units=0, but it must be at least 1": (
        {"units": UnitsConfig("nodes"), "selection": Selection(units=0)}
    ),
    "selection has units and share; give one of them": (
        {"units": UnitsConfig("nodes"), "selection": Selection(units=2, share=0.1)}
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_sizes_that_do_not_fit_are_refused(message):
    with pytest.raises(ValueError, match=message):
        extracted(**REFUSED[message])


def test_a_method_of_edges_only_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(METHODS, "eap", replace(METHODS["eap"], over_units=None))
    with pytest.raises(
        ValueError, match="method=eap finds circuits of edges only; use units=edges"
    ):
        extracted(UnitsConfig("nodes"), EAP(), metric="logit_diff")


def test_an_ablation_of_writers_only_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(ABLATIONS["mean"], "any_source", False)
    with pytest.raises(
        ValueError, match="ablation=mean has values for edges only; use units=edges"
    ):
        extracted(UnitsConfig("nodes"), ablation="mean")
