"""A tiny model with prompts that it answers, and circuits of it, for the tests of figures."""

from __future__ import annotations

import torch

from circuits.ablation import AblationConfig, fit_ablation
from circuits.circuit import Circuit
from circuits.discovery import EAPIG, Found, eap_ig
from circuits.engine import Engine
from circuits.faithfulness import FaithfulnessScale, faithfulness_scale
from circuits.metrics import METRICS
from circuits.objective import prepare
from circuits.prompts import Prompts, prompts_from_records
from circuits.selection import ranking
from tests import tiny

ENGINE = Engine(tiny.gpt2(n_embd=8, n_head=2))
GRAPH = ENGINE.graph
DISCOVERY, EVALUATION = (
    prompts_from_records(tiny.with_own_answers(ENGINE, tiny.records(12, seed, longest=7)))
    for seed in (1, 2)
)


def scale(prompts: Prompts = EVALUATION, metric: str = "logit_diff") -> FaithfulnessScale:
    fitted = fit_ablation(AblationConfig("counterfactual"), ENGINE, DISCOVERY)
    return faithfulness_scale(prepare(ENGINE, prompts, METRICS[metric], fitted))


def found(prompts: Prompts = DISCOVERY, metric: str = "logit_diff") -> Found:
    return eap_ig(EAPIG(), scale(prompts, metric).objective)


def circuit(edges: int = 20, metric: str = "logit_diff") -> Circuit:
    """What an extraction by EAP-IG would have found, with its word on how."""
    scores, absolute = found(metric=metric).scores, metric == "kl"
    about = {
        "method": {"name": "eap_ig", "steps": 5},
        "metric": metric,
        "ablation": {"name": "counterfactual", "seed": 0},
        "selection": {"how": "greedy", "edges": edges, "absolute": absolute},
    }
    kept = ranking(GRAPH, scores, absolute=absolute).circuit(edges)
    return Circuit(GRAPH, kept, scores, about)


def with_clear_answers(count: int, seed: int) -> Prompts:
    """Prompts whose answer is the model's first choice, against its last one."""
    records = []
    for record in tiny.records(count, seed, longest=7):
        tokens = tiny.from_tokens(torch.tensor([record["clean"]]))
        order = ENGINE.logits(tokens)[0, record["positions"]].argsort(descending=True)
        answers = {"answers": order[:, :1].tolist(), "wrong_answers": order[:, -1:].tolist()}
        records.append({**record, **answers})
    return prompts_from_records(records)
