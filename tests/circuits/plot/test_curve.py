"""The faithfulness curve: drawn, the same each time, its legend never cut; what it refuses."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from circuits.plot import FaithfulnessCurve, RandomBand, draw_faithfulness_curve

CURVE = FaithfulnessCurve("EAP-IG", [0, 1, 10, 110], [0.0, 0.2, 0.9, 1.0])


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_faithfulness_curve_is_drawn_and_is_the_same_again(tmp_path, suffix):
    band = RandomBand([1, 10, 110], [-0.1, 0.0, 1.0], [0.1, 0.2, 1.0])
    options = {"random_band": band, "edges_total": 110, "title": "Faithfulness", "caption": "KL"}
    one = draw_faithfulness_curve([CURVE], tmp_path / f"one.{suffix}", **options)
    two = draw_faithfulness_curve([CURVE], tmp_path / f"two.{suffix}", **options)
    assert one.read_bytes() == two.read_bytes()
    if suffix == "svg":
        found = {element.get("id") for element in ElementTree.parse(one).iter()}
        assert {"curve:EAP-IG", "random band"} <= found


@pytest.mark.parametrize(
    "name", ["method", "a method with all of its settings, seed and ablation", "unbroken" * 20]
)
@pytest.mark.parametrize("count", [1, 18, 40])
def test_the_legend_beside_the_curves_is_not_cut(tmp_path, monkeypatch, name, count):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    curves = [
        FaithfulnessCurve(f"{name} {index}", CURVE.edges, CURVE.faithfulness)
        for index in range(count)
    ]
    draw_faithfulness_curve(
        curves, tmp_path / "curve.svg", random_band=RandomBand([1, 9], [0, 0], [0.1, 0.1])
    )
    (figure,) = drawn
    figure.draw_without_rendering()
    legend, axes = figure.legends[0].get_window_extent(), figure.axes[0].get_window_extent()
    assert 0 <= legend.y0 and legend.y1 <= figure.bbox.height and legend.x1 <= figure.bbox.width
    assert axes.x1 <= legend.x0
    assert axes.width > 150


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ([], "0 curves"),
        ([FaithfulnessCurve("ACDC", [1, 2], [0.1])], "2 edge counts but 1 values"),
        ([FaithfulnessCurve("ACDC", [1], [math.nan])], "value nan at 1 edges"),
        ([FaithfulnessCurve("ACDC", [-1], [0.5])], "at -1 edges"),
    ],
)
def test_faithfulness_curve_refusals(tmp_path, curves, message):
    with pytest.raises(ValueError, match=message):
        draw_faithfulness_curve(curves, tmp_path / "curve.svg")
