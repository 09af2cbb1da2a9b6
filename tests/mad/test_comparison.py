"""`madcap compare`: runs side by side where their figures mean the same, else refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from circuits.files import read_json
from circuits.selection import Selection
from mad.commands.main import main
from mad.comparison import compared
from mad.pipeline import make_run
from tests.mad.test_scoring import records, run  # noqa: F401


@pytest.fixture
def pair(run, tmp_path):  # noqa: F811
    """Two runs that differ in how many edges they keep."""
    one = shutil.copytree(run[0] / "run", tmp_path / "large")
    config = replace(run[1], selection=Selection(edges=12), out=str(tmp_path / "small=1"))
    make_run(config)
    return one, Path(config.out)


def compare(*words) -> int:
    return main(["compare", *map(str, words)])


def refused(capsys, *words) -> str:
    capsys.readouterr()
    assert compare(*words) == 1
    error = capsys.readouterr().err
    assert error.startswith("madcap compare: error: ") and error.count("\n") == 1
    return error


def test_runs_are_put_side_by_side_with_their_figures(pair, tmp_path, capsys):
    assert compare(*pair, f"out={tmp_path / 'both'}") == 0
    shown = capsys.readouterr().out
    for folder, one in zip(pair, read_json(tmp_path / "both" / "compare.json"), strict=True):
        metrics = read_json(folder / "metrics.json")
        assert one["name"] == folder.name and folder.name in shown
        assert one["edges"] == metrics["edges_kept"] and f"{metrics['faithfulness']:.3f}" in shown
        assert one["faithfulness"]["kl"] == metrics["faithfulness"]
        assert one["cpr"] == metrics["areas"]["cpr"]["value"]
        assert (one["kl"], one["seconds"]) == (metrics["kl"], metrics["seconds"])
    text = (tmp_path / "both" / "compare.md").read_text()
    assert "| run | method | edges | kl | CPR | CMD | right | KL | s |" in text
    assert "counterfactual ablation, 16 prompts" in text
    drawn = (tmp_path / "both" / "compare.svg").read_text()
    for folder in pair:
        assert f'id="curve:{folder.name}"' in drawn and f'id="chosen:{folder.name}"' in drawn
    assert 'id="random band"' in drawn


def test_paths_may_stand_alone_or_in_a_list(pair, tmp_path, capsys):
    assert compare(*pair) == 0
    alone = capsys.readouterr().out
    assert main(["compare", f"runs=['{pair[0]}','{pair[1]}']"]) == 0
    assert capsys.readouterr().out == alone
    assert not (tmp_path / "both").exists()


def test_a_comparison_is_not_overwritten_unless_that_is_wanted(pair, tmp_path, capsys):
    out = f"out={tmp_path / 'both'}"
    assert compare(*pair, out) == 0
    assert "holds compare.json already" in refused(capsys, *pair, out)
    assert compare(*pair, out, "overwrite=true") == 0


def changed(path: Path, change) -> None:
    data = read_json(path)
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "metrics.json",
            lambda data: data["faithfulness_detail"].update(metric="logit_diff"),
            "(metric kl and logit_diff), so that their figures cannot be compared; measure all",
        ),
        (
            "metrics.json",
            lambda data: data["faithfulness_detail"].update(ablation="mean"),
            "(ablation counterfactual and mean)",
        ),
        (
            "circuit.json",
            lambda data: data["splits"]["evaluation"].update(hash="0" * 64),
            "and 000000000000...)",
        ),
        (
            "circuit.json",
            lambda data: data["model"].update(weight_hash="1" * 64),
            "and 111111111111...), so that their figures cannot be compared; compare runs of one",
        ),
        ("metrics.json", lambda data: data.pop("kl"), "metrics.json lacks 'kl'; extract again"),
        ("metrics.json", lambda data: data.update(curve=3), "metrics.json cannot be read"),
    ],
)
def test_runs_that_were_measured_otherwise_are_refused(pair, capsys, file, change, message):
    changed(pair[1] / file, change)
    assert message in refused(capsys, *pair)


def test_evaluations_make_runs_alike_that_were_not(pair, capsys):
    changed(pair[1] / "metrics.json", lambda d: d["faithfulness_detail"].update(metric="prob_diff"))
    assert "metric kl and prob_diff" in refused(capsys, *pair)
    for folder in pair:
        words = ["random_draws=2", "knockouts=0", "minimality=0", "redraws=0", "ablation=mean"]
        assert main(["evaluate", f"circuit={folder}", *words]) == 0
    runs = compared(pair)
    assert {(one.conditions.metric, one.conditions.ablation) for one in runs} == {("kl", "mean")}
    told = read_json(pair[0] / "evaluation.json")
    assert runs[0].faithfulness["kl"] == told["faithfulness"]
    assert told["faithfulness"] != read_json(pair[0] / "metrics.json")["faithfulness"]
    changed(pair[0] / "evaluation.json", lambda data: data.update(circuit="another"))
    assert "evaluation.json cannot be read (it was measured of another circuit" in refused(
        capsys, *pair
    )


def test_what_is_no_run_is_refused(pair, tmp_path, capsys):
    assert "1 run to compare; give at least 2 run folders" in refused(capsys, pair[0])
    assert "no circuit at" in refused(capsys, pair[0], tmp_path / "nowhere")
    (pair[0] / "metrics.json").unlink()
    assert "no " in refused(capsys, *pair) and not (tmp_path / "compare.json").exists()
