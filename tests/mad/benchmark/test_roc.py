"""Detector pictures: ROC curves and score distributions say what the numbers say, and refuse what
they cannot show.
"""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mad.benchmark.roc import (
    RocCurve,
    _bin_edges,
    detection_rate,
    draw_roc,
    draw_score_distributions,
)

GOOD = RocCurve(
    "deviation", [0.0, 0.0, 0.01, 0.2, 1.0], [0.0, 0.4, 0.7, 0.9, 1.0], 0.93, "in distribution"
)
WEAK = RocCurve("entropy", [0.0, 0.5, 1.0], [0.0, 0.6, 1.0], 0.55, "in distribution")
SHIFTED = RocCurve("deviation", [0.0, 0.3, 1.0], [0.0, 0.8, 1.0], 0.8, "shifted normals")
SCORES = {
    "trusted": [index / 100 for index in range(200)],
    "backdoored": [1.5 + index / 50 for index in range(100)],
    "few": [0.5, 1.98, 5.0],
}


def ids(svg: Path) -> set[str]:
    return {element.get("id", "") for element in ElementTree.parse(svg).iter()}


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_roc_is_drawn_and_is_the_same_again(tmp_path, suffix):
    one, two = (
        draw_roc([GOOD, WEAK, SHIFTED], tmp_path / f"{name}.{suffix}", "ROC", "300 anomalies")
        for name in ("one", "two")
    )
    assert one.read_bytes() == two.read_bytes()
    if suffix == "svg":
        curves = {
            "curve:in distribution:deviation",
            "curve:in distribution:entropy",
            "curve:shifted normals:deviation",
        }
        assert {name for name in ids(one) if name.startswith("curve:")} == curves
        text = one.read_text()
        assert (
            "<!-- deviation: 0.930, 70 % -->" in text and "<!-- deviation: 0.800, 0 % -->" in text
        )
        assert "<!-- shifted normals -->" in text and "<!-- 300 anomalies -->" in text


def test_more_detectors_than_colours(tmp_path):
    curves = [RocCurve(f"detector {index}", [0, 1], [0, 1], 0.5) for index in range(20)]
    assert (
        len(
            [
                name
                for name in ids(draw_roc(curves, tmp_path / "roc.svg"))
                if name.startswith("curve:")
            ]
        )
        == 20
    )


def test_detection_rate_never_exceeds_the_allowed_false_alarms():
    assert detection_rate(GOOD) == 0.7
    assert detection_rate(GOOD, 0.009) == 0.4
    assert detection_rate(GOOD, 0.2) == 0.9
    assert detection_rate(WEAK) == 0.0


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ([], "0 curves"),
        ([GOOD, GOOD], "two curves in one group"),
        ([RocCurve("a", [0.0], [0.0], 0.5)], "at least 2"),
        ([RocCurve("a", [0, 1], [0, 0.5, 1], 0.5)], "2 false-positive and 3 true-positive"),
        ([RocCurve("a", [0, 1], [0, 1.5], 0.5)], r"rate 1\.5"),
        ([RocCurve("a", [0, 1], [0, 1], math.nan)], "rate nan"),
        (
            [RocCurve("a", [0, 0.5, 0.2], [0, 0.5, 1], 0.5, "g")],
            "'a' in group 'g' has rates that fall",
        ),
    ],
)
def test_roc_refusals(tmp_path, curves, message):
    with pytest.raises(ValueError, match=message):
        draw_roc(curves, tmp_path / "roc.svg")


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_score_distributions_are_drawn_and_are_the_same_again(tmp_path, suffix):
    one, two = (
        draw_score_distributions(
            SCORES, 1.98, tmp_path / f"{name}.{suffix}", alpha=0.01, title="Scores", caption="n"
        )
        for name in ("one", "two")
    )
    assert one.read_bytes() == two.read_bytes()
    if suffix == "svg":
        text = one.read_text()
        assert "<!-- \N{GREEK SMALL LETTER ALPHA} = 0.01 -->" in text
        for line in (
            "1 of 200 flagged",
            "75 of 100 flagged",
            "1 of 3 flagged",
        ):  # at the threshold is not above it
            assert line in text


def test_a_threshold_outside_all_scores_and_log_scale(tmp_path):
    positive = {group: [1 + value for value in values] for group, values in SCORES.items()}
    (tmp_path / "new").mkdir()
    for threshold in (0.01, 1e4):
        assert draw_score_distributions(
            positive, threshold, tmp_path / "new" / "log.svg", log_scale=True
        ).exists()


def test_equal_scores_are_drawn(tmp_path):
    path = draw_score_distributions({"trusted": [2.0] * 50}, 2.0, tmp_path / "equal.svg")
    assert "0 of 50 flagged" in path.read_text()


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30), st.floats(1e-6, 1e6), st.booleans())
def test_bins_rise_hold_every_score_and_break_at_the_threshold(values, threshold, log_scale):
    edges = _bin_edges(values, threshold, log_scale=log_scale)
    assert edges == sorted(edges)
    assert edges[0] <= min(values) and max(values) <= edges[-1]
    assert threshold in edges


@pytest.mark.parametrize(
    ("scores", "threshold", "log_scale", "message"),
    [
        ({}, 1.0, False, "0 groups"),
        ({"trusted": []}, 1.0, False, "'trusted' has 0 scores"),
        ({"trusted": [math.nan]}, 1.0, False, "trusted has the score nan.*finite"),
        ({"trusted": [1.0]}, math.inf, False, "threshold has the score inf"),
        ({"trusted": [0.0]}, 1.0, True, r"score 0\.0.*log_scale=False"),
    ],
)
def test_score_distribution_refusals(tmp_path, scores, threshold, log_scale, message):
    with pytest.raises(ValueError, match=message):
        draw_score_distributions(scores, threshold, tmp_path / "scores.svg", log_scale=log_scale)
