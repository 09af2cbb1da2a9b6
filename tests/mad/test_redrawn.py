"""Circuits that are found again on other prompts, random ones among them."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from circuits.ablation import AblationConfig, fit_ablation
from circuits.circuit import Circuit
from circuits.discovery import EAPIG
from circuits.engine import Engine
from circuits.extraction import random_controls, rediscover
from circuits.prompts import prompts_from_records
from circuits.selection import Selection, random_circuits
from mad.detector import Context
from mad.detectors import DETECTORS, Deviation, Strict
from mad.redrawn import further_circuits, redrawn
from tests import tiny

ENGINE = Engine(tiny.gpt2(n_embd=8, n_head=2))
GRAPH = ENGINE.graph


def circuit(**about) -> Circuit:
    """A circuit of 12 edges, which says how it was found."""
    (kept,) = random_circuits(GRAPH, 12, 1, seed=9)
    found = {
        "method": asdict(EAPIG(steps=1)),
        "metric": "kl",
        "ablation": asdict(AblationConfig("mean")),
        "selection": asdict(Selection(edges=12)),
    }
    return Circuit(GRAPH, kept, kept.float(), {**found, **about})


def test_random_controls_are_drawn_anew_when_they_are_found_again():
    one, two = random_controls(circuit(), 2, seed=3)
    expected = random_circuits(GRAPH, 12, 2, seed=3)
    assert torch.equal(one.kept, expected[0]) and torch.equal(two.kept, expected[1])
    first, second = (tiny.prompts(5, seed) for seed in (1, 2))
    again = rediscover(one, ENGINE, first)
    assert len(one) <= int(again.sum()) <= len(one) + 4
    assert torch.equal(again, rediscover(one, ENGINE, first))
    assert not torch.equal(again, one.kept)
    assert not torch.equal(again, rediscover(one, ENGINE, second))


@pytest.mark.parametrize("config", [Strict(hosts=2), Deviation(circuits=3)], ids=str)
def test_detectors_of_several_circuits_take_random_controls(config):
    (control,) = random_controls(circuit(), 1, seed=3)
    detector = DETECTORS[config.name].fit(config, Context(ENGINE, control), tiny.prompts(8))
    assert len({tuple(mask.flatten().tolist()) for mask in detector.masks}) == 3
    assert detector.score(tiny.prompts(3, 1)).isfinite().all()


def test_the_longest_prompt_may_have_no_donor():
    records = [*tiny.records(12, 5, longest=7), *tiny.records(1, 6, shortest=9, longest=9)]
    prompts, resample = prompts_from_records(records), AblationConfig("resample")
    with pytest.raises(ValueError, match="no reference prompt but itself"):
        fit_ablation(resample, ENGINE, prompts).values(ENGINE, prompts)
    found = rediscover(circuit(ablation=asdict(resample)), ENGINE, prompts)
    assert 0 < int(found.sum()) <= 12


def test_further_circuits_are_found_on_as_many_redrawn_prompts_as_the_first():
    first = circuit(splits={"discovery": {"prompts": 6}})
    trusted = tiny.prompts(10)
    found = further_circuits(first, ENGINE, trusted, 2)
    for seed, kept in enumerate(found, start=1):
        drawn = redrawn(trusted, 6, seed)
        assert len(drawn) == 6 and torch.equal(kept, rediscover(first, ENGINE, drawn))
    assert further_circuits(first, ENGINE, trusted, 0) == []
    with pytest.raises(ValueError, match="circuits=3 needs at least 2 trusted prompts to redraw"):
        further_circuits(first, ENGINE, trusted.select([0]), 2)
