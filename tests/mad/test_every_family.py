"""Every family goes through extract, plot and score from the command line."""

from __future__ import annotations

import json

import pytest

from circuits.circuit import Circuit
from circuits.engine import Engine
from circuits.model.load import ModelConfig, load_model
from circuits.prompts import write_jsonl
from mad.commands.main import main
from tests import tiny
from tests.published import PUBLISHED, small, write_checkpoint

FAMILIES = tuple(tiny.HUGGINGFACE)
QUICK = ("gpt2", "neox", "llama", "gemma3")  # between them all that families differ in
SPLITS = ["splits.discovery=16", "splits.evaluation=16", "splits.fit=16", "splits.calibration=24"]


def through(folder, words: list[str], inputs: list[dict]) -> tuple[Circuit, dict, list[dict]]:
    """The circuit, its metrics and the scored lines of one run of the three commands."""
    out, scored = str(folder / "run"), folder / "scored.jsonl"
    write_jsonl(inputs, folder / "inputs.jsonl")
    assert main(["extract", *words, "random_draws=3", f"out={out}"]) == 0
    assert main(["plot", f"circuit={out}"]) == 0
    code = main(
        [
            "score",
            f"circuit={out}",
            f"inputs={folder / 'inputs.jsonl'}",
            f"out={scored}",
            "alpha=0.05",
            "explain=all",
        ]
    )
    assert code == (3 if any(record.get("id") == "short" for record in inputs) else 0)
    for picture in ("circuit.svg", "circuit.png", "circuit.pdf", "curve.png"):
        assert (folder / "run" / picture).stat().st_size > 1000
    lines = [json.loads(line) for line in scored.read_text().splitlines()]
    return Circuit.load(out), json.loads((folder / "run" / "metrics.json").read_text()), lines


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def test_every_family_goes_through_the_commands(name, tmp_path):
    tiny.HUGGINGFACE[name]().save_pretrained(tmp_path / "model")
    metrics = goes_through(tmp_path)
    assert metrics["faithfulness"] > metrics["random_circuits"]["mean"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_configuration_goes_through_the_commands(name, tmp_path):
    write_checkpoint(tmp_path / "model", small(PUBLISHED[name]))
    goes_through(tmp_path)


def goes_through(folder) -> dict:
    """The metrics of the model in a folder, which has gone through the three commands."""
    engine = Engine(load_model(ModelConfig(path=str(folder / "model"))))
    records = tiny.with_own_answers(engine, tiny.records(90))
    write_jsonl(records[:80], folder / "trusted.jsonl")
    words = [
        f"model={folder / 'model'}",
        f"task={folder / 'trusted.jsonl'}",
        "method=eap_ig",
        "metric=logit_diff",
        "ablation=mean",
        "selection.share=0.5",
        *SPLITS,
    ]
    circuit, metrics, lines = through(folder, words, records[80:])
    assert circuit.graph == engine.graph
    assert 0 < metrics["edges_kept"] <= round(0.5 * metrics["edges_total"])
    assert [line["id"] for line in lines] == [record["id"] for record in records[80:]]
    assert all(line["score"] > 0 and 0 < line["p_value"] <= 1 for line in lines)
    return metrics


def test_stories_goes_through_the_commands(cases, tmp_path):
    words = [
        f"model={cases / 'stories260K'}",
        "task=pronoun",
        "method=eap_ig",
        "selection.edges=80",
        *SPLITS,
    ]
    inputs = [{"text": "Once upon a time, there was a girl named Lily. She was sad, so"}]
    circuit, metrics, lines = through(tmp_path, words, inputs)
    assert 75 <= len(circuit) == metrics["edges_kept"] <= 80 and metrics["faithfulness"] > 0.5
    assert lines[0]["score"] > 0


@pytest.mark.parametrize("method", ["eap_ig", "acdc"])
def test_edges_per_position_go_through_the_commands(method, tmp_path):
    tiny.HUGGINGFACE["gpt2"](n_layer=1).save_pretrained(tmp_path / "model")
    engine = Engine(load_model(ModelConfig(path=str(tmp_path / "model"))), n_positions=4)
    records = tiny.with_own_answers(engine, tiny.records(90, shortest=4, longest=4))
    write_jsonl(records[:80], tmp_path / "trusted.jsonl")
    words = [
        f"model={tmp_path / 'model'}",
        f"task={tmp_path / 'trusted.jsonl'}",
        f"method={method}",
        "positions=true",
        "metric=logit_diff",
        "ablation=mean",
        *SPLITS,
    ]
    words += ["selection.share=0.5"] if method == "eap_ig" else ["method.tau=0.01"]
    circuit, metrics, lines = through(
        tmp_path, words, [*records[80:], {"clean": [1, 2, 3], "id": "short"}]
    )
    assert (
        circuit.graph == engine.graph
        and metrics["edges_total"] == 4 * Engine(engine.model).graph.n_edges
    )
    assert 0 < len(circuit) < metrics["edges_total"] and all(
        "@" in name for name, _ in circuit.edges
    )
    assert all(line["score"] > 0 for line in lines[:-1])
    assert "prompts of 3 tokens, but edges are told apart by position" in lines[-1]["error"]


def test_edges_per_position_need_prompts_of_one_length(tmp_path, capsys):
    tiny.HUGGINGFACE["gpt2"]().save_pretrained(tmp_path / "model")
    write_jsonl(tiny.records(80), tmp_path / "trusted.jsonl")
    words = [
        f"model={tmp_path / 'model'}",
        f"task={tmp_path / 'trusted.jsonl'}",
        "positions=true",
        *SPLITS,
    ]
    assert main(["extract", *words, f"out={tmp_path / 'run'}"]) == 1
    assert "positions=true, but the prompts have 4 to 9 tokens" in capsys.readouterr().err
