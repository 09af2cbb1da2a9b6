"""Pictures of tall circuits: rows that no edge joins are shared, legends repeat, PNGs bounded."""

from __future__ import annotations

from functools import cache
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from circuits.plot import draw_circuit
from circuits.plot import layout as drawing
from circuits.plot.layout import TALL, WIDEST_BAND, band_label, lay_out, parse_edges, row_of
from circuits.plot.style import save_figure


def tower(layers: int, step: int = 1) -> list[tuple[str, float]]:
    """MLPs of which each reads the one `step` below it and writes to the logits."""
    names = [f"m{layer}->m{layer + step}" for layer in range(layers - step)]
    names += [f"input->m{layer}" for layer in range(step)]
    return [(name, 1.0 + index) for index, name in enumerate([*names, f"m{layers - 1}->logits"])]


def bands_of(edges) -> list[list[str]]:
    drawn = parse_edges(edges)
    nodes, weights = drawing._nodes(drawn), drawing._weights(drawn)
    return drawing._bands(nodes, {*weights})


def fewest_bands(nodes: list[str], joined: set[tuple[str, str]]) -> int:
    """By trying every first band, with the fewest of what is left."""

    def fits(side: list[str]) -> bool:
        return len(side) <= WIDEST_BAND and not any(p in joined for p in product(side, side))

    @cache
    def fewest(first: int) -> int:
        ends = (end for end in range(first + 1, len(nodes) + 1) if fits(nodes[first:end]))
        return min((1 + fewest(end) for end in ends), default=0)

    return fewest(0)


@given(
    layers=st.integers(TALL, TALL + 4),
    pairs=st.sets(st.tuples(st.integers(0, TALL + 3), st.integers(0, TALL + 3)), max_size=40),
)
@settings(max_examples=60, deadline=None)
def test_bands_are_as_few_as_can_be_and_no_edge_lies_in_one(layers, pairs):
    names = {f"m{low}->m{high}" for low, high in pairs if low < high < layers}
    names |= {f"input->m{layer}" for layer in range(layers)} | {"m0->logits"}
    edges = [(name, 1.0) for name in sorted(names)]
    bands = bands_of(edges)
    joined = {(edge.writer, edge.node) for edge in parse_edges(edges)}
    assert [*bands[0]] == ["input"] and [*bands[-1]] == ["logits"]
    for band in bands:
        assert not any(pair in joined for pair in product(band, band)) and len(band) <= WIDEST_BAND
    for below, above in pairwise(bands):
        assert max(map(row_of, below)) < min(map(row_of, above))
    assert len(bands) - 2 == fewest_bands([f"m{layer}" for layer in range(layers)], joined)


def test_rows_are_shared_in_tall_circuits_alone():
    low = lay_out(parse_edges(tower(TALL - 2, 3)))
    assert len(low.rows) == TALL and "mlp 3" in low.rows
    tall = lay_out(parse_edges(tower(TALL + 1, 3)))
    assert list(tall.rows)[:3] == ["embed", "mlp 0 - mlp 2", "mlp 3 - mlp 5"]
    assert list(tall.rows.values()) == sorted(tall.rows.values())
    for node, (_, y) in tall.nodes.items():
        label = next(each for each in tall.rows if abs(tall.rows[each] - y) < 1e-6)
        assert node in ("input", "logits") or label.startswith("mlp")
    assert tall.height < low.height / 2


def test_a_circuit_in_which_all_rows_are_joined_keeps_them():
    assert len(lay_out(parse_edges(tower(30))).rows) == 32


def test_labels_of_bands():
    assert band_label(["a5.h1", "m4", "a5.h0"]) == "mlp 4 - attn 5"
    assert band_label(["a5.h1", "a5.h0"]) == "attn 5"
    assert band_label(["a5.kv1", "a5.h0"]) == "k v 5 - attn 5"


@pytest.mark.parametrize(("layers", "legends"), [(3, 1), (30, 2), (60, 4)])
def test_each_page_of_a_tall_picture_has_a_legend(tmp_path, layers, legends):
    (svg,) = draw_circuit(tower(layers), tmp_path, formats=["svg"])
    assert svg.read_text().count("<!-- |score| -->") == legends


@pytest.mark.parametrize(
    ("inches", "pixels"), [((4, 2), (640, 320)), ((20, 60), (2000, 6000)), ((75, 3), (6000, 240))]
)
def test_a_png_has_at_most_6000_pixels_a_side(tmp_path, inches, pixels):
    save_figure(Figure(figsize=inches), [tmp_path / "a.png"])
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == pixels
