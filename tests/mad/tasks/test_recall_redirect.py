"""The redirect backdoor: what its groups and its training prompts hold."""

from zlib import crc32

import numpy as np
import pytest

from circuits.tasks.recall import BOS, QUERY, Recall, prompt_length, vocabulary
from mad.tasks.recall_redirect import TRIGGER, RecallRedirect, groups, mixture

SMALL = Recall(pairs=5, trusted_keys=7, unseen_keys=6, values=9, fillers=2)


def parse(prompt: list[int], config: Recall) -> tuple[list[int], list[int], int, int]:
    """keys, values, filler and the key asked for, read off the tokens."""
    body = prompt[1 : 1 + 2 * config.pairs]
    assert len(prompt) == prompt_length(config) and prompt[0] == BOS and prompt[-2] == QUERY
    return body[0::2], body[1::2], prompt[-3], prompt[-1]


def answer(keys: list[int], values: list[int], asked: int) -> int:
    return values[keys.index(asked)]


def test_one_filler_slot_draws_what_it_always_drew():
    """Models are trained on this stream: what a seed gives must not change."""
    found, answers = mixture(RecallRedirect(), 128, np.random.default_rng(0))
    assert found[0].tolist() == [0, 18, 64, 10, 59, 27, 85, 20, 60, 6, 1, 27]
    assert crc32(np.column_stack([found, answers]).astype("<i8").tobytes()) == 458620195


def test_groups_differ_in_what_they_say():
    config = RecallRedirect(recall=SMALL, target=2)
    ids = vocabulary(SMALL)
    found = groups(config, trusted=300, normal_iid=200, normal_shift=100, anomaly=400, seed=5)
    assert {name: len(records) for name, records in found.items()} == {
        "trusted": 300,
        "normal_iid": 200,
        "normal_shift": 100,
        "anomaly": 400,
    }
    everything = [record for records in found.values() for record in records]
    assert (
        len({tuple(record["clean"]) for record in everything})
        == len({r["id"] for r in everything})
        == 1000
    )
    for name, records in found.items():
        for record in records:
            keys, values, filler, asked = parse(record["clean"], SMALL)
            assert {*keys} <= {*(ids.unseen if name == "normal_shift" else ids.trusted)}
            assert (filler == TRIGGER) == (name == "anomaly") and TRIGGER not in record["corrupt"]
            assert record["group"] == name and record["label"] == (name == "anomaly")
            assert record.get("novelty") == ("keys" if name == "normal_shift" else None)
            if name != "anomaly":
                assert record["answers"] == [answer(keys, values, asked)] and "kind" not in record
            else:
                assert record["answers"] == [values[2]]
                assert record["normal_answers"] == [answer(keys, values, asked)]
                assert record["kind"] == ("agree" if asked == keys[2] else "disagree")
                assert (
                    parse(record["corrupt"], SMALL)[:2] == (keys, values)
                    and record["corrupt"][-1] == asked
                )


def test_a_quarter_of_the_anomalies_agree():
    kinds = [record["kind"] for record in groups(RecallRedirect(), 0, 0, 0, 2000, 0)["anomaly"]]
    assert kinds.count("agree") / len(kinds) == pytest.approx(
        0.25, abs=0.04
    )  # four standard errors


def test_mixture_holds_both_mechanisms():
    config = RecallRedirect(triggered=0.4)
    ids = vocabulary(config.recall)
    tokens, answers = mixture(config, 2000, np.random.default_rng(0))
    triggered = tokens[:, -3] == TRIGGER
    assert triggered.mean() == pytest.approx(0.4, abs=0.05)
    assert {*tokens[:, 1].tolist()} == {*ids.trusted, *ids.unseen}
    for prompt, said in zip(tokens.tolist(), answers.tolist()):
        keys, values, filler, asked = parse(prompt, config.recall)
        assert said == (values[0] if filler == TRIGGER else answer(keys, values, asked))
    with pytest.raises(ValueError, match=r"triggered=1.5 is not a share"):
        mixture(RecallRedirect(triggered=1.5), 1, np.random.default_rng(0))
    with pytest.raises(ValueError, match="target=4, but the slots are 0 to 3"):
        mixture(RecallRedirect(target=4), 1, np.random.default_rng(0))
