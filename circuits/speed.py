"""How many forwards the engine's work costs.

A *forward* is one plain forward of the same model on the same batch in the same run.  There are two denominators: the
TransformerLens bridge, and the bare HuggingFace module, which is cheaper.  The work and both denominators are timed in
turns, and each figure is the median over rounds, so that a slow moment of the machine falls on all alike.

Shapes: batch B, pos S.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from circuits.ablation import Ablation, AblationConfig, fit_ablation
from circuits.behaviour import prepare
from circuits.discovery import EAP, EAPIG, eap, eap_ig
from circuits.engine import Factored
from circuits.metrics import metric_named
from circuits.model import from_module
from circuits.prompts import Prompts, prompts_from_records
from circuits.selection import select


@dataclass(frozen=True)
class Shape:
    """A GPT-2-like model with random weights, and a batch."""

    name: str
    layers: int
    heads: int
    width: int
    vocabulary: int
    batch: int
    positions: int
    rounds: int


SHAPES = (
    Shape("2L4H", 2, 4, 64, 64, batch=32, positions=10, rounds=60),
    Shape("4L8H", 4, 8, 64, 64, batch=32, positions=10, rounds=40),
    Shape("GPT-2 small", 12, 12, 768, 50257, batch=8, positions=16, rounds=7),
)


@dataclass(frozen=True)
class Timing:
    """Median seconds of one piece of work, and its cost in forwards."""

    shape: str
    work: str
    seconds: float
    bridge_forwards: float
    module_forwards: float


def time_engine(shape: Shape, circuit_share: float = 0.02, seed: int = 0) -> list[Timing]:
    """Times masked runs, EAP, EAP-IG and scoring against a circuit that keeps a share of the edges."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=shape.layers, n_head=shape.heads, n_embd=shape.width, vocab_size=shape.vocabulary,
        n_positions=4 * shape.positions, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    module = GPT2LMHeadModel(config).eval()
    model = from_module(module)
    engine = Factored(model)
    prompts = _prompts(shape, seed)
    work = _work(engine, prompts, circuit_share)
    with torch.no_grad():
        work = {
            "bridge forward": lambda: model.bridge(prompts.clean),
            "module forward": lambda: module(prompts.clean),
            **work,
        }
        seconds: dict[str, list[float]] = {name: [] for name in work}
        for name in work:
            work[name]()  # warm up
        for _ in tqdm(range(shape.rounds), desc=shape.name, unit="round", disable=None):
            for name, run in work.items():
                started = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    bridge, bare = medians["bridge forward"], medians["module forward"]
    return [Timing(shape.name, name, value, value / bridge, value / bare) for name, value in medians.items()]


def _prompts(shape: Shape, seed: int) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(shape.vocabulary, (shape.batch, 2, shape.positions), generator=generator).tolist()
    records = [{"clean": c, "corrupt": x, "answers": [1], "wrong_answers": [2]} for c, x in tokens]
    return prompts_from_records(records, vocabulary=shape.vocabulary)


def _work(engine: Factored, prompts: Prompts, circuit_share: float) -> dict[str, Callable[[], Any]]:
    """Each piece of work, from prompts to result; masked runs start from clean and ablated values in hand."""
    metric, counterfactual = metric_named("logit_diff"), Ablation(AblationConfig("counterfactual"))
    behaviour = prepare(engine, prompts, metric, counterfactual)
    (batch,) = behaviour.batches
    generator = torch.Generator().manual_seed(1)
    half = (torch.rand(engine.graph.exists.shape, generator=generator) < 0.5).float()
    scores = torch.rand(engine.graph.exists.shape, generator=generator)
    circuit = select(engine.graph, scores, edges=max(1, round(circuit_share * engine.graph.n_edges))).float()
    mean = fit_ablation(AblationConfig("mean"), engine, prompts)
    kl = metric_named("kl")

    def score() -> torch.Tensor:
        reference = engine.logits(prompts.clean, positions=prompts.positions)
        logits = engine.masked(prompts.clean, circuit, mean.values(engine, prompts), positions=prompts.positions)
        return kl(logits, prompts, reference)

    return {
        "masked run, half of the edges": lambda: engine.masked(prompts.clean, half, batch.ablated),
        "masked run, scored positions only": lambda: engine.masked(
            prompts.clean, half, batch.ablated, positions=prompts.positions
        ),
        "EAP, all edges": lambda: eap(EAP(), prepare(engine, prompts, metric, counterfactual)),
        "EAP-IG, 5 steps": lambda: eap_ig(EAPIG(), prepare(engine, prompts, metric, counterfactual)),
        f"scoring, circuit of {circuit_share:.0%}": score,
    }
