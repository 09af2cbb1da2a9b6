"""Train a transformer until a program's circuit is its circuit, check that it is, and save it.

`abstraction.ground_truth.losses` says what is minimised; the checks are the gates of
`abstraction.ground_truth.trained`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from abstraction.ground_truth.losses import LOSSES, cross_entropies, setting_of
from abstraction.ground_truth.native import attention_direction, boot
from abstraction.ground_truth.program import Program
from abstraction.ground_truth.trained import (
    GATES,
    Trained,
    TrainedTruth,
    edge_effects,
    measure,
    objectives,
    wanted,
)
from circuits.engine import Engine
from circuits.model.load import LoadedModel, from_bridge
from circuits.training import check_gates, fit, gate_table, model_card, require_empty, table

UNEMBEDDING = 0.1  # of the usual size: the first logits are near uniform


def train(config: TrainedTruth, *, gates: bool = True) -> Trained:
    """Returns the trained model, with its measured gates.

    The caller's random state is left as it was.

    Raises:
        GateMissed: a gate was missed, unless `gates` is false.
        ValueError: an unknown program, one that does not fit, or an unused edge that it lacks.
    """
    setting = setting_of(config, initial_model(config))
    weights = {name: getattr(config, name) for name in LOSSES if getattr(config, name) > 0}
    early = {name: weight for name, weight in weights.items() if name in ("behaviour", "edges")}
    if not early:
        raise ValueError(
            "behaviour=0, edges=0, but training starts with these losses; give one a weight above 0"
        )

    def losses(step: int) -> dict[str, Tensor]:
        now = early if step < config.alone * config.steps else weights
        found = cross_entropies(setting, [LOSSES[name](setting) for name in now])
        return {name: now[name] * loss for name, loss in zip(now, found, strict=True)}

    bridge = setting.engine.model.bridge.requires_grad_()
    fit(
        bridge.parameters(),
        losses,
        config.steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warm_up=config.warm_up,
        clip=config.clip,
        label=f"train {config.program}",
    )
    trained = Trained(config, from_bridge(bridge, path=config.program), {})
    trained = replace(trained, gates=measure(trained, prompts=config.gate_prompts))
    if gates:
        check_gates(trained.gates, GATES, config.steps)
    return trained


def run(config: TrainedTruth, out: str, *, overwrite: bool = False) -> Trained:
    """Train, check the gates, and save: weights, their configuration, a report and a model card.

    Raises:
        FileExistsError: `out` is not empty and `overwrite` is false.
        GateMissed: a gate was missed; nothing is saved.
        ValueError: as `train`.
    """
    from safetensors.torch import save

    folder = require_empty(out, overwrite=overwrite)
    started = time.process_time()
    trained = train(config)
    report = {
        "config": asdict(config),
        "nodes": dict(trained.nodes),
        "edges": list(trained.edges),
        "gates": {name: round(value, 4) for name, value in trained.gates.items()},
        "processor_seconds": round(time.process_time() - started, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformer_lens": version("transformer-lens"),
    }
    weights = trained.model.bridge.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    saved = save({name: tensor.contiguous() for name, tensor in weights.items()})
    (folder / "model.safetensors").write_bytes(saved)
    contents = {"model.config.json": shape(config, trained.program), "config.json": report}
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(trained, report), encoding="utf-8")
    return trained


def initial_model(config: TrainedTruth) -> LoadedModel:
    """Returns a model with random weights, drawn with the seed of `config`."""
    if config.d_model % config.heads:
        sizes = f"d_model={config.d_model} is not a multiple of heads={config.heads}"
        raise ValueError(f"{sizes}; change one of them")
    bridge = boot(shape(config, wanted(config).program))
    embedding, unembedding = config.embedding_std, UNEMBEDDING * float(config.d_model) ** -0.5
    std = {"embed.weight": embedding, "pos_embed.weight": embedding, "unembed.weight": unembedding}
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for name, weight in bridge.state_dict().items():
            if weight.ndim > 1:  # biases are 0 and norms 1 already
                drawn = torch.randn(weight.shape, generator=generator)
                weight.copy_(std.get(name, float(weight.shape[-1]) ** -0.5) * drawn)
    return from_bridge(bridge, path=config.program)


def shape(config: TrainedTruth, program: Program) -> dict[str, Any]:
    """Returns the fields of the TransformerLens configuration."""
    return {
        "architecture": "TransformerLensNative",
        "n_layers": config.layers,
        "n_heads": config.heads,
        "d_model": config.d_model,
        "d_head": config.d_model // config.heads,
        "d_mlp": config.d_mlp,
        "n_ctx": program.length,
        "d_vocab": len(program.tokens),
        "act_fn": "gelu",
        "normalization_type": "LN",
        "eps": 1e-5,
        "attention_dir": attention_direction(program.causal),
    }


# ---- model card ----------------------------------------------------------------------------------


def card(trained: Trained, report: Mapping[str, Any]) -> str:
    """The README.md: what the model computes, its circuit, how it was made, what it reached."""
    config = trained.config
    parameters = sum(parameter.numel() for parameter in trained.model.bridge.parameters())
    return model_card(
        f"{config.program}: a trained transformer whose circuit is known",
        f"A TransformerLens native model with {config.layers} layers, {config.heads} heads, width "
        f"{config.d_model}, LayerNorm\nand GELU, {parameters} parameters, trained from random "
        "weights until the circuit of a program was its circuit.\nIt is a test object for circuit "
        "discovery, fit for nothing else.",
        {
            "What it computes": _computing(trained),
            "Its circuit": _circuit(trained, report),
            "How it was made": _making(config, report),
            "What it reached": "On fresh inputs; `abstraction/ground_truth/trained.py` says what "
            f"each gate means.\n\n{gate_table(report['gates'], GATES)}",
        },
        library="transformer_lens",
        tags=["interpretability", "circuits", "ground-truth", "test-object"],
    )


def _computing(trained: Trained) -> str:
    program = trained.program
    (example,) = trained.records(1, trained.config.seed)
    clean = " ".join(program.tokens[token] for token in example["clean"])
    answer = " ".join(program.tokens[token] for (token,) in example["answers"])
    return (
        f"`abstraction.ground_truth.programs.{trained.config.program}`: for example `{clean}` "
        f"gives `{answer}`.\nPrompts are token ids; the tokens are "
        f"`{'` `'.join(program.tokens)}`, in this order."
    )


def _circuit(trained: Trained, report: Mapping[str, Any]) -> str:
    name, found = trained.config.program, edge_effects(trained, objectives(trained))
    effects = table(("edge", "KL"), ((edge, f"{effect:.2f}") for edge, effect in found.items()))
    unused = "\n".join(
        f"`{edge}` is read by the program, but no valid input needs it; it is left out.\n"
        for edge in trained.config.unused
    )
    return (
        f"{table(('variable', 'lives in'), report['nodes'].items())}\n\n"
        f"It has {len(found)} of the model's {Engine(trained.model).graph.n_edges} edges. KL, in "
        "nats, is what removing each\none alone does to the answers, with its value on another "
        "input in its place, or nothing where the program reads the\nposition alone.\n\n"
        f"{effects}\n{unused}\n"
        "    from abstraction.ground_truth.trained import load_trained\n"
        f'    trained = load_trained("{name}")\n'
        "    trained.model, trained.program, trained.nodes, trained.edges, "
        "trained.records(64, seed=0)"
    )


def _making(config: TrainedTruth, report: Mapping[str, Any]) -> str:
    return (
        "    from abstraction.ground_truth.trained import TRUTHS\n"
        "    from abstraction.ground_truth.training import run\n"
        f'    run(TRUTHS["{config.program}"], "{config.program}")\n\n'
        f"{config.steps} steps with {config.batch} inputs for each loss, seed {config.seed}:\n"
        f"{report['processor_seconds']} s of processor time (threads: {report['threads']}), with "
        f"torch {report['torch']} and\ntransformer-lens {report['transformer_lens']}. The same "
        "versions, seed and number of threads give the same model.\nAll settings are in "
        "`config.json`.\n\n"
        "The losses are the answer, in the whole model and with random parts of what is outside "
        "the circuit removed, and later\nalso interchange interventions on all nodes (Geiger et "
        "al. 2022, arXiv 2112.00826; Gupta et al. 2024, arXiv 2407.14494).\n"
        "`abstraction/ground_truth/training.py` has them in full."
    )
