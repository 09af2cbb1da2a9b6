"""SmolLM2 by the engine, by discovery, and from end to end as its user would have it."""

from __future__ import annotations

import json

import pytest
import torch

import circuits
from circuits.ablation import fit_ablation
from circuits.discovery import METHODS
from circuits.faithfulness import faithfulness_scale, under_each_metric
from circuits.metrics import metric_named
from circuits.objective import prepare
from circuits.prompts import Prompts
from circuits.selection import random_circuits, ranking
from circuits.tasks.greater_than import GreaterThan
from circuits.tasks.ioi import Ioi
from mad.commands.main import main
from tests.real.smollm2 import folder

pytestmark = pytest.mark.real

TEXT = (
    "The lighthouse keeper climbed the stairs every evening, as his father had done before him. "
    "One night the lamp would not light, and he sent his daughter down to the village for oil.",
    "Water boils at 100 degrees Celsius at sea level; on a mountain it boils at less.",
    "def area(width, height):\n    return width *",
)
EDGES = 300


@pytest.fixture(scope="module")
def model():
    if not folder().is_dir():
        pytest.skip("the model is not here; `python -m tests.real.smollm2` fetches it")
    return circuits.load_model(folder())


@pytest.fixture(scope="module")
def engine(model):
    return circuits.Engine(model)


def test_the_engine_is_the_huggingface_module_on_real_text(model, engine):
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32).eval()
    prompts = model.prompts([{"text": text} for text in TEXT])
    everywhere = Prompts.from_tokens(prompts.clean, lengths=prompts.lengths)
    ours = engine.logits(everywhere)
    with torch.no_grad():
        theirs = module(prompts.clean, attention_mask=prompts.key_mask.long()).logits
    real = prompts.key_mask
    assert torch.equal(ours[real].argmax(-1), theirs[real].argmax(-1))
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-4, atol=1e-3)


def test_the_whole_graph_is_the_model_and_has_as_many_edges_as_are_known(model, engine):
    assert engine.graph.n_edges == 70_651
    prompts = model.prompts(_records(model, Ioi(), 4))
    ablation = fit_ablation(circuits.AblationConfig("counterfactual"), engine, prompts)
    masked = engine.masked(prompts, engine.graph.exists, ablation.values(engine, prompts))
    torch.testing.assert_close(masked, engine.logits(prompts), rtol=1e-4, atol=1e-3)


def test_it_finds_indirect_objects(model, engine):
    prompts = model.prompts(_records(model, Ioi(), 128))
    difference = metric_named("logit_diff")(engine.logits(prompts), prompts)
    assert (difference > 0).float().mean() > 0.97
    assert 4 < difference.mean() < 5.5


def test_it_knows_which_year_comes_later(model, engine):
    prompts = model.prompts(_records(model, GreaterThan(), 64))
    assert metric_named("prob_diff")(engine.logits(prompts), prompts).mean() > 0.45


def test_eap_ig_beats_random_circuits_of_its_size(model, engine):
    prompts = model.prompts(_records(model, Ioi(), 32))
    parts = prompts.split({"discovery": 16, "evaluation": 16}, seed=0)
    kl = metric_named("kl")
    ablation = fit_ablation(circuits.AblationConfig("counterfactual"), engine, parts["discovery"])
    objective = prepare(engine, parts["discovery"], kl, ablation)
    scores = METHODS["eap_ig"].run(circuits.EAPIG(), objective).scores
    kept = ranking(engine.graph, scores, absolute=True).circuit(EDGES)
    scale = faithfulness_scale(prepare(engine, parts["evaluation"], kl, ablation))
    found = under_each_metric(scale.objective, kept)
    chance = scale.measure_each(random_circuits(engine.graph, EDGES, 3, seed=0), "random")
    assert found["kl"].circuit.mean() > chance.mean(-1).max() + 0.1  # oriented: nats, negated
    assert found["logit_diff"].circuit.mean() > found["logit_diff"].empty.mean() + 0.3


def test_from_extraction_to_scores_by_the_command_line(tmp_path):
    run, lines, scored = tmp_path / "run", tmp_path / "new.jsonl", tmp_path / "scored.jsonl"
    few = "splits={discovery:8,evaluation:8,fit:16,calibration:20}"
    words = [f"model={folder()}", "task=ioi", "method=eap_ig", f"selection.edges={EDGES}", few]
    assert main(["extract", *words, "random_draws=0", f"out={run}"]) == 0
    circuit = circuits.Circuit.load(run)
    assert 0 < len(circuit) <= EDGES
    assert main(["plot", f"circuit={run}", "formats=[svg]"]) == 0
    assert (run / "circuit.svg").read_text().count('id="edge:') == len(circuit)
    texts = [
        "When Mary and John went to the park, John gave a ball to",
        "Then Paul and Kate were at the station. Kate decided to give a ring to",
        "Water boils at 100 degrees Celsius at sea level; on a mountain",
    ]
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    told = [f"circuit={run}", f"inputs={lines}", f"out={scored}", "alpha=0.05", "explain=none"]
    assert main(["score", *told]) == 0
    results = [json.loads(line) for line in scored.read_text().splitlines()]
    assert [set(result) >= {"score", "p_value", "anomalous"} for result in results] == [True] * 3
    assert results[2]["score"] > max(result["score"] for result in results[:2])


def _records(model, config, count: int) -> list[dict]:
    return circuits.tasks.TASKS[config.name].records(config, count, 0, model.tokenizer)
