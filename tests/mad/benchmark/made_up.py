"""Made-up scores, for tests of what the benchmark makes of scores."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mad.benchmark.results import FOUND, Scorer, Scores

STRATA = {
    "normal_iid": ("all",) * 40,
    "normal_shift": ("keys",) * 50,
    "anomaly": ("agree", "disagree", "disagree") * 20,
}
SIZES = {"calibration": 120} | {group: len(names) for group, names in STRATA.items()}


def found(detector: str) -> Scorer:
    """A detector that looks through a circuit."""
    return Scorer(detector, FOUND)


def drawn(
    salt: int, anomaly: float = 1.0, shift: float = 0.0, step: float = 0.0, groups=SIZES
) -> dict[str, Tensor]:
    """Normal scores, anomalies and shifted normals moved up; `step` rounds, which makes ties."""
    generator = torch.Generator().manual_seed(salt)
    moved = {"anomaly": anomaly, "normal_shift": shift}
    parts = {
        part: torch.randn(size, generator=generator) + moved.get(part, 0.0)
        for part, size in groups.items()
    }
    return {
        part: (values / step).round() * step if step else values for part, values in parts.items()
    }


def subject(parts: dict, task="recall_redirect", seed=3, strata=STRATA, about=None) -> Scores:
    """Scores of one model, of baselines where a name alone is given."""
    scorers = {k if isinstance(k, Scorer) else Scorer(k): v for k, v in parts.items()}
    return Scores(task, seed, strata, about or {}, scorers)


def leave(folder: Path, scores: Scores, tensors: dict | None = None) -> Path:
    """Writes a model's two files as a run leaves them, with more tensors; returns the .json."""
    file = folder / "scores" / f"{scores.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    strata = {group: list(names) for group, names in scores.strata.items()}
    record = {"task": scores.task, "seed": scores.seed, "strata": strata, **scores.about}
    file.write_text(json.dumps(record))
    named = {
        f"{scorer.detector}|{scorer.circuit}|{part}": values
        for scorer, own in scores.parts.items()
        for part, values in own.items()
    }
    save_file(named | (tensors or {}), file.with_suffix(".safetensors"))
    return file
