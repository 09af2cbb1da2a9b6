"""Causal models: order, interventions, interchange, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abstraction.causal_model import CausalModel

# Declared children first: the order of evaluation must not come from the order of declaration.
MODEL = CausalModel(
    ("a", "b", "c"),
    {
        "all": (("pair", "c"), lambda pair, c: pair + 10 * c),
        "pair": (("left", "right"), torch.add),
        "left": (("a",), lambda a: a + 1),
        "right": (("b",), lambda b: 2 * b),
    },
)
numbers = st.lists(st.integers(-5, 5), min_size=4, max_size=4).map(torch.tensor)


def literal(a: int, b: int, c: int, **fixed: int) -> dict[str, int]:
    left = fixed.get("left", a + 1)
    right = fixed.get("right", 2 * b)
    pair = fixed.get("pair", left + right)
    return {"left": left, "right": right, "pair": pair, "all": fixed.get("all", pair + 10 * c)}


@given(
    numbers,
    numbers,
    numbers,
    st.dictionaries(st.sampled_from(["left", "right", "pair", "all"]), numbers),
)
def test_a_batch_equals_one_example_at_a_time_with_any_intervention(a, b, c, fixed):
    values = MODEL.run({"a": a, "b": b, "c": c}, set=fixed)
    for row in range(4):
        one = {name: int(value[row]) for name, value in fixed.items()}
        expected = literal(int(a[row]), int(b[row]), int(c[row]), **one)
        assert {name: int(values[name][row]) for name in expected} == expected


def test_interchange_takes_each_variable_from_its_own_source():
    base = {name: torch.tensor([1]) for name in "abc"}
    first, second = ({name: torch.tensor([value]) for name in "abc"} for value in (5, 7))
    values = MODEL.interchange(base, {"left": first, "right": second})
    assert {name: int(values[name]) for name in MODEL.order} == literal(1, 1, 1, left=6, right=14)


def test_parents_come_first():
    seen = set(MODEL.inputs)
    for name in MODEL.order:
        assert seen.issuperset(MODEL.variables[name][0])
        seen.add(name)


def test_cycles_are_refused_and_shown():
    with pytest.raises(ValueError, match=r"depend on themselves: (a -> b -> a|b -> a -> b)"):
        CausalModel(("x",), {"a": (("b",), torch.neg), "b": (("a",), torch.neg)})


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"y": (("z",), torch.neg)},
            "'y' has the parent 'z', which is neither input nor variable; known are x, y",
        ),
        ({"x": ((), torch.neg)}, "variable 'x' has the name of an input"),
    ],
)
def test_broken_models_are_refused(variables, message):
    with pytest.raises(ValueError, match=message):
        CausalModel(("x",), variables)


def test_broken_runs_are_refused():
    inputs = {name: torch.tensor([1]) for name in "abc"}
    with pytest.raises(ValueError, match="input 'c' is missing; this model needs a, b, c"):
        MODEL.run({"a": inputs["a"], "b": inputs["b"]})
    with pytest.raises(ValueError, match="'d' is no input; the inputs are a, b, c"):
        MODEL.run({**inputs, "d": inputs["a"]})
    with pytest.raises(ValueError, match="'a' is no variable"):
        MODEL.run(inputs, set={"a": inputs["a"]})
    with pytest.raises(ValueError, match="'middle' is no variable"):
        MODEL.interchange(inputs, {"middle": inputs})
