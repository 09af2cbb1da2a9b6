"""What the files of circuits of edges and of units have in common.

Shapes: `*E` the axes of a mask, [R, W, *S] of edges and [U, *S] of units.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from circuits.files import own_file, read_tensors
from circuits.mask_distribution import MaskDistribution
from circuits.space import Space

TRAINED, LOG_ALPHA = "trained_mask", "log_alpha."  # what the files call a trained mask


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
    @property
    def about(self) -> Mapping[str, Any]: ...
    @property
    def trained(self) -> MaskDistribution | None: ...


Loaded = TypeVar("Loaded", bound=Scored)


def with_stored(circuit: Loaded, path: Path, *, scored: bool = True) -> Loaded:
    """A circuit as `circuit.json` at a path tells it, with what `scores.safetensors` beside it has.

    `scored` is false of a circuit to which such a file does not belong.  Errors as `stored_scores`
    and `stored_mask`.
    """
    tensors = own_file(path.parent, "scores.safetensors")
    mask = circuit.about.get(TRAINED)
    about = {name: value for name, value in circuit.about.items() if name != TRAINED}
    circuit = replace(circuit, about=about)  # type: ignore[type-var]
    if not scored or not tensors.is_file():
        return circuit
    scores = stored_scores(tensors, path, circuit)
    trained = stored_mask(tensors, circuit.space, mask)
    return replace(circuit, scores=scores, trained=trained)  # type: ignore[type-var]


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


# ---- trained masks -------------------------------------------------------------------------------


def told_mask(mask: MaskDistribution | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `circuit.json` and `scores.safetensors` say of a trained mask; nothing where none is."""
    if mask is None:
        return {}, {}
    tensors = {f"{LOG_ALPHA}{name}": own for name, own in mask.gates.items()}
    return {TRAINED: {"kind": mask.kind, "over": mask.over}}, tensors


def stored_mask(path: Path, space: Space, told: Any) -> MaskDistribution | None:
    """The trained mask beside scores; ValueError where it is not what `circuit.json` tells."""
    if told is None:
        return None
    gates = {
        name.removeprefix(LOG_ALPHA): tensor
        for name, tensor in read_tensors(path).items()
        if name.startswith(LOG_ALPHA)
    }
    try:
        kind, over = (str(told[name]) for name in ("kind", "over"))
        return MaskDistribution(space, kind, over, gates)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no mask of {TRAINED} in circuit.json: {error}; restore it, or delete it"
        ) from error


def drawn_masks(circuit: Scored, count: int, seed: int) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Circuits drawn from a circuit's trained mask: what each keeps, and what `about` says of it.

    Raises:
        ValueError: it was found by no learned mask, or the count is under 1.
    """
    if circuit.trained is None:
        raise ValueError(
            "the circuit has no trained mask to draw from "
            f"(method={said(circuit.about, 'method')!r}): find it by edge_pruning, "
            "subnetwork_probing or ugs"
        )
    for draw, kept in enumerate(circuit.trained.sample(count, seed)):
        yield kept, {**circuit.about, "sample": {"seed": seed, "draw": draw}}
