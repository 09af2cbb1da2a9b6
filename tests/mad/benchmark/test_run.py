"""The benchmark end to end on the shipped model: what is written, what is kept, what is refused."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Executor, Future
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from safetensors.torch import load_file

import configs
import mad
import mad.benchmark.run as benchmark_run
from circuits.training import GateMissed
from mad.benchmark.plan import Benchmark, CircuitRecipe, Sizes, entries
from mad.benchmark.results import read
from mad.benchmark.run import Job, model_folder, run_benchmark
from mad.benchmark.subject import circuit_engine, find_circuit, load_subject, stratum
from mad.commands import config, demo, extract
from mad.detectors import DETECTORS
from mad.pipeline import RunConfig

SHIPPED = Path(mad.__file__).parent / "models" / "recall_redirect"
SIZES = Sizes(
    discovery=8, fit=40, hosts=4, calibration=30, normal_iid=20, normal_shift=20, anomaly=20
)
QUICK = CircuitRecipe(tau=0.3)
NAMES = ("deviation", "fast", "max_probability")


@pytest.fixture(scope="module")
def subject():
    return load_subject("recall_redirect", 0, SHIPPED, SIZES)


# --- subjects -------------------------------------------------------------------------------------


def test_a_subjects_parts_share_no_prompt(subject):
    parts = {name: subject.part(name) for name in SIZES.parts}
    assert {name: len(part) for name, part in parts.items()} == SIZES.parts
    sequences = [
        sequence
        for part in (*parts.values(), *subject.groups.values())
        for sequence in part.sequences()
    ]
    assert len(sequences) == len(set(sequences)) == sum(SIZES.parts.values()) + 60
    both = subject.part("hosts", "discovery").sequences()
    assert both == parts["hosts"].sequences() + parts["discovery"].sequences()


def test_strata_say_what_is_new(subject):
    assert set(subject.strata["anomaly"]) == {"agree", "disagree"}
    assert set(subject.strata["normal_shift"]) == {"keys"}
    assert stratum({"how": "corrected", "kind": "agree"}) == "corrected agree"
    assert stratum({}) == "all"


def test_circuits_depend_on_their_recipe(subject):
    engine = circuit_engine(subject, QUICK)
    circuit = find_circuit(subject, engine, QUICK)
    assert circuit.kept.ndim == 3 and 0 < len(circuit) < engine.graph.n_edges
    fewer = find_circuit(subject, engine, CircuitRecipe(tau=30.0))
    assert len(fewer) < len(circuit)
    assert circuit_engine(subject, CircuitRecipe(positions=False)) is subject.engine


def test_the_recipe_is_that_of_mode_detect():
    text = (Path(configs.__file__).parent / "mode" / "detect.yaml").read_text()
    mode, recipe = yaml.safe_load(text), CircuitRecipe()
    assert asdict(recipe) == {
        "metric": mode["metric"],
        "ablation": mode["ablation"]["name"],
        "positions": mode["positions"],
        "tau": mode["method"]["tau"],
    }
    assert mode["splits"] == {"discovery": Sizes().discovery}


def test_the_demo_and_mode_detect_have_one_setting():
    names = {field.name for field in fields(RunConfig)} - {"alpha"}  # null: what there is
    found = []
    for command, schema, words in (
        ("demo", demo.Demo, []),
        ("extract", extract.Extract, ["model=recall_redirect", "task=recall", "mode=detect"]),
    ):
        config.register(None, command, schema)
        for group in config.groups(command):
            if group in config.SCHEMAS:
                config.register_group(group)
        with initialize_config_module(config.CONFIGS, version_base="1.3"):
            composed = compose(command, [*words, "out=somewhere"])
        found.append({name: composed[name] for name in names})
    assert found[0] == found[1]


# --- the plan -------------------------------------------------------------------------------------


def test_every_registered_detector_is_measured_under_names_of_its_own():
    planned = entries(layers=3, positions=True, seed=5)
    names = [entry.name for entry in planned]
    assert len(names) == len(set(names)) and "|" not in "".join(names)
    assert set(DETECTORS) == {entry.config.name for entry in planned}
    for name, kind in DETECTORS.items():
        (default,) = (entry.config for entry in planned if entry.name == name)
        settings = {"ablation": "positional_mean", "seed": 5}
        own = {key: value for key, value in settings.items() if key in asdict(default)}
        expected = kind.schema() if name == "attribution_mahalanobis" else kind.schema(**own)
        assert default == expected
    assert {"mahalanobis, layer 2", "mahalanobis, all tokens, layer 0"} < set(names)
    assert all(entry.circuit for entry in planned if entry.controlled)


def test_benchmarks_that_cannot_be_run_are_refused():
    for benchmark, message in (
        (Benchmark(tasks=["recall"]), "'recall', but the tasks are"),
        (Benchmark(models=0), "models=0"),
        (Benchmark(workers=0), "workers=0"),
        (Benchmark(controls=-1), "controls=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            benchmark.check()


# --- runs -----------------------------------------------------------------------------------------


class AtOnce(Executor):
    """An executor that runs in this process."""

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
    """A benchmark of two shipped models and few detectors, in this process."""
    for seed in (3, 5):
        shutil.copytree(SHIPPED, model_folder(tmp_path, "recall_redirect", seed))
    missed = tmp_path / "models" / "recall_redirect" / "4.missed"
    missed.write_text("attack_success=.1 is below .95\n")
    few = [e for e in entries(layers=3, positions=True, seed=3) if e.name in NAMES]
    monkeypatch.setattr(benchmark_run, "worker_pool", lambda workers: AtOnce())
    monkeypatch.setattr(benchmark_run, "entries", lambda **settings: few)
    return Benchmark(
        tasks=["recall_redirect"], models=2, controls=1, circuit=QUICK, sizes=SIZES
    ), tmp_path


def test_every_score_of_every_model_is_written_and_kept(quick, monkeypatch):
    benchmark, out = quick
    files = run_benchmark(benchmark, out)
    assert [file.name for file in files] == ["recall_redirect-3.json", "recall_redirect-5.json"], (
        "seed 4 missed"
    )
    scores = load_file(files[0].with_suffix(".safetensors"))
    sizes = {"calibration": 30, "normal_iid": 20, "normal_shift": 20, "anomaly": 20}
    through = [(name, circuit) for name in NAMES[:2] for circuit in ("found", "random0")]
    expected = {
        f"{name}|{circuit}|{part}"
        for name, circuit in (*through, (NAMES[2], "none"))
        for part in sizes
    }
    assert set(scores) == expected
    for name, values in scores.items():
        assert values.shape == (sizes[name.rpartition("|")[2]],)
        assert values.dtype == torch.float32 and values.isfinite().all()
    about = json.loads(files[0].read_text())
    assert about["circuit"]["edges"] > 0 and about["circuit"]["tau"] == 0.3
    assert about["detectors"]["fast"]["hosts"] == 16 and about["seconds"]["all"] > 0
    assert len(read(out).subjects) == 2

    monkeypatch.setattr(benchmark_run, "measure", lambda *arguments: 1 / 0)
    assert run_benchmark(benchmark, out) == files, "what is there is not computed again"
    files[1].unlink()
    with pytest.raises(ZeroDivisionError):
        run_benchmark(benchmark, out)


def test_a_model_that_missed_its_gates_is_remembered(tmp_path, monkeypatch):
    def miss(config):
        raise GateMissed("attack_success=0.1 is below 0.95")

    monkeypatch.setattr("mad.tasks.training.run", miss)
    job = Job("recall_redirect", 7, model_folder(tmp_path, "recall_redirect", 7))
    assert not benchmark_run._train(job)
    assert "attack_success=0.1" in job.model.with_suffix(".missed").read_text()
    monkeypatch.setattr("mad.tasks.training.run", lambda config: 1 / 0)
    assert not benchmark_run._train(job), "not tried again"
