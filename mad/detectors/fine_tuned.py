"""KL(model || a copy fine-tuned on trusted prompts), averaged over scored positions, nats.

The copy learns to give the model's own first choice on trusted prompts; weight decay moves it off
what these do not need.  It needs no circuit.

Shapes: prompts B, positions S, scored positions P, vocabulary V.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.batches import over_batches
from circuits.engine import Engine
from circuits.files import refuse_not_finite
from circuits.metrics import METRICS
from circuits.model.huggingface import quietly
from circuits.model.load import local_path
from circuits.prompts import NONE, Prompts
from circuits.training import fit as train
from mad.detector import Context
from mad.detectors.settings import check_at_least_one


@dataclass
class FineTuned:
    """How far the model is from a copy that was fine-tuned on trusted prompts."""

    name: str = "fine_tuned_kl"
    steps: int = 200  # of AdamW, on all weights
    batch: int = 64  # prompts in each, drawn without replacement
    learning_rate: float = 3e-3
    weight_decay: float = 0.1  # moves the copy off what trusted prompts do not need
    seed: int = 0  # of the batches

    def check(self) -> None:
        """Raises ValueError when a number is out of range."""
        check_at_least_one(self, "batch")
        for name in ("steps", "learning_rate", "weight_decay"):
            if (value := vars(self)[name]) < 0:
                raise ValueError(f"{name}={value}, but it must be at least 0")


@dataclass(frozen=True)
class FineTunedDetector:
    """A model and its copy."""

    config: FineTuned
    engine: Engine
    tuned: Any  # a HuggingFace model
    circuit = None
    scores_under = None

    def score(self, prompts: Prompts, *, memory: str = "2GB") -> Float[Tensor, "B"]:
        """How far the model is from the copy."""
        return over_batches(
            self._score,
            self.engine,
            prompts,
            lambda size: 3 * size.plain,  # two runs, and their metric
            memory=memory,
        )

    @torch.no_grad()
    def _score(self, prompts: Prompts) -> Float[Tensor, "B"]:
        logits = logits_of(self.tuned, prompts)
        return METRICS["kl"](logits, prompts, self.engine.logits(prompts)).float().cpu()

    def state(self) -> dict[str, Tensor]:
        """The copy's weights; tied ones once."""
        return dict(self.tuned.named_parameters())


def fit_fine_tuned(
    config: FineTuned, context: Context, trusted: Prompts, *, memory: str = "2GB"
) -> FineTunedDetector:
    """Returns the detector; there is no dropout, and the random state is left as it was.

    A step of training takes its batch at once, whatever `memory` is.

    Raises:
        ValueError: the model did not come from a HuggingFace folder, or a setting is out of range.
    """
    config.check()
    engine = context.engine
    tuned, prompts = _copy(engine), trusted.to(engine.device)
    generator = torch.Generator().manual_seed(config.seed)

    def losses(step: int) -> dict[str, Float[Tensor, ""]]:
        rows = torch.randperm(len(prompts), generator=generator)[: config.batch]
        batch = prompts.select(rows)
        wanted = engine.logits(batch).argmax(-1).masked_fill(batch.positions < 0, NONE)  # [B, P]
        logits = logits_of(tuned, batch).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, wanted.flatten(), ignore_index=NONE)
        return {"cross-entropy": loss}

    train(
        tuned.parameters(),
        losses,
        config.steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(0.9, 0.999),
    )
    return FineTunedDetector(config, engine, tuned.requires_grad_(False))


def restore_fine_tuned(
    config: FineTuned, context: Context, state: Mapping[str, Tensor], *, memory: str = "2GB"
) -> FineTunedDetector:
    """Returns a saved detector; the model's own folder says what the copy is made like.

    Raises:
        ValueError: the model did not come from a HuggingFace folder.
    """
    config.check()
    tuned = _copy(context.engine).requires_grad_(False)
    for name, weight in tuned.named_parameters():
        if state[name].shape != weight.shape or not state[name].is_floating_point():
            raise TypeError(f"{name} is {state[name].dtype} of shape {tuple(state[name].shape)}")
        refuse_not_finite(name, state[name])
        weight.copy_(state[name])
    return FineTunedDetector(config, context.engine, tuned)


def _copy(engine: Engine) -> Any:
    """The model, read once more from its folder and not wrapped; in evaluation mode."""
    from transformers import AutoModelForCausalLM

    model = engine.model
    if model.hf_config is None or model.head is not None:
        raise ValueError(
            f"model.path={model.path!r} is no HuggingFace language model with its own unembedding, "
            "so that no copy of it can be fine-tuned; leave fine_tuned_kl out"
        )
    try:
        with torch.random.fork_rng(devices=[]), quietly():
            copy: Any = AutoModelForCausalLM.from_pretrained(
                str(local_path(model.path)), local_files_only=True, dtype=engine.dtype
            )
    except OSError as error:
        raise ValueError(
            f"model.path={model.path!r} is no HuggingFace folder to read a copy from; save the "
            "model and load it with load_model"
        ) from error
    return copy.to(engine.device).eval()


def logits_of(model: Any, prompts: Prompts) -> Float[Tensor, "B P V"]:
    """A HuggingFace model's logits at the scored positions; absent ones give those of position 0.

    All families that are read from HuggingFace are causal, so that padding on the right needs no
    mask; with one, a padding token whose window holds nothing but padding is NaN and spoils the
    rest (Gemma 2).
    """
    kept, index = prompts.positions.clamp(min=0).unique(return_inverse=True)
    logits = model(prompts.clean, logits_to_keep=kept, use_cache=False).logits
    return logits[torch.arange(len(prompts), device=index.device)[:, None], index]
