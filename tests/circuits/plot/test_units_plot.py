"""The picture of a circuit of units."""

from __future__ import annotations

import re

import pytest

from circuits.plot.units import draw_units

UNITS = [
    ("input", 0.9),
    ("a0.h3", -0.2),
    ("a0.h1", 0.5),
    ("m0.n7", 0.1),
    ("m0.n12", -0.6),
    ("m0.n3", 0.3),
    ("r1.f4", 0.2),
    ("r1.error", 0.0),
    ("m1.f2", 0.4),
    ("m2", 0.4),
]


def drawn(tmp_path, units, **settings) -> str:
    (path,) = draw_units(units, tmp_path, formats=["svg"], **settings)
    return path.read_text()


def test_each_unit_has_a_box_in_its_row(tmp_path):
    svg = drawn(tmp_path, UNITS, title="T", caption="C")
    assert set(re.findall(r'id="unit:([^"]+)"', svg)) == {name for name, _ in UNITS}
    rows = re.findall(r'id="row:([^"]+)"', svg)  # from below
    assert rows == ["embed", "attn 0", "mlp 0", "resid 1", "mlp 1", "mlp 2"]
    at = {}
    for name, path in re.findall(r'<g id="unit:([^"]+)">\s*<path d="M ([^"]+?)"', svg):
        at[name] = tuple(map(float, path.split()[:2]))
    assert at["m0.n12"][0] < at["m0.n3"][0] < at["m0.n7"][0]  # the strongest first
    assert at["input"][1] > at["a0.h1"][1] > at["m0.n7"][1] > at["r1.f4"][1] > at["m1.f2"][1]
    assert at["a0.h1"][1] == at["a0.h3"][1]


def test_a_row_that_is_too_long_says_how_much_is_left(tmp_path):
    svg = drawn(tmp_path, UNITS, per_row=2)
    assert 'id="unit:m0.n7"' not in svg and 'id="unit:m0.n12"' in svg
    assert re.findall(r'id="more:([^"]+)"', svg) == ["mlp 0"]


def test_same_units_same_bytes_in_any_order_and_none_is_a_note(tmp_path):
    assert drawn(tmp_path, UNITS) == drawn(tmp_path, UNITS[::-1])
    assert "unit:" not in drawn(tmp_path, [])


REFUSED = {
    "'m0->logits' is no unit": [("m0->logits", 1.0)],
    "unit 'm0' is given twice": [("m0", 1.0), ("m0", 1.0)],
    "has score nan, which cannot be drawn": [("m0", float("nan"))],
    "is of one position, but a picture has none": [("m0@3", 1.0)],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_drawn_is_refused(tmp_path, message):
    with pytest.raises(ValueError, match=message):
        drawn(tmp_path, REFUSED[message])
    with pytest.raises(ValueError, match="per_row=0, but a row needs at least 1 unit"):
        drawn(tmp_path, UNITS, per_row=0)
    with pytest.raises(ValueError, match="the format '.gif' is none of"):
        draw_units(UNITS, tmp_path, formats=["gif"])
