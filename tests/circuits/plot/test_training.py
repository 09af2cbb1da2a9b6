"""The picture of a mask's training: drawn, the same each time; what it refuses."""

from __future__ import annotations

import json
import math
from xml.etree import ElementTree

import pytest

from circuits.plot import TrainingPoint, draw_training
from mad.commands.main import main

POINTS = [TrainingPoint(step, 2.0 / (step + 1), step / 10, 900.0 / (step + 1)) for step in range(9)]


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_training_is_drawn_and_is_the_same_again(tmp_path, suffix):
    options = {"edges_kept": 120, "title": "Training", "caption": "of batches"}
    one = draw_training(POINTS, tmp_path / f"one.{suffix}", **options)
    two = draw_training(POINTS, tmp_path / f"two.{suffix}", **options)
    assert one.read_bytes() == two.read_bytes()
    if suffix == "svg":
        found = {element.get("id") for element in ElementTree.parse(one).iter()}
        panels = {f"training:{name}" for name in ("loss", "faithfulness", "edges")}
        assert panels | {"edges kept"} <= found


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (POINTS[:1], "1 steps of training make no curve"),
        ([*POINTS, TrainingPoint(9, math.nan, 0.0, 1.0)], "values must be finite"),
        ([*POINTS, TrainingPoint(9, 1.0, 0.0, 0.0)], "edges above 0"),
    ],
)
def test_what_is_no_training_is_refused(tmp_path, points, message):
    with pytest.raises(ValueError, match=message):
        draw_training(points, tmp_path / "training.svg")


def test_a_run_by_a_learned_mask_is_drawn_with_its_training(tmp_path, capsys):
    run = tmp_path / "run"
    words = ["model=recall_redirect", "task=recall", "method=ugs", "method.steps=40", "mode=smoke"]
    assert main(["extract", *words, "selection.edges=20", f"out={run}"]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert len(metrics["method"]["training"]) == 40
    assert main(["plot", f"circuit={run}"]) == 0
    assert (run / "training.png").stat().st_size > 10_000
    assert str(run / "training.svg") in capsys.readouterr().out
    metrics["method"]["training"][3].pop("loss")
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert main(["plot", f"circuit={run}"]) == 1
    assert "metrics.json lacks 'loss'" in capsys.readouterr().err
