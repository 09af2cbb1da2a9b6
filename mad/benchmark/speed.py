"""How many forwards the engine's work costs, and how much memory a process with it takes.

A *forward* is one plain forward of the same model on the same batch in the same run.  There are two
denominators: the TransformerLens bridge, and the bare HuggingFace module, which is cheaper.  The
work and both denominators are timed in turns, and each figure is the median over rounds, so that a
slow moment of the machine falls on all alike.  Peak memory is that of a fresh process: Python,
torch, the model and the work on it.

Shapes: batch B, pos S.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from circuits.ablation import AblationConfig, fit_ablation
from circuits.discovery import ACDC, EAP, EAPIG, acdc, eap, eap_ig
from circuits.engine import Engine
from circuits.metrics import metric_named
from circuits.model.load import LoadedModel, from_module
from circuits.objective import prepare
from circuits.prompts import Prompts, prompts_from_records
from circuits.selection import select
from circuits.timing import seconds


@dataclass(frozen=True)
class Shape:
    """A model with random weights, and a batch."""

    name: str
    family: str
    layers: int
    heads: int
    width: int
    vocabulary: int
    batch: int
    positions: int
    rounds: int = 1
    kv_heads: int | None = None  # llama; None: as many as there are heads
    hidden: int | None = None  # width of the MLPs; None: four times the model's
    spread: float = 0.02  # standard deviation of the random weights
    sweep_share: float | None = None  # of ACDC, where a sweep is timed too


SHAPES = (
    Shape("2L4H", "gpt2", 2, 4, 64, 64, batch=32, positions=10, rounds=60, sweep_share=0.01),
    Shape("4L8H", "gpt2", 4, 8, 64, 64, batch=32, positions=10, rounds=40),
    Shape("GPT-2 small", "gpt2", 12, 12, 768, 50257, batch=8, positions=16, rounds=7),
    # Three of its 16 layers and few words, so that it is layers of these widths that are timed.
    Shape(
        "Llama 1B, 3 layers",
        "llama",
        3,
        32,
        2048,
        4096,
        batch=4,
        positions=32,
        rounds=3,
        kv_heads=8,
        hidden=8192,
    ),
)
LARGE_BATCH = Shape(
    "GPT-2 small", "gpt2", 12, 12, 768, 50257, batch=32, positions=64
)  # its peak memory is measured


@dataclass(frozen=True)
class Timing:
    """Median seconds of one piece of work, and its cost in forwards."""

    shape: str
    work: str
    seconds: float
    bridge_forwards: float
    module_forwards: float


def time_engine(shape: Shape, circuit_share: float = 0.02, seed: int = 0) -> list[Timing]:
    """Times masked runs, EAP, EAP-IG, ACDC where the shape says so, and scoring against a circuit
    with a share of the edges.
    """
    module, model = random_model(shape, seed)
    engine = Engine(model)
    prompts = random_prompts(shape, seed)
    work = _work(shape, engine, prompts, circuit_share)
    with torch.no_grad():
        work = {
            "bridge forward": lambda: model.bridge(prompts.clean),
            "module forward": lambda: module(prompts.clean),
            **work,
        }
        times: dict[str, list[float]] = {name: [] for name in work}
        for name in work:
            work[name]()  # warm up
        for _ in tqdm(range(shape.rounds), desc=shape.name, unit="round", disable=None):
            for name, run in work.items():
                times[name].append(seconds(engine.device, run, repeats=1))
    medians = {name: statistics.median(values) for name, values in times.items()}
    bridge, bare = medians["bridge forward"], medians["module forward"]
    return [
        Timing(shape.name, name, value, value / bridge, value / bare)
        for name, value in medians.items()
    ]


@dataclass(frozen=True)
class Peak:
    """The most memory that a process takes, from its start."""

    shape: str
    work: str
    megabytes: float


def peak_of_eap(shape: Shape = LARGE_BATCH, *, memory: str = "2GB") -> Peak:
    """Runs EAP with counterfactual ablation in a fresh process."""
    code = (
        f"from mad.benchmark.speed import {Shape.__name__}, _eap_here; "
        f"print(_eap_here({shape!r}, {memory!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    work = f"EAP, {shape.batch} prompts of {shape.positions} tokens, memory={memory}"
    return Peak(shape.name, work, int(done.stdout) / 1e6)


def _eap_here(shape: Shape, memory: str) -> int:
    """The peak of this process, in bytes, after EAP."""
    engine = Engine(random_model(shape, seed=0)[1])
    prompts = random_prompts(shape, seed=0)
    ablation = fit_ablation(AblationConfig("counterfactual"), engine, prompts)
    eap(EAP(), prepare(engine, prompts, metric_named("logit_diff"), ablation, memory=memory))
    return peak_bytes()


def peak_bytes() -> int:
    """The most memory that this process has taken so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: what getrusage says of a child starts from what its parent took
        return next(
            1024 * int(line.split()[1])
            for line in status.read_text().splitlines()
            if line.startswith("VmHWM")
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def random_model(shape: Shape, seed: int) -> tuple[Any, LoadedModel]:
    """A HuggingFace model with random weights, and the same wrapped."""
    from transformers import GPT2LMHeadModel, LlamaForCausalLM

    family: Any = LlamaForCausalLM if shape.family == "llama" else GPT2LMHeadModel
    with torch.random.fork_rng(devices=[]):  # of the CPU; wrapping draws weights, too
        torch.manual_seed(seed)
        module = family(_config(shape)).eval()
        return module, from_module(module)


def _config(shape: Shape) -> Any:
    from transformers import GPT2Config, LlamaConfig

    context, hidden = 4 * shape.positions, shape.hidden or 4 * shape.width
    if shape.family == "llama":
        return LlamaConfig(
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            hidden_size=shape.width,
            intermediate_size=hidden,
            vocab_size=shape.vocabulary,
            max_position_embeddings=context,
            initializer_range=shape.spread,
        )
    return GPT2Config(
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.width,
        n_inner=hidden,
        vocab_size=shape.vocabulary,
        n_positions=context,
        initializer_range=shape.spread,
        bos_token_id=0,
        eos_token_id=0,
    )


def random_prompts(shape: Shape, seed: int) -> Prompts:
    """Random tokens, another row of them as each one's corrupt prompt, scored at the last."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(
        shape.vocabulary, (shape.batch, 2, shape.positions), generator=generator
    ).tolist()
    records = [{"clean": c, "corrupt": x, "answers": [1], "wrong_answers": [2]} for c, x in tokens]
    return prompts_from_records(records, vocabulary=shape.vocabulary)


def _work(
    shape: Shape, engine: Engine, prompts: Prompts, circuit_share: float
) -> dict[str, Callable[[], Any]]:
    """Each piece of work, from prompts to result; masked runs start from clean and ablated values
    in hand.
    """
    metric = metric_named("logit_diff")
    counterfactual = fit_ablation(AblationConfig("counterfactual"), engine, prompts)
    everywhere = Prompts.from_tokens(prompts.clean)
    objective = prepare(engine, prompts, metric, counterfactual)
    (batch,) = objective.batches.kept
    generator = torch.Generator().manual_seed(1)
    half = (torch.rand(engine.graph.exists.shape, generator=generator) < 0.5).float()
    scores = torch.rand(engine.graph.exists.shape, generator=generator)
    circuit = select(
        engine.graph, scores, edges=max(1, round(circuit_share * engine.graph.n_edges))
    ).float()
    mean = fit_ablation(AblationConfig("mean"), engine, prompts)
    kl = metric_named("kl")

    def score() -> torch.Tensor:
        reference = engine.logits(prompts)
        logits = engine.masked(prompts, circuit, mean.values(engine, prompts))
        return kl(logits, prompts, reference)

    def transplant(hosts: int) -> list[torch.Tensor]:
        ablated = engine.ablated(engine.writers(prompts))
        runs = []
        for row in (number % len(prompts) for number in range(hosts)):
            host = prompts.select([row] * len(prompts))
            logits = engine.masked(host, circuit, ablated)
            runs.append(kl(logits, prompts, batch.clean.logits[row].expand_as(logits)))
        return runs

    sweep = {}
    if shape.sweep_share is not None:
        config = ACDC(share=shape.sweep_share)
        objective_kl = prepare(engine, prompts, kl, counterfactual)
        kept = acdc(config, objective_kl).kept
        assert kept is not None, "ACDC decides itself"
        name = f"ACDC, {int(kept.sum())} of {engine.graph.n_edges} edges kept"
        sweep[name] = lambda: acdc(config, prepare(engine, prompts, kl, counterfactual))
    return {
        "masked run, half of the edges": lambda: engine.masked(everywhere, half, batch.ablated),
        "masked run, scored positions only": lambda: engine.masked(prompts, half, batch.ablated),
        "EAP, all edges": lambda: eap(EAP(), prepare(engine, prompts, metric, counterfactual)),
        "EAP-IG, 5 steps": lambda: eap_ig(
            EAPIG(), prepare(engine, prompts, metric, counterfactual)
        ),
        **sweep,
        f"output deviation, circuit of {circuit_share:.0%}": score,
        f"transplant into 16 prompts, circuit of {circuit_share:.0%}": lambda: transplant(16),
    }
