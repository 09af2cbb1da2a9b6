"""The state of a training on disk: one safetensors file, replaced as a whole.

    identity            SHA-256 of settings, model, prompts, metric and ablation
    step, multipliers   how many steps are done; of a Lagrangian
    curve               [steps, 5]: the fields of `Point`
    theta.KIND          parameters of gates; mean.KIND and square.KIND those of Adam
    rung.EDGES.KIND     theta as the mask passed a size
    constants.NAME      of ablation=optimal: where they started, their scale, how far they moved,
                        and the moments of that

It goes on only with the training that wrote it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, astuple, replace
from pathlib import Path

import torch
from torch import Tensor

from circuits.discovery.masks.settings import MaskTraining
from circuits.discovery.masks.state import Point, State
from circuits.files import read_tensors, write_tensors
from circuits.objective import Objective


def fingerprint(config: MaskTraining, objective: Objective, over: str, kind: str) -> Tensor:
    """A hash of all that a training depends on, [32] bytes."""
    engine, batches = objective.engine, objective.batches
    settings = asdict(replace(config, checkpoint=None, checkpoint_every=1))
    parts = [
        settings,
        over,
        kind,
        objective.space.to_json(),
        engine.model.weight_hash,
        str(engine.dtype),
        [batches.whole.hash(), list(batches.whole.ids)],
        objective.metric.name,
        batches.ablation.name,
    ]
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return torch.tensor(list(digest), dtype=torch.uint8)


def save_checkpoint(path: str, state: State, identity: Tensor) -> None:
    """Writes the state; OSError where there is no room."""
    tensors = {
        "identity": identity,
        "step": torch.tensor(state.step),
        "multipliers": state.multipliers,
        "curve": torch.tensor([astuple(point) for point in state.curve], dtype=torch.float64),
    }
    if state.constants is not None:
        start, moved = state.constants.start, state.constants.moved
        moments = state.optimiser.state[moved]
        tensors |= {
            "constants.start": start.constants,
            "constants.scale": start.scale,
            "constants.moved": moved,
            "constants.mean": moments["exp_avg"],
            "constants.square": moments["exp_avg_sq"],
        }
    for name, theta in state.gates.items():
        moments = state.optimiser.state[theta]
        tensors[f"theta.{name}"] = theta
        tensors[f"mean.{name}"] = moments["exp_avg"]
        tensors[f"square.{name}"] = moments["exp_avg_sq"]
    for edges, gates in state.rungs.items():
        tensors |= {f"rung.{edges}.{name}": theta.clone() for name, theta in gates.items()}
    write_tensors(Path(path), tensors)


def load_checkpoint(path: str, state: State, identity: Tensor) -> None:
    """Brings a new state to where a training stopped; without a file it stays as it is.

    Raises:
        ValueError: the file cannot be read, is of another training, or is nowhere it could be
            written.
    """
    file = Path(path)
    if not file.parent.is_dir():
        raise ValueError(f"method.checkpoint={path}, but there is no folder {file.parent}; make it")
    if not file.exists():
        return
    tensors = read_tensors(file)
    try:
        if not torch.equal(tensors["identity"], identity):
            raise ValueError(
                f"{path} is the checkpoint of another training: other settings, model, prompts, "
                "metric or ablation; delete it, or name another method.checkpoint"
            )
        _restore(state, tensors)
    except (KeyError, TypeError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{path} is no checkpoint that can be read ({error}); delete it"
        ) from error


@torch.no_grad()
def _restore(state: State, tensors: Mapping[str, Tensor]) -> None:
    state.step = int(tensors["step"])
    state.multipliers.copy_(tensors["multipliers"])
    state.curve = [Point(int(step), *numbers) for step, *numbers in tensors["curve"].tolist()]
    for name, theta in state.gates.items():
        own = [tensors[f"{kind}.{name}"] for kind in ("theta", "mean", "square")]
        _restore_one(state, theta, *own)
    if (constants := state.constants) is not None:
        own = [tensors[f"constants.{kind}"] for kind in ("moved", "mean", "square")]
        _restore_one(state, constants.moved, *own)
        start = constants.start
        known = {"start": start.constants, "scale": start.scale}
        own = [_like(tensors[f"constants.{kind}"], like) for kind, like in known.items()]
        constants.start = start.like(*(one.to(start.constants) for one in own))
    sizes = {int(name.split(".")[1]) for name in tensors if name.startswith("rung.")}
    state.rungs = {
        edges: {name: tensors[f"rung.{edges}.{name}"] for name in state.gates}
        for edges in sorted(sizes, reverse=True)
    }


def _restore_one(state: State, own: Tensor, value: Tensor, mean: Tensor, square: Tensor) -> None:
    """A parameter and its moments."""
    own.copy_(_like(value, own))
    state.optimiser.state[own] = {
        "step": torch.tensor(float(state.step)),
        "exp_avg": _like(mean, own).to(own.device),
        "exp_avg_sq": _like(square, own).to(own.device),
    }


def _like(stored: Tensor, theta: Tensor) -> Tensor:
    if stored.shape != theta.shape or not stored.isfinite().all():
        raise TypeError(f"a tensor of shape {tuple(stored.shape)}, or not finite")
    return stored
