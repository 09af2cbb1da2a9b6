"""Programs: what each step means, by literal loops; which positions matter; what is refused."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abstraction.ground_truth.placement import place, reads
from abstraction.ground_truth.program import Program
from abstraction.ground_truth.steps import Attend, Combine, Lookup, Switch, Threshold, at, back

TOKENS = ("a", "b", "c", "no", "yes")
LENGTH = 5


def program(*steps, of: str = "token", **changes) -> Program:
    """A program whose answer is whether a variable is odd."""
    last = Lookup("last", (of,), lambda value: int(value) % 2, size=2)
    fields = {
        "name": "test",
        "tokens": TOKENS,
        "length": LENGTH,
        "steps": (*steps, last),
        "output": "last",
        "answers": ("no", "yes"),
        "sample": lambda count, generator: torch.zeros(count, LENGTH, dtype=torch.long),
    }
    return Program(**{**fields, **changes})


def run(made: Program, tokens: list[list[int]]) -> dict[str, list]:
    return {
        name: value.tolist()
        for name, value in made.causal_model.run({"token": torch.tensor(tokens)}).items()
    }


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["first", "last", "mean"]),
    st.booleans(),
    st.booleans(),
)
def test_attention_equals_its_definition(seed, ties, causal, with_query):
    draw = random.Random(seed)
    matches = [[draw.random() < 0.3 for _ in TOKENS] for _ in TOKENS]
    numbers = tuple(draw.random() for _ in TOKENS) if ties == "mean" else None
    step = Attend(
        "x",
        "token",
        key="token",
        query="token" if with_query else None,
        ties=ties,
        numbers=numbers,
        match=(lambda query, key: matches[query][key])
        if with_query
        else (lambda key: matches[0][key]),
    )
    tokens = [draw.randrange(len(TOKENS)) for _ in range(LENGTH)]
    found = run(program(step, causal=causal), [tokens])["x"][0]
    for here in range(LENGTH):
        visible = range(here + 1) if causal else range(LENGTH)
        chosen = [
            j for j in visible if matches[tokens[here] if with_query else 0][tokens[j]]
        ] or list(visible)
        if numbers is None:
            assert found[here] == tokens[chosen[0 if ties == "first" else -1]]
        else:
            assert found[here] == pytest.approx(
                sum(numbers[tokens[j]] for j in chosen) / len(chosen)
            )


def test_the_other_steps_equal_their_definitions():
    made = program(
        Attend("number", "token", numbers=(1.0, -2.0, 0.5, 0.0, 4.0), **back(0)),
        Attend("before", "number", **back(1)),
        Combine("sum", ("number", "before"), (2.0, -1.0), bias=0.25),
        Threshold("level", "sum", (-1.0, 1.0), gap=0.5),
        Lookup(
            "pair",
            ("token", "position"),
            lambda token, position: (3 * token + position) % 4,
            size=4,
        ),
        Lookup("late", ("position",), {(p,): int(p >= 3) for p in range(LENGTH)}, size=2),
        Lookup("other", ("pair",), lambda pair: 3 - pair, size=4),
        Switch("chosen", "late", "pair", "other"),
    )
    tokens = [0, 1, 2, 4, 3]
    values = {name: value[0] for name, value in run(made, [tokens]).items()}
    number = [1.0, -2.0, 0.5, 4.0, 0.0]
    before = [1.0, *number[:-1]]  # position 0 has no earlier one, and takes its own
    total = [2 * x - y + 0.25 for x, y in zip(number, before, strict=True)]
    pair = [(3 * token + position) % 4 for position, token in enumerate(tokens)]
    assert values["number"] == number and values["before"] == before and values["sum"] == total
    assert values["level"] == [sum(x > cut for cut in (-1.0, 1.0)) for x in total]
    assert values["pair"] == pair
    assert values["chosen"] == [3 - x if p >= 3 else x for p, x in enumerate(pair)]
    assert values["answer"] == [TOKENS.index(("no", "yes")[token % 2]) for token in tokens]


def test_steps_may_be_written_in_any_order():
    steps = (Lookup("two", ("one",), lambda x: x, 2), Lookup("one", ("token",), lambda x: x % 2, 2))
    tokens = [[0, 1, 2, 3, 4]]
    assert run(program(*steps), tokens) == {
        name: run(program(*steps[::-1]), tokens)[name] for name in run(program(*steps), tokens)
    }


def test_reads_name_the_positions_that_the_answer_depends_on():
    made = program(
        Attend("third", "token", **at(2)),
        Attend("shifted", "token", **back(1)),
        Lookup("pair", ("third", "shifted"), lambda x, y: (x + y) % 3, size=3),
        Lookup("idle", ("token",), lambda x: 0, size=1),
        of="pair",
    )
    found = {(read.step, read.port, read.variable): read.positions for read in reads(made)}
    everywhere, last = (0, 1, 2, 3, 4), (4,)
    assert found == {
        ("third", "v", "token"): (2,),
        ("third", "k", "position"): everywhere,
        ("shifted", "v", "token"): (3,),
        ("shifted", "q", "position"): last,
        ("shifted", "k", "position"): everywhere,
        ("pair", "mlp", "third"): last,
        ("pair", "mlp", "shifted"): last,
        ("last", "mlp", "pair"): last,
        ("logits", "logits", "last"): last,
    }


def test_steps_go_to_the_earliest_place_with_room():
    made = program(
        Attend("x", "token", **at(0)),
        Attend("y", "token", **at(1)),
        Lookup("z", ("x", "y"), lambda x, y: x, 5),
    )
    roomy = place(made, n_heads=None, d_mlp=None, redundant=None, copies=1)
    assert {name: where.nodes for name, where in roomy.items()} == {
        "x": ("a0.h0",),
        "y": ("a0.h1",),
        "z": ("m0",),
        "last": ("m0",),
    }
    tight = place(made, n_heads=1, d_mlp=25, redundant=None, copies=1)
    assert {name: where.nodes for name, where in tight.items()} == {
        "x": ("a0.h0",),
        "y": ("a1.h0",),
        "z": ("m1",),
        "last": ("m0",),
    }


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Lookup("x", ("token",) * 4, lambda *a: 0, 2), "'x': 4 inputs, but a lookup takes 1 to 3"),
        (
            Lookup("x", ("token",), {(0,): 0, (1,): 1}, 2),
            r"'x' is not total: no entry for \(token=2\); give one for ",
        ),
        (
            Lookup("x", ("token",), lambda t: None if t == 4 else t, 5),
            r"'x' is not total: no entry for \(token=4\)",
        ),
        (
            Lookup("x", ("token",), lambda t: t, 3),
            r"'x' gives 3 for \(token=3\), but size=3 allows 0 to 2",
        ),
        (
            Lookup("x", ("nothing",), lambda t: 0, 2),
            "'x' has the parent 'nothing', which is neither input nor",
        ),
        (Lookup("x", ("x",), lambda t: 0, 2), "variables depend on themselves: x -> x"),
        (Lookup("token", ("token",), lambda t: 0, 2), "'token' has a name that is taken"),
        (Lookup("last", ("token",), lambda t: 0, 2), "2 steps are called 'last'"),
        (Attend("x", "token", numbers=(1.0, 2.0)), "'x': 2 numbers for 'token' of size 5"),
        (Attend("x", "token", ties="mean"), "'x': the mean of categories is none; give numbers="),
        (Attend("x", "token", query="token"), "'x': a query needs a key"),
        (
            Attend("x", "token", ties="middle"),
            "'x': ties='middle', but it must be first, last or mean",
        ),
        (Threshold("x", "token", (0.5,), 1.0), "'x': 'token' must be numerical"),
        (Switch("x", "token", "token", "token"), "'x': trigger 'token' must have 2 categories"),
    ],
)
def test_broken_steps_are_refused(step, message):
    with pytest.raises(ValueError, match=message):
        program(step)


NUMBER = Attend("number", "token", numbers=(0.0, 1.0, 2.0, 3.0, 4.0), **back(0))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Threshold("x", "number", (2.0, 1.0), 0.5), r"cuts=\(2.0, 1.0\) must be ascending"),
        (
            Threshold("x", "number", (1.0, 2.0), 1.5),
            "gap=1.5 must be above 0 and at most 1, the nearest cuts",
        ),
        (Combine("x", ("number",), (1.0, 2.0)), "2 weights for 1 inputs"),
        (
            Lookup("x", ("number",), lambda t: 0, 2),
            "'number' must be categorical; make it so with a Threshold",
        ),
    ],
)
def test_broken_steps_over_numbers_are_refused(step, message):
    with pytest.raises(ValueError, match=message):
        program(NUMBER, step)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"output": "nothing"},
            "output='nothing' is no variable; the variables are token, position, last",
        ),
        ({"answers": ("no",)}, "1 answers for output 'last', which has 2 categories"),
        ({"answers": ("no", "maybe")}, "answer 'maybe' is no token"),
        ({"tokens": ("no", "yes", "no")}, "no name twice"),
        ({"scored": (5,)}, "scored position 5, but inputs have 5 tokens"),
        ({"length": 0}, "length=0"),
    ],
)
def test_broken_programs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        program(**changes)
