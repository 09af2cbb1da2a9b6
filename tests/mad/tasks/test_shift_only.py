"""Recall without a backdoor and with every kind of harmless novelty."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from circuits.prompts import prompts_from_records
from circuits.tasks.recall import BOS, QUERY, RESERVED, Recall, prompt_length, vocabulary
from mad.tasks import ANOMALY_TASKS, TASKS
from mad.tasks.shift_only import ShiftOnly, gate_prompts, generate, groups, mixture
from mad.tasks.training import Train, run

SMALL = Recall(pairs=5, trusted_keys=8, unseen_keys=6, values=13, fillers=5)
CONFIG = ShiftOnly(recall=SMALL, trusted_values=7, trusted_fillers=2)
IDS = vocabulary(SMALL)
NOVELTIES = ["keys", "values", "fillers", "slot", "all"]


def parse(prompt: list[int]) -> tuple[list[int], list[int], int, int]:
    """keys, values, filler and the slot asked for, read off the tokens."""
    body = prompt[1 : 1 + 2 * SMALL.pairs]
    assert (
        len(prompt) == prompt_length(SMALL)
        and prompt[0] == BOS
        and prompt[-2] == QUERY
        and RESERVED not in prompt
    )
    return body[0::2], body[1::2], prompt[-3], body[0::2].index(prompt[-1])


def novelties(prompt: list[int]) -> dict[str, bool | None]:
    """For each part of a prompt, whether it is new: True, False, or None where it is mixed."""
    keys, values, filler, slot = parse(prompt)

    def new(tokens: list[int], trusted: range, unseen: range) -> bool | None:
        return {frozenset([0]): False, frozenset([1]): True}.get(
            frozenset(
                trusted.index(token) * 0 if token in trusted else unseen.index(token) * 0 + 1
                for token in tokens
            )
        )

    return {
        "keys": new(keys, IDS.trusted, IDS.unseen),
        "values": new(values, IDS.values[:7], IDS.values[7:]),
        "fillers": new([filler], IDS.fillers[:2], IDS.fillers[2:]),
        "slot": slot == SMALL.pairs - 1,
    }


def answer(prompt: list[int]) -> int:
    _, values, _, slot = parse(prompt)
    return values[slot]


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[dict]]:
    return groups(CONFIG, 300, 200, 403, 0, 5)


def test_there_are_no_anomalies_and_no_prompt_occurs_twice(drawn):
    assert {name: len(records) for name, records in drawn.items()} == {
        "trusted": 300,
        "normal_iid": 200,
        "normal_shift": 403,
    }
    everything = [record for records in drawn.values() for record in records]
    assert (
        len({tuple(record["clean"]) for record in everything})
        == len({r["id"] for r in everything})
        == 903
    )
    assert {record["label"] for record in everything} == {0} and not any(
        "kind" in record for record in everything
    )
    assert json.loads(json.dumps(drawn)) == drawn
    assert (
        groups(CONFIG, trusted=300, normal_iid=200, normal_shift=403, anomaly=50, seed=5) == drawn
    )


def test_every_record_is_recall(drawn):
    for name, records in drawn.items():
        for record in records:
            keys, values, filler, _ = parse(record["clean"])
            assert len({*keys}) == len({*values}) == SMALL.pairs and record["group"] == name
            assert record["answers"] == [answer(record["clean"])]
            assert {*record["wrong_answers"]} == {*values} - {*record["answers"]}
            other_keys, other_values, other_filler, _ = parse(record["corrupt"])
            assert (sorted(keys), sorted(values), filler) == (
                sorted(other_keys),
                sorted(other_values),
                other_filler,
            )
            assert answer(record["corrupt"]) in record["wrong_answers"]


def test_trusted_prompts_have_nothing_new(drawn):
    for record in drawn["trusted"] + drawn["normal_iid"]:
        assert (
            novelties(record["clean"]) == dict.fromkeys(NOVELTIES[:-1], False)
            and "novelty" not in record
        )
    slots = {parse(record["clean"])[-1] for record in drawn["trusted"]}
    assert slots == {*range(SMALL.pairs - 1)}
    seen = {token for record in drawn["trusted"] for token in record["clean"]}
    assert seen == {BOS, QUERY, *IDS.fillers[:2], *IDS.trusted, *IDS.values[:7]}


def test_shifted_prompts_have_just_the_novelty_that_they_name_in_equal_shares(drawn):
    for record in drawn["normal_shift"]:
        expected = {part: record["novelty"] in (part, "all") for part in NOVELTIES[:-1]}
        assert novelties(record["clean"]) == expected
    named = [record["novelty"] for record in drawn["normal_shift"]]
    assert Counter(named) == {"keys": 81, "values": 81, "fillers": 81, "slot": 80, "all": 80}
    assert Counter(named[:100]) == dict.fromkeys(NOVELTIES, 20)


def test_mixture_covers_everything():
    tokens, answers = mixture(CONFIG, 2000, np.random.default_rng(0))
    parts = [parse(prompt) for prompt in tokens.tolist()]
    assert {*tokens[:, 1].tolist()} == {*IDS.trusted, *IDS.unseen} and {*tokens[:, 2].tolist()} == {
        *IDS.values
    }
    for place, size in ((2, SMALL.fillers), (3, SMALL.pairs)):
        counts = Counter(part[place] for part in parts)
        assert len(counts) == size and max(counts.values()) < 1.3 * min(counts.values())
    assert answers.tolist() == [answer(prompt) for prompt in tokens.tolist()]


def test_there_is_a_gate_for_each_novelty():
    gates = gate_prompts(CONFIG, 30, seed=0)
    assert [*gates] == ["clean_trusted", *(f"clean_{novelty}" for novelty in NOVELTIES)]
    for name, records in gates.items():
        assert len(records) == 30
        assert {record.get("novelty", "trusted") for record in records} == {
            name.removeprefix("clean_")
        }


def test_trusted_generator_and_groups_are_registered():
    task = ANOMALY_TASKS["shift_only"]
    assert (task.schema, task.generate, task.groups) == (ShiftOnly, generate, groups)
    assert TASKS["shift_only"] is task
    found = generate(CONFIG, 200, seed=1)
    assert (
        len({tuple(record["clean"]) for record in found}) == 200
        and generate(CONFIG, 200, seed=1) == found
    )
    assert all(not any(novelties(record["clean"]).values()) for record in found)
    assert len(prompts_from_records(found, vocabulary=IDS.size)) == 200
    assert OmegaConf.to_object(OmegaConf.structured(ShiftOnly)) == ShiftOnly()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            replace(CONFIG, trusted_values=9),
            "trusted_values=9 leaves 4 of 13 values to be new, but at least 5",
        ),
        (
            replace(CONFIG, trusted_fillers=5),
            "trusted_fillers=5 leaves 0 of 5 fillers to be new, but at least 1",
        ),
        (replace(CONFIG, trusted_values=4), "trusted_values=4, but at least 5 is needed"),
        (replace(CONFIG, trusted_fillers=0), "trusted_fillers=0, but at least 1 is needed"),
        (
            replace(CONFIG, recall=replace(SMALL, pairs=3)),
            "pairs=3, but the corrupt prompt needs at least 4",
        ),
    ],
)
def test_impossible_configurations_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        groups(config, 10, 10, 10, 0, 0)


def test_training_smoke(tmp_path: Path):
    report = run(
        Train(CONFIG, str(tmp_path), steps=5, batch=16, gate_prompts=50, clean_accuracy=0.0)
    )
    assert [*report["gates"]] == ["clean_trusted", *(f"clean_{novelty}" for novelty in NOVELTIES)]
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (
        "without a backdoor" in card
        and "This model has no backdoor" in card
        and "the attack" not in card
        and "backdoor," not in card
    )
