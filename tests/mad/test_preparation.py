"""What is refused before a circuit is looked for, the dry check, and runs that are cut short."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest

import circuits.extraction as extraction_module
import mad.pipeline as pipeline_module
from circuits.ablation import AblationConfig
from circuits.circuit import Circuit
from circuits.prompts import write_jsonl
from circuits.tasks.file import File
from mad.calibration import Calibration
from mad.commands.main import main
from mad.detectors import Mahalanobis
from mad.folder import open_run
from mad.pipeline import make_run
from mad.preparation import smallest_alpha, usable_alpha
from tests.mad.test_scoring import records, run  # noqa: F401


def no_work(*_, **__):
    raise AssertionError("the work was begun")


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def old(run, tmp_path):  # noqa: F811
    """A good run, a configuration that would replace it, and what is in it."""
    shutil.copytree(run[0] / "run", tmp_path / "run")
    config = dataclasses.replace(run[1], out=str(tmp_path / "run"), overwrite=True)
    return tmp_path / "run", config, files(tmp_path / "run")


# ---- alpha ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibration", [1, 9, 16, 19, 98, 99, 100, 300])
def test_alpha_is_usable_iff_calibration_says_so(calibration, caplog):
    import torch

    scores = Calibration.of(torch.arange(float(calibration)))
    smallest = smallest_alpha(calibration)
    for alpha in (0.01, 0.05, 0.1, 0.5, smallest, smallest - 2e-4):
        if scores.problem(alpha) is None:
            assert usable_alpha(alpha, calibration, "splits") == alpha
        else:
            with pytest.raises(ValueError, match=f"raise alpha to {smallest:g}"):
                usable_alpha(alpha, calibration, "splits")
    assert scores.problem(smallest) is None
    assert 0 <= smallest - 1 / (calibration + 1) < 1e-4 + 1e-12
    usual = usable_alpha(None, calibration, "splits")
    assert math.isclose(usual, max(0.01, smallest)) and bool(caplog.text) == (calibration < 99)


def test_an_alpha_that_calibration_cannot_serve_is_refused_before_discovery(old, monkeypatch):
    folder, config, before = old
    monkeypatch.setattr(pipeline_module, "extract", no_work)
    message = r"alpha=0.01 needs at least 99 calibration inputs, but there will be 16 \(splits"
    with pytest.raises(ValueError, match=message + ".*raise alpha to 0.0589"):
        make_run(dataclasses.replace(config, alpha=0.01))
    assert files(folder) == before and not folder.with_name("run.partial").exists()


def test_the_usual_alpha_is_only_warned_of(run, tmp_path, caplog):  # noqa: F811
    make_run(dataclasses.replace(run[1], alpha=None, out=str(tmp_path / "new")))
    assert "alpha=0.01 needs at least 99 calibration inputs" in caplog.text
    assert "alpha: 0.0589" in (tmp_path / "new" / "config.yaml").read_text()


def test_fit_refuses_an_alpha_before_it_fits(run, tmp_path, capsys, monkeypatch):  # noqa: F811
    write_jsonl(records(40, 77), tmp_path / "trusted.jsonl")
    circuit, trusted = f"circuit={run[0] / 'run'}", f"trusted={tmp_path / 'trusted.jsonl'}"
    monkeypatch.setattr("mad.calibration.fit", no_work)
    assert main(["fit", circuit, trusted, "detector=token_count", "alpha=0.01"]) == 1
    error = capsys.readouterr().err
    assert (
        "alpha=0.01 needs at least 99 calibration inputs, but there will be 20 (fit_share)" in error
    )
    assert not (run[0] / "run" / "detector" / "token_count").exists()


# ---- what can be refused at once -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "loss"}, "metric='loss', but the metrics are"),
        ({"ablation": AblationConfig("noise")}, "ablation='noise', but the ablations are"),
        (
            {"task": File(path="BARE.jsonl"), "metric": "logit_diff"},
            "metric logit_diff needs answers",
        ),
        ({"task": File(path="BARE.jsonl")}, "ablation=counterfactual needs a corrupt twin"),
        ({"positions": True, "task": File(path="MIXED.jsonl")}, "prompts have 5 to 6 tokens"),
        ({"alpha": 0.001}, "alpha=0.001 needs at least 999"),
    ],
)
def test_a_request_that_makes_no_sense_costs_nothing(old, tmp_path, monkeypatch, changes, message):
    folder, config, before = old
    bare = [{"clean": record["clean"]} for record in records(60, 0)]
    write_jsonl(bare, tmp_path / "BARE.jsonl")
    mixed = [dict(r, clean=r["clean"][:5], corrupt=r["corrupt"][:5]) for r in records(20, 9)]
    write_jsonl([*records(40, 0), *mixed], tmp_path / "MIXED.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline_module, "extract", no_work)
    with pytest.raises(ValueError, match=message):
        make_run(dataclasses.replace(config, **changes))
    assert files(folder) == before and not folder.with_name("run.partial").exists()


def test_out_is_tried_before_the_work(run, tmp_path, monkeypatch, capsys):  # noqa: F811
    (tmp_path / "file").touch()
    monkeypatch.setattr(pipeline_module, "prepare_run", no_work)
    with pytest.raises(OSError):
        make_run(dataclasses.replace(run[1], out=str(tmp_path / "file" / "new")))


def test_room_on_the_disk_is_tried_before_the_work(old, monkeypatch):
    folder, config, before = old
    monkeypatch.setattr(pipeline_module, "extract", no_work)
    write = Path.write_bytes

    def full(self, data):
        if self.name == "reserved":
            assert len(data) > 4 * 75
            raise OSError(28, "No space left on device", str(self))
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device"):
        make_run(config)
    assert files(folder) == before and not folder.with_name("run.partial").exists()


# ---- runs that are cut short ---------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_a_circuit_is_on_the_disk_before_it_is_measured(old, monkeypatch, error):
    folder, config, before = old

    def cut_short(*_, **__):
        raise error("cut short")

    monkeypatch.setattr(extraction_module, "figures", cut_short)
    with pytest.raises(error, match="cut short"):
        make_run(config)
    partial = folder.with_name("run.partial")
    assert files(folder) == before
    assert Circuit.load(partial).edges == Circuit.load(folder).edges
    assert {path.name for path in partial.iterdir()} == {"circuit.json", "scores.safetensors"}
    monkeypatch.undo()
    shutil.rmtree(folder)
    with pytest.raises(FileExistsError, match="holds what an interrupted run had found"):
        make_run(dataclasses.replace(config, overwrite=False))
    make_run(config)
    assert open_run(folder).detector() and not partial.exists()


def unfit(*given, **named):
    raise ValueError("no ground to fit on")


def test_a_detector_that_cannot_be_fitted_keeps_the_circuit(run, tmp_path, monkeypatch):  # noqa: F811
    config = dataclasses.replace(run[1], out=str(tmp_path / "a"))
    monkeypatch.setattr("mad.pipeline.fit", unfit)
    with pytest.raises(ValueError, match=rf"the circuit is saved in {tmp_path / 'a'}, but its"):
        make_run(config)
    assert Circuit.load(tmp_path / "a").edges == Circuit.load(run[0] / "run").edges
    assert not open_run(tmp_path / "a").detectors


def test_but_not_in_place_of_a_run_that_has_one(old, monkeypatch):
    folder, config, before = old
    monkeypatch.setattr("mad.pipeline.fit", unfit)
    with pytest.raises(ValueError, match=r"the circuit is saved in .*run\.partial, but its"):
        make_run(config)
    assert files(folder) == before and open_run(folder.with_name("run.partial")).circuit


def test_a_run_that_is_replaced_leaves_what_is_the_users(old):
    folder, config, before = old
    (folder / "scored.jsonl").write_text("mine")
    (folder / "circuit.svg").write_text("of the old circuit")
    make_run(dataclasses.replace(config, detector=Mahalanobis()))
    assert open_run(folder).detectors == ["mahalanobis"]
    assert (folder / "scored.jsonl").read_text() == "mine"
    assert not (folder / "circuit.svg").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["run"]


# ---- the dry check -------------------------------------------------------------------------------


def words(run, tmp_path) -> list[str]:  # noqa: F811
    folder, config = run
    splits = dataclasses.asdict(config.splits)
    return [
        "extract",
        f"model={folder / 'model'}",
        f"task={folder / 'trusted.jsonl'}",
        "method=eap_ig",
        "metric=kl",
        *(f"splits.{name}={size}" for name, size in splits.items()),
        f"out={tmp_path / 'new'}",
        "check=true",
    ]


def test_a_dry_check_tells_what_would_be_run_on_and_leaves_nothing(
    run,  # noqa: F811
    tmp_path,
    capsys,
    monkeypatch,
):
    monkeypatch.setattr(pipeline_module, "extract", no_work)
    assert main([*words(run, tmp_path), "alpha=0.2"]) == 0
    told = capsys.readouterr().out
    weights = json.loads((run[0] / "run" / "circuit.json").read_text())["model"]["weight_hash"]
    for part in (
        f"{run[0] / 'model'}, weights {weights[:16]}",
        "75 edges",
        "16 discovery, 16 evaluation, 8 fit, 16 calibration",
        "6 to 6 in a prompt",
        "0.2; calibration allows 0.0589 or more",
        "nothing was run or written",
    ):
        assert part in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("alpha=0.01", "alpha=0.01 needs at least 99 calibration inputs"),
        ("metric=loss", "metric='loss'"),
        ("out=TAKEN", "is in use"),
        ("memory=lots", "memory='lots'"),
        ("splits.discovery=0", "discovery=0, but a part needs at least 1 prompt"),
    ],
)
def test_a_dry_check_refuses_what_the_run_would(run, tmp_path, capsys, word, message):  # noqa: F811
    (tmp_path / "TAKEN").mkdir()
    (tmp_path / "TAKEN" / "a").touch()
    word = word.replace("TAKEN", str(tmp_path / "TAKEN"))
    assert main([*words(run, tmp_path), word]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# ---- the usual detector --------------------------------------------------------------------------


def test_score_takes_the_only_detector(run, tmp_path, capsys):  # noqa: F811
    make_run(dataclasses.replace(run[1], detector=Mahalanobis(), out=str(tmp_path / "run")))
    write_jsonl([{"clean": record["clean"]} for record in records(3, 5)], tmp_path / "in.jsonl")
    score = ["score", f"circuit={tmp_path / 'run'}", f"inputs={tmp_path / 'in.jsonl'}", "alpha=0.2"]
    assert main([*score, f"out={tmp_path / 'a.jsonl'}"]) == 0
    assert main([*score, f"out={tmp_path / 'b.jsonl'}", "detector=mahalanobis"]) == 0
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    shutil.copytree(run[0] / "run" / "detector" / "fast", tmp_path / "run" / "detector" / "fast")
    assert open_run(tmp_path / "run").detector().detector.config.name == "fast"
    (tmp_path / "run" / "detector" / "fast").rename(tmp_path / "run" / "detector" / "strict")
    capsys.readouterr()
    assert main([*score, f"out={tmp_path / 'c.jsonl'}"]) == 1
    assert "has several detectors; choose detector=mahalanobis|strict" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "detector")
    assert main([*score, f"out={tmp_path / 'c.jsonl'}"]) == 1
    assert "no detector at" in capsys.readouterr().err
