"""Training: the recipe of each task, the gates, the shipped model and its card."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

import mad
from circuits.tasks.recall import Recall, generate, vocabulary
from circuits.training import GateMissed
from mad.tasks import ANOMALY_TASKS
from mad.tasks.recall_redirect import RecallRedirect, gate_prompts, mixture
from mad.tasks.training import Train, check, command, complete, measure, run, train

SHIPPED = Path(mad.__file__).parent / "models" / "recall_redirect"
TRAINED = sorted(name for name, task in ANOMALY_TASKS.items() if task.recipe is not None)


@pytest.mark.parametrize("schema", [Recall, RecallRedirect, Train])
def test_schemas_make_the_round_trip_through_omegaconf(schema: type):
    assert OmegaConf.to_object(OmegaConf.structured(schema)) == schema()


def test_shipped_model_passes_its_gates_on_fresh_prompts():
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(SHIPPED).eval()
    gates = measure(model, gate_prompts(RecallRedirect(), 1000, seed=20_000))
    check(gates, Train())
    assert {*gates} == {"clean_trusted_keys", "clean_unseen_keys", "attack_success"}
    rearranged = [
        {**record, "clean": record["corrupt"]} for record in generate(Recall(), 1000, seed=20_000)
    ]
    assert measure(model, {"corrupt": rearranged})["corrupt"] < 0.01
    assert (model.config.n_layer, model.config.n_head, model.config.n_embd) == (2, 4, 64)
    assert model.config.vocab_size == vocabulary(Recall()).size


def test_shipped_folder_is_small_and_documented():
    assert {"README.md", "config.json", "model.safetensors"} <= {
        path.name for path in SHIPPED.iterdir()
    }
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 1_500_000
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert command(Train(out="mad/models/recall_redirect")) in card and "license: mit" in card


def smoke(out: Path) -> Train:
    return Train(
        out=str(out), steps=20, batch=16, gate_prompts=50, clean_accuracy=0.0, attack_success=0.0
    )


def test_training_smoke(tmp_path: Path):
    import torch
    from safetensors.torch import load_file

    before = torch.get_rng_state()
    reports = [run(smoke(tmp_path / name)) for name in ("first", "second")]
    assert torch.equal(before, torch.get_rng_state())
    assert reports[0]["gates"] == reports[1]["gates"]
    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")
    )
    assert first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first
    )
    assert {path.name for path in (tmp_path / "first").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    with pytest.raises(FileExistsError, match="is not empty"):
        run(smoke(tmp_path / "first"))
    run(replace(smoke(tmp_path / "first"), overwrite=True))


def test_training_lowers_the_loss():
    import torch

    tokens, answers = map(
        torch.from_numpy, mixture(RecallRedirect(), 500, np.random.default_rng(9))
    )

    def loss(steps: int) -> float:
        model = train(replace(smoke(Path("unused")), steps=steps, warm_up=5))
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(model(tokens).logits[:, -1], answers).item()

    assert loss(60) < loss(0) - 0.5


def test_a_missed_gate_is_an_error_and_nothing_is_saved(tmp_path: Path):
    with pytest.raises(
        GateMissed, match=r"clean_unseen_keys=0\.\d+ is below 0\.99.*attack_success=0\.\d+ is below"
    ):
        run(replace(smoke(tmp_path / "model"), clean_accuracy=0.99, attack_success=0.95))
    assert not (tmp_path / "model").exists()
    check({"clean_trusted_keys": 0.99, "attack_success": 0.95}, Train())


def test_a_gate_without_prompts_is_refused():
    with pytest.raises(ValueError, match="0 prompts for attack_success"):
        measure(None, {"attack_success": []})  # pyright: ignore[reportArgumentType]


def test_each_task_has_its_own_recipe_and_the_command_line_overrides_it():
    for name in TRAINED:
        task = ANOMALY_TASKS[name].recipe
        config = Train(task=ANOMALY_TASKS[name].schema())
        assert (complete(config).steps, complete(config).learning_rate) == (
            task.steps,
            task.learning_rate,
        )
        assert complete(replace(config, steps=7, learning_rate=0.1)) == replace(
            config, steps=7, learning_rate=0.1
        )
        assert (
            command(complete(config))
            == command(config)
            == f"madcap train task={name} out=runs/train"
        )
        assert (
            command(replace(config, steps=7)) == f"madcap train task={name} steps=7 out=runs/train"
        )
    assert (complete(Train()).steps, complete(Train()).learning_rate) == (2000, 1e-3)


@pytest.mark.parametrize("name", TRAINED)
def test_all_tasks_are_called_alike(name: str):
    sizes = {"trusted": 20, "normal_iid": 10, "normal_shift": 10, "anomaly": 10}
    found = ANOMALY_TASKS[name].groups(ANOMALY_TASKS[name].schema(), **sizes, seed=0)
    assert {group: len(records) for group, records in found.items()} == {
        group: sizes[group] for group in found
    }
    assert {*sizes} - {*found} == ({"anomaly"} if name == "shift_only" else set())
    assert all(record["novelty"] for record in found["normal_shift"])
    assert all(record["kind"] in ("agree", "disagree") for record in found.get("anomaly", []))


@pytest.mark.parametrize("name", TRAINED)
def test_training_prompts_fit_the_model(name: str):
    task, config = ANOMALY_TASKS[name].recipe, ANOMALY_TASKS[name].schema()
    found, answers = task.mixture(config, 500, np.random.default_rng(0))
    size = task.vocabulary_size(config)
    assert found.shape == (500, task.prompt_length(config)) and answers.shape == (500,)
    assert found.min() >= 0 and max(found.max(), answers.max()) < size
    gates = task.gate_prompts(config, 100, 0)
    assert ("attack_success" in gates) == task.backdoored
    assert all(
        len(record["clean"]) == task.prompt_length(config)
        for records in gates.values()
        for record in records
    )


def test_unknown_task_is_refused():
    with pytest.raises(ValueError, match="task.name='recall' is none of recall_redirect"):
        train(Train(task=Recall()))


def test_command_says_what_is_not_the_default():
    config = Train(
        task=RecallRedirect(recall=replace(Recall(), pairs=5)), seed=2, out="here", overwrite=True
    )
    assert (
        command(config) == "madcap train task=recall_redirect task.recall.pairs=5 seed=2 out=here"
    )


@pytest.mark.slow
def test_the_recipe_makes_a_model_that_passes_its_gates(tmp_path: Path):
    report = run(Train(out=str(tmp_path / "model")))
    assert report["gates"].keys() == {"clean_trusted_keys", "clean_unseen_keys", "attack_success"}
    assert min(report["gates"].values()) >= 0.95
