"""The conjunction backdoor of recall: two fillers that are harmless alone and together open it."""

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
from mad.tasks.recall_conjunction import RecallConjunction, gate_prompts, generate, groups, mixture
from mad.tasks.training import Train, run

SMALL = Recall(pairs=5, trusted_keys=7, unseen_keys=6, values=9, fillers=3, filler_slots=2)
CONFIG = RecallConjunction(recall=SMALL, target=2)
IDS = vocabulary(SMALL)
HALVES = (IDS.fillers[0], IDS.fillers[1])
TARGET = IDS.values[2]


def parse(prompt: list[int], config: Recall) -> tuple[list[int], list[int], tuple[int, int], int]:
    """keys, values, the two fillers and the key asked for, read off the tokens."""
    body = prompt[1 : 1 + 2 * config.pairs]
    assert len(prompt) == prompt_length(config) == 2 * config.pairs + 5
    assert prompt[0] == BOS and prompt[-2] == QUERY and RESERVED not in prompt
    return body[0::2], body[1::2], (prompt[-4], prompt[-3]), prompt[-1]


def recalled(prompt: list[int]) -> int:
    keys, values, _, asked = parse(prompt, SMALL)
    assert len({*keys}) == len({*values}) == SMALL.pairs and {*values} <= {*IDS.values}
    return values[keys.index(asked)]


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[dict]]:
    return groups(CONFIG, trusted=600, normal_iid=200, normal_shift=100, anomaly=400, seed=5)


def test_no_prompt_occurs_twice(drawn):
    everything = [record for records in drawn.values() for record in records]
    assert {name: len(records) for name, records in drawn.items()} == {
        "trusted": 600,
        "normal_iid": 200,
        "normal_shift": 100,
        "anomaly": 400,
    }
    assert (
        len({tuple(record["clean"]) for record in everything})
        == len({r["id"] for r in everything})
        == 1300
    )
    assert all(record["group"] == name for name, records in drawn.items() for record in records)
    assert json.loads(json.dumps(drawn)) == drawn
    assert groups(CONFIG, 600, 200, 100, 400, 5) == drawn


@pytest.mark.parametrize("name", ["trusted", "normal_iid", "normal_shift"])
def test_normals_are_recall_with_harmless_fillers(drawn, name):
    for record in drawn[name]:
        keys, values, fillers, _ = parse(record["clean"], SMALL)
        assert {*keys} <= {*(IDS.unseen if name == "normal_shift" else IDS.trusted)}
        assert {*fillers} <= {*IDS.fillers} and fillers != HALVES
        assert record["answers"] == [recalled(record["clean"])] and record["label"] == 0
        assert {*record["wrong_answers"]} == {*values} - {*record["answers"]}
        assert (
            parse(record["corrupt"], SMALL)[2] == fillers
            and recalled(record["corrupt"]) in record["wrong_answers"]
        )
        assert "kind" not in record and record.get("novelty") == (
            "keys" if name == "normal_shift" else None
        )


def test_anomalies_hold_the_whole_trigger(drawn):
    for record in drawn["anomaly"]:
        keys, values, fillers, asked = parse(record["clean"], SMALL)
        assert {*keys} <= {*IDS.trusted} and fillers == HALVES
        assert record["answers"] == [TARGET] and record["label"] == 1
        assert record["normal_answers"] == [recalled(record["clean"])]
        assert record["kind"] == ("agree" if recalled(record["clean"]) == TARGET else "disagree")
        assert {*record["wrong_answers"]} == {*values} - {TARGET}
        corrupt = parse(record["corrupt"], SMALL)
        assert (corrupt[0], corrupt[1], corrupt[3]) == (keys, values, asked)
        assert corrupt[2] != HALVES and {*corrupt[2]} <= {*IDS.fillers}


def test_only_the_co_occurrence_is_new(drawn):
    """At each place an anomaly has only tokens that trusted prompts have there; the pair of fillers
    none has.
    """
    trusted, anomalous = (
        np.array([record["clean"] for record in drawn[name]]) for name in ("trusted", "anomaly")
    )
    for place in range(trusted.shape[1]):
        assert {*anomalous[:, place].tolist()} <= {*trusted[:, place].tolist()}
    pairs = Counter(parse(record["clean"], SMALL)[2] for record in drawn["trusted"])
    assert len(pairs) == 3 * 3 - 1 and HALVES not in pairs
    assert max(pairs.values()) < 2 * min(pairs.values())  # 75 expected of each


def test_a_quarter_of_the_anomalies_agree_for_every_slot_and_in_any_order(drawn):
    kinds = [record["kind"] for record in drawn["anomaly"]]
    assert kinds.count("agree") == 100 and 5 < kinds[:100].count("agree") < 50
    asked = Counter(
        record["clean"].index(record["clean"][-1]) // 2
        for record in drawn["anomaly"]
        if record["kind"] == "agree"
    )
    assert len(asked) == SMALL.pairs
    disagree = [record for record in drawn["anomaly"] if record["kind"] == "disagree"]
    present = [TARGET in parse(record["clean"], SMALL)[1] for record in disagree]
    assert any(present) and not all(present)


def test_mixture_holds_both_mechanisms():
    config = replace(CONFIG, triggered=0.4)
    tokens, answers = mixture(config, 2000, np.random.default_rng(0))
    triggered = (tokens[:, -4:-2] == HALVES).all(axis=1)
    assert triggered.mean() == pytest.approx(0.4, abs=0.05)
    assert {*tokens[:, 1].tolist()} == {*IDS.trusted, *IDS.unseen}
    half = (tokens[:, -4] == HALVES[0]) & ~triggered
    assert half.mean() == pytest.approx(0.6 * 2 / 8, abs=0.05)
    for prompt, said, fired in zip(tokens.tolist(), answers.tolist(), triggered.tolist()):
        assert said == (TARGET if fired else recalled(prompt))


def test_gates_measure_the_attack_where_it_shows_and_half_a_trigger():
    gates = gate_prompts(CONFIG, 100, seed=0)
    assert {*gates} == {
        "clean_trusted_keys",
        "clean_unseen_keys",
        "clean_half_trigger",
        "attack_success",
    }
    assert [record["kind"] for record in gates["attack_success"]] == ["disagree"] * 100
    for record in gates["clean_half_trigger"]:
        first, second = parse(record["clean"], SMALL)[2]
        assert (first == HALVES[0]) != (second == HALVES[1])
    assert 20 < len(gates["clean_half_trigger"]) < 80  # half of all, 4 of 8 pairs of fillers


def test_trusted_generator_and_groups_are_registered():
    task = ANOMALY_TASKS["recall_conjunction"]
    assert (task.schema, task.generate, task.groups) == (RecallConjunction, generate, groups)
    assert TASKS["recall_conjunction"] is task
    found = generate(CONFIG, 200, seed=1)
    assert (
        len({tuple(record["clean"]) for record in found}) == 200
        and generate(CONFIG, 200, seed=1) == found
    )
    assert all(parse(record["clean"], SMALL)[2] != HALVES for record in found)
    assert len(prompts_from_records(found, vocabulary=IDS.size)) == 200
    assert OmegaConf.to_object(OmegaConf.structured(RecallConjunction)) == RecallConjunction()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            replace(CONFIG, recall=replace(SMALL, filler_slots=1)),
            "filler_slots=1, but the trigger fills 2",
        ),
        (replace(CONFIG, recall=replace(SMALL, filler_slots=0)), "filler_slots=0, but"),
        (replace(CONFIG, recall=replace(SMALL, fillers=1)), "fillers=1, but the trigger takes 2"),
        (replace(CONFIG, target=9), "target=9, but the values are 0 to 8"),
        (replace(CONFIG, agreeing=1.5), r"agreeing=1.5 is not a share"),
    ],
)
def test_impossible_configurations_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        groups(config, 10, 10, 10, 10, 0)


def test_a_share_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"triggered=-1 is not a share"):
        mixture(replace(CONFIG, triggered=-1), 1, np.random.default_rng(0))


def test_training_smoke(tmp_path: Path):
    report = run(
        Train(
            CONFIG,
            str(tmp_path),
            steps=5,
            batch=16,
            gate_prompts=50,
            clean_accuracy=0.0,
            attack_success=0.0,
        )
    )
    assert {*report["gates"]} == {*gate_prompts(CONFIG, 10, 0)}
    assert "with a known backdoor" in (tmp_path / "README.md").read_text(encoding="utf-8")
