"""The study end to end on the shipped model: what is written, what is kept, what is refused."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Executor, Future
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mad
import mad.study.run as study_run
from circuits.training import GateMissed
from mad.study.cells import read
from mad.study.lens import controls, find, look
from mad.study.plan import CONTROLLED, Recipe, Sizes, Study
from mad.study.subject import load_subject, rows, stratum

SHIPPED = Path(mad.__file__).parent / "models" / "recall_redirect"
SIZES = Sizes(
    discovery=8, fit=40, hosts=4, calibration=30, normal_iid=20, normal_shift=20, anomaly=20
)
QUICK = Recipe(tau=0.3)
NAMES = ("output_kl", "transplant")


@pytest.fixture(scope="module")
def subject():
    return load_subject("recall_redirect", 0, SHIPPED, SIZES)


def test_a_subjects_parts_share_no_prompt(subject):
    parts = [*subject.trusted.values(), *subject.groups.values()]
    sequences = [sequence for part in parts for sequence in part.sequences()]
    assert len(sequences) == len(set(sequences)) == SIZES.trusted + 60
    assert {name: len(part) for name, part in subject.trusted.items()} == {
        "discovery": 8,
        "fit": 40,
        "hosts": 4,
        "calibration": 30,
    }
    assert set(subject.strata["anomaly"]) == {"agree", "disagree"} and set(
        subject.strata["normal_shift"]
    ) == {"keys"}
    chosen = rows(subject.strata["anomaly"], "agree")
    assert [subject.strata["anomaly"][row] for row in chosen] == ["agree"] * len(chosen)
    assert (
        stratum({"how": "corrected", "kind": "agree"}) == "corrected agree" and stratum({}) == "all"
    )


def test_circuits_depend_on_their_recipe_and_nothing_else(subject):
    mask = find(subject, QUICK)
    assert (
        torch.equal(mask, find(subject, QUICK))
        and mask.ndim == 3
        and 0 < int(mask.sum()) < mask.numel()
    )
    assert find(subject, Recipe(by_position=False, tau=0.3)).ndim == 2
    others = [
        Recipe(tau=0.3, **change)
        for change in ({"bootstrap": 1}, {"prompts": 4}, {"ablation": "mean"})
    ]
    assert len({other.name for other in others} | {QUICK.name}) == 4
    assert any(not torch.equal(mask, find(subject, other)) for other in others)
    lens = look(subject, QUICK, mask)
    assert lens.departure(subject.groups["anomaly"]) is lens.departure(subject.groups["anomaly"])
    for control in controls(lens, 2):
        assert (
            control.mask.shape == mask.shape
            and abs(int(control.mask.sum()) - int(mask.sum())) <= 20
        )
        assert not torch.equal(control.mask, mask)


class AtOnce(Executor):
    """An executor that runs in this process."""

    def __init__(self, *arguments, **options) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass

    def submit(self, function, /, *arguments) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:  # noqa: BLE001
            future.set_exception(error)
        return future


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A study of two shipped models under one recipe, in this process."""
    for seed in (3, 5):
        shutil.copytree(SHIPPED, study_run.model_folder(tmp_path, "recall_redirect", seed))
    (tmp_path / "models" / "recall_redirect" / "4.missed").write_text(
        "attack_success=.1 is below .95\n"
    )
    monkeypatch.setattr(study_run, "ProcessPoolExecutor", AtOnce)
    monkeypatch.setattr(study_run, "plan", lambda subject: iter([(QUICK, NAMES, True)]))
    monkeypatch.setattr(study_run, "CONTROLLED", NAMES)
    return Study(tasks=["recall_redirect"], models=2, controls=1, workers=1, sizes=SIZES), tmp_path


def test_every_score_of_every_model_is_written_and_kept(quick, monkeypatch):
    study, out = quick
    files = study_run.run_study(study, out)
    assert [file.name for file in files] == ["recall_redirect-3.json", "recall_redirect-5.json"], (
        "seed 4 missed"
    )
    scores = load_file(files[0].with_suffix(".safetensors"))
    for name in NAMES:
        for circuit in (QUICK.name, f"random0 of {QUICK.name}"):
            for part, size in (
                ("calibration", 30),
                ("normal_iid", 20),
                ("normal_shift", 20),
                ("anomaly", 20),
            ):
                values = scores[f"{name}|{circuit}|{part}"]
                assert (
                    values.shape == (size,)
                    and values.dtype == torch.float32
                    and values.isfinite().all()
                )
    about = json.loads(files[0].read_text())
    assert about["circuits"][QUICK.name]["edges"] > 0 and about["seconds"]["all"] > 0
    assert len(read(out).subjects) == 2

    monkeypatch.setattr(study_run, "measure", lambda *arguments: 1 / 0)
    assert study_run.run_study(study, out) == files, "what is there is not computed again"
    files[1].unlink()
    with pytest.raises(ZeroDivisionError):
        study_run.run_study(study, out)


def test_a_model_that_missed_its_gates_is_remembered(tmp_path, monkeypatch):
    def miss(config):
        raise GateMissed("attack_success=0.1 is below 0.95")

    monkeypatch.setattr("mad.tasks.training.run", miss)
    folder = study_run.model_folder(tmp_path, "recall_redirect", 7)
    assert not study_run._train("recall_redirect", 7, folder)
    assert "attack_success=0.1" in folder.with_suffix(".missed").read_text()
    monkeypatch.setattr("mad.tasks.training.run", lambda config: 1 / 0)
    assert not study_run._train("recall_redirect", 7, folder), "not tried again"


def test_the_plan_has_no_circuit_twice_and_controls_where_all_is_computed(subject):
    planned = list(study_run.plan(subject))
    names = [recipe.name for recipe, _, _ in planned]
    assert len(names) == len(set(names)) and sum(full for _, _, full in planned) == 2
    assert all(set(CONTROLLED) <= set(scores) for _, scores, full in planned if full)


def test_studies_that_cannot_be_run_are_refused():
    for changes, message in (
        ({"tasks": ["recall"]}, "'recall', but the tasks are"),
        ({"models": 0}, "models=0"),
        ({"workers": 0}, "workers=0"),
        ({"controls": -1}, "controls=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            Study(**changes).check()
