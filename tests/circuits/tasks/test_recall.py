"""Associative recall: what the prompts hold, and what their corrupt partners spoil."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.tasks.recall import (
    BOS,
    QUERY,
    RESERVED,
    Recall,
    draw,
    draw_distinct,
    generate,
    prompt_length,
    tokens,
    vocabulary,
)

SMALL = Recall(pairs=5, trusted_keys=7, unseen_keys=6, values=9, fillers=2)


def parse(prompt: list[int], config: Recall) -> tuple[list[int], list[int], int, int]:
    """keys, values, filler and the key asked for, read off the tokens."""
    body = prompt[1 : 1 + 2 * config.pairs]
    assert len(prompt) == prompt_length(config) and prompt[0] == BOS and prompt[-2] == QUERY
    return body[0::2], body[1::2], prompt[-3], prompt[-1]


def answer(keys: list[int], values: list[int], asked: int) -> int:
    return values[keys.index(asked)]


def test_vocabulary_gives_each_token_one_meaning():
    ids = vocabulary(SMALL)
    everything = [BOS, QUERY, RESERVED, *ids.fillers, *ids.trusted, *ids.unseen, *ids.values]
    assert everything == list(range(ids.size))
    assert [len(part) for part in (ids.fillers, ids.trusted, ids.unseen, ids.values)] == [
        2,
        7,
        6,
        9,
    ]


@settings(max_examples=25, deadline=None)
@given(
    pairs=st.integers(4, 7),
    keys=st.sampled_from(["trusted", "unseen", "all"]),
    seed=st.integers(0, 10**6),
)
def test_generated_prompts_are_recall(pairs: int, keys: str, seed: int):
    config = Recall(pairs=pairs, trusted_keys=8, unseen_keys=7, values=9, fillers=2, keys=keys)
    ids = vocabulary(config)
    allowed = {
        "trusted": {*ids.trusted},
        "unseen": {*ids.unseen},
        "all": {*ids.trusted, *ids.unseen},
    }[keys]
    found = generate(config, 20, seed)
    assert (
        len({tuple(record["clean"]) for record in found})
        == len({record["id"] for record in found})
        == 20
    )
    for record in found:
        prompt_keys, values, filler, asked = parse(record["clean"], config)
        assert len({*prompt_keys}) == len({*values}) == pairs
        assert {*prompt_keys} <= allowed and {*values} <= {*ids.values} and filler in ids.fillers
        assert record["answers"] == [answer(prompt_keys, values, asked)]
        assert {*record["wrong_answers"]} == {*values} - {*record["answers"]}
        assert record["label"] == 0 and RESERVED not in record["clean"] + record["corrupt"]


@settings(max_examples=25, deadline=None)
@given(pairs=st.integers(4, 7), seed=st.integers(0, 10**6))
def test_counterfactual_spoils_the_answer_through_every_input(pairs: int, seed: int):
    config = Recall(pairs=pairs, trusted_keys=8, values=9)
    for record in generate(config, 20, seed):
        clean, corrupt = parse(record["clean"], config), parse(record["corrupt"], config)
        assert sorted(record["clean"][:-1]) == sorted(
            record["corrupt"][:-1]
        )  # the same tokens but for the query
        assert clean[2] == corrupt[2]
        for choice in range(1, 8):
            keys = (corrupt if choice & 1 else clean)[0]
            values = (corrupt if choice & 2 else clean)[1]
            asked = (corrupt if choice & 4 else clean)[3]
            assert answer(keys, values, asked) in record["wrong_answers"]
        assert all(
            clean[0][slot] != corrupt[0][slot] and clean[1][slot] != corrupt[1][slot]
            for slot in range(pairs)
        )


def test_generate_repeats_itself_and_gives_plain_json():
    found = generate(Recall(), 5, seed=3)
    assert json.loads(json.dumps(found)) == found == generate(Recall(), 5, seed=3)
    assert found != generate(Recall(), 5, seed=4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Recall(pairs=3), "pairs=3, but the corrupt prompt needs at least 4"),
        (Recall(keys="new"), "keys='new' is none of trusted, unseen, all"),
        (Recall(trusted_keys=3), "3 keys to choose from, but a prompt has 4 pairs"),
        (Recall(values=0), "values=0, but at least 1 is needed"),
        (
            Recall(trusted_keys=4, values=4, fillers=1),
            "but only 2304 different prompts were found",
        ),  # 4! * 4! * 4
    ],
)
def test_impossible_configurations_are_refused(config: Recall, message: str):
    with pytest.raises(ValueError, match=message):
        generate(config, 3000, seed=0)


@pytest.mark.parametrize("slots", [2, 3])
def test_every_filler_slot_is_filled(slots: int):
    config = replace(SMALL, filler_slots=slots)
    drawn = draw(config, 200, np.random.default_rng(0))
    made = tokens(drawn)
    assert made.shape == (200, prompt_length(config)) == (200, 2 * config.pairs + 3 + slots)
    assert made[:, -2 - slots : -2].tolist() == drawn.filler.tolist()
    combinations = {*map(tuple, drawn.filler.tolist())}
    assert combinations == {*product(vocabulary(config).fillers, repeat=slots)}
    one = tokens(replace(drawn, filler=drawn.filler[:, 0]))
    assert np.delete(made, range(-1 - slots, -2), axis=1).tolist() == one.tolist()
    triggered = tokens(draw_distinct(config, 50, np.random.default_rng(0), filler=RESERVED))
    assert (triggered[:, -2 - slots : -2] == RESERVED).all() and len(
        {*map(tuple, triggered.tolist())}
    ) == 50


def test_draw_uses_every_slot_and_filler():
    drawn = draw(Recall(), 500, np.random.default_rng(0))
    assert {*drawn.slot.tolist()} == {0, 1, 2, 3} and {*drawn.filler.tolist()} == {
        *vocabulary(Recall()).fillers
    }
