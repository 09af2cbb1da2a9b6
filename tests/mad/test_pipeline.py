"""Run folders: what is written, what is refused, and that a circuit knows its weights."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import yaml

from circuits.discovery import ACDC, EAPIG, AtPStar
from circuits.prompts import write_jsonl
from circuits.tasks.file import File
from mad.calibration import fit, sequence_hashes
from mad.detector import Context
from mad.detectors import Deviation, Mahalanobis
from mad.folder import open_run
from mad.pipeline import make_run
from mad.saved_detector import load_detector
from mad.trusted import trusted_splits
from tests import tiny
from tests.mad.test_scoring import records, run  # noqa: F401


def test_a_run_folder_holds_what_was_promised(run):  # noqa: F811
    folder, config = run
    out = folder / "run"
    metrics = json.loads((out / "metrics.json").read_text())
    assert {
        "edges_total",
        "edges_kept",
        "faithfulness",
        "kl",
        "seconds",
        "forwards",
        "curve",
        "scoring",
    } <= set(metrics)
    circuit = json.loads((out / "circuit.json").read_text())
    assert circuit["format"] == 1 and len(circuit["edges"]) == metrics["edges_kept"]
    assert circuit["metric"] == "kl" and circuit["ablation"]["name"] == "counterfactual"
    written = yaml.safe_load((out / "config.yaml").read_text())
    assert written["seed"] == 0 and written["made_with"]["torch"] == torch.__version__
    splits = json.loads((out / "splits.json").read_text())
    assert {name: len(hashes) for name, hashes in splits.items()} == dataclasses.asdict(
        config.splits
    )
    together = [hashed for hashes in splits.values() for hashed in hashes]
    assert len(together) == len(set(together))
    assert not [path for path in out.rglob("*") if path.suffix in (".pkl", ".pt", ".bin")]


def test_the_same_configuration_gives_the_same_files(run, tmp_path):  # noqa: F811
    folder, config = run
    make_run(dataclasses.replace(config, out=str(tmp_path / "again")))
    for name in (
        "circuit.json",
        "scores.safetensors",
        "splits.json",
        "detector/fast/detector.safetensors",
    ):
        assert (tmp_path / "again" / name).read_bytes() == (folder / "run" / name).read_bytes(), (
            name
        )


def test_a_folder_in_use_is_refused(run, tmp_path):  # noqa: F811
    folder, config = run
    with pytest.raises(FileExistsError, match="overwrite=true"):
        make_run(config)
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no madcap run"):
        make_run(dataclasses.replace(config, out=str(tmp_path), overwrite=True))
    assert (tmp_path / "letters.txt").read_text() == "mine"


def test_other_weights_are_refused_with_both_hashes(run, tmp_path):  # noqa: F811
    folder, _ = run
    tiny.scaled_up(tiny.gpt2_module(), seed=9).save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"made on weights \w{16}\.\.\., but this model has \w{16}"
    ):
        open_run(folder / "run", model=str(tmp_path / "other"))
    attacked = open_run(folder / "run", model=str(tmp_path / "other"), allow_other_weights=True)
    with pytest.raises(ValueError, match="the detector fast was made on weights"):
        attacked.detector("fast")
    assert attacked.detector("fast", allow_other_weights=True).calibration.scores.shape == (16,)


def test_a_missing_detector_names_those_that_are_there(run):  # noqa: F811
    folder, _ = run
    with pytest.raises(FileNotFoundError, match="detector=fast"):
        open_run(folder / "run").detector("mahalanobis")


def test_overlapping_splits_are_refused(run):  # noqa: F811
    folder, config = run
    again = open_run(folder / "run")
    splits = trusted_splits(config.task, again.model, config.splits, config.seed)
    context = Context(again.engine, again.circuit)
    with pytest.raises(ValueError, match="both the fit and the calibration"):
        fit(Mahalanobis(), context, splits["fit"], splits["fit"], used={})
    message = "16 prompts of the calibration split are in the circuit's discovery split"
    for found_on in (splits["discovery"], sequence_hashes(splits["discovery"])):
        used = {"discovery": found_on}
        with pytest.raises(ValueError, match=message):
            fit(Mahalanobis(), context, splits["fit"], splits["discovery"], used=used)


def test_what_the_circuit_was_found_on_has_to_be_said(run):  # noqa: F811
    folder, config = run
    again = open_run(folder / "run")
    splits = trusted_splits(config.task, again.model, config.splits, config.seed)
    parts = splits["fit"], splits["calibration"]
    with pytest.raises(ValueError, match="used=None, but prompts .* or used={} if there were none"):
        fit(Mahalanobis(), Context(again.engine, again.circuit), *parts)
    fitted = fit(Mahalanobis(), Context(again.engine), *parts)
    assert fitted.score(splits["evaluation"]).isfinite().all()


def test_few_prompts_are_split_in_proportion_and_anomalies_refused(run, tmp_path):  # noqa: F811
    folder, config = run
    model = open_run(folder / "run").model
    write_jsonl(records(28, 4), tmp_path / "few.jsonl")
    few = dataclasses.replace(config, task=File(path=str(tmp_path / "few.jsonl")))
    assert [
        len(part) for part in trusted_splits(few.task, model, few.splits, few.seed).values()
    ] == [7, 7, 4, 7]
    write_jsonl(records(3, 4), tmp_path / "few.jsonl")
    with pytest.raises(ValueError, match="3 different trusted prompts"):
        trusted_splits(few.task, model, few.splits, few.seed)
    write_jsonl([{**record, "label": 1} for record in records(60, 4)], tmp_path / "few.jsonl")
    with pytest.raises(ValueError, match="labelled anomalous"):
        trusted_splits(few.task, model, few.splits, few.seed)


def test_detector_files_that_are_none_are_refused(run, tmp_path):  # noqa: F811
    from mad.detector import Context

    folder, _ = run
    again = open_run(folder / "run")
    (tmp_path / "fast").mkdir()
    for text, message in (
        ("{", "no detector file"),
        ('{"format": 9, "config": {}, "weight_hash": ""}', "format 9"),
    ):
        (tmp_path / "fast" / "detector.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_detector(
                tmp_path / "fast",
                Context(again.engine, again.circuit),
                weight_hash=again.model.weight_hash,
            )


def test_a_detector_knows_its_circuit(run, tmp_path):  # noqa: F811
    import shutil

    folder, _ = run
    shutil.copytree(folder / "run", tmp_path / "run")
    path = tmp_path / "run" / "circuit.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "edges": data["edges"][:-1]}))
    with pytest.raises(ValueError, match="was calibrated on circuit"):
        open_run(tmp_path / "run").detector("fast")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 2.0}, "alpha=2.0"),
        ({"memory": "2GiB"}, "memory='2GiB' is no number of bytes"),
        ({"detector": Deviation(deviation="l2")}, "deviation='l2'"),
    ],
)
def test_bad_settings_are_refused_before_any_work(run, tmp_path, changes, message):  # noqa: F811
    _, config = run
    with pytest.raises(ValueError, match=message):
        make_run(dataclasses.replace(config, out=str(tmp_path / "new"), **changes))
    assert not (tmp_path / "new").exists()


def test_a_failed_run_leaves_the_old_one_whole(run, tmp_path):  # noqa: F811
    import shutil

    folder, config = run
    shutil.copytree(folder / "run", tmp_path / "run")
    missing = dataclasses.replace(config.model, path=str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError):
        make_run(
            dataclasses.replace(config, model=missing, out=str(tmp_path / "run"), overwrite=True)
        )
    assert open_run(tmp_path / "run").detector("fast")
    with pytest.raises(ValueError, match="device='gpu' cannot be used here"):
        make_run(
            dataclasses.replace(
                config,
                model=dataclasses.replace(config.model, device="gpu"),
                out=str(tmp_path / "b"),
            )
        )


def test_a_circuit_that_says_nothing_is_said_to(run, tmp_path, caplog):  # noqa: F811
    _, config = run
    everything = dataclasses.replace(config.selection, edges=75)
    whole = dataclasses.replace(
        config, selection=everything, accept_worse=True, out=str(tmp_path / "all")
    )
    with pytest.raises(ValueError, match="75 of 75 edges: nothing is off it.*selection.edges"):
        make_run(whole)
    assert "all 75 edges are kept" in caplog.text
    for changes, message in (
        ({"selection": dataclasses.replace(config.selection, edges=0)}, "edges=0"),
        ({"random_draws": -1}, "random_draws=-1"),
        ({"exact_sample": 1}, "exact_sample=1"),
        ({"method": AtPStar(), "metric": "kl"}, "metric=kl has zero gradient"),
        ({"method": EAPIG(), "metric": "accuracy"}, "metric=accuracy has no gradient"),
        ({"method": EAPIG(rule="lrp")}, "rule='lrp'"),
        ({"method": ACDC()}, "decides itself"),
    ):
        with pytest.raises(ValueError, match=message):
            make_run(dataclasses.replace(config, out=str(tmp_path / "new"), **changes))
    assert not (tmp_path / "new").exists()
