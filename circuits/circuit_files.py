"""What the files of circuits of edges and of units have in common.

Shapes: `*E` the axes of a mask, [R, W, *S] of edges and [U, *S] of units.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from circuits.files import own_file, read_tensors
from circuits.space import Space


def said(about: Mapping[str, Any], field_name: str) -> str:
    """The name that a circuit gives to its task, method, metric or ablation; or empty."""
    value = about.get(field_name)
    name = value.get("name") if isinstance(value, Mapping) else value
    return name if isinstance(name, str) else ""


def circuit_file(path: str | Path) -> Path:
    """The `circuit.json` of a folder, or the file itself; FileNotFoundError where it is not."""
    path = Path(path)
    path = own_file(path, "circuit.json") if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no circuit at {path}: `madcap extract ... out=DIR` writes one")
    return path


def check_finite(part: str, scores: Iterable[tuple[str, float]]) -> None:
    """Raises ValueError for a score of a kept part that is not finite."""
    for name, score in scores:
        if not math.isfinite(score):
            raise ValueError(
                f"{part} {name} has score {score}; scores must be finite, so check metric and "
                "weights"
            )


@runtime_checkable
class Scored(Protocol):
    """A circuit of whatever parts."""

    @property
    def space(self) -> Space: ...
    @property
    def kept(self) -> Bool[Tensor, "*E"]: ...
    @property
    def scores(self) -> Float[Tensor, "*E"]: ...


def stored_scores(path: Path, beside: Path, circuit: Scored) -> Tensor:
    """The scores of all parts, which are those of `circuit.json` where a part is kept.

    Raises:
        ValueError: there are none, of other parts, or others where a part is kept.
    """
    noun = circuit.space.noun
    try:
        scores = read_tensors(path)["scores"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} holds no scores: {error}") from error
    if not scores.is_floating_point():
        raise ValueError(f"{path} holds no scores: they are {scores.dtype}, but must be float")
    if scores.shape != circuit.kept.shape:
        raise ValueError(
            f"{path} has shape {tuple(scores.shape)}, but the graph of {beside} is "
            f"{tuple(circuit.kept.shape)}"
        )
    differ = (scores.to(circuit.scores.dtype) != circuit.scores) & circuit.kept
    if differ.any():
        first = tuple(differ.nonzero()[0].tolist())
        raise ValueError(
            f"{beside} says that {circuit.space.part_name(*first)} scores "
            f"{circuit.scores[first].item():g}, but {path.name} says {scores[first].item():g} "
            f"({int(differ.sum())} of {int(circuit.kept.sum())} kept {noun} differ); if the former "
            f"is right, delete {path.name} ({noun} off the circuit then score 0), else restore "
            "circuit.json"
        )
    return scores
