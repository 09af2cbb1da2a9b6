"""Every score of every subject: what `mad.benchmark.run` leaves, read back and checked.

    FOLDER/scores/TASK-SEED.json           the subject: strata, circuit, sizes, seconds
    FOLDER/scores/TASK-SEED.safetensors    scores, as `DETECTOR|CIRCUIT|PART`

Circuits: `none` for a detector that looks through none; `found`; `random0`, `random1`, ... for
random ones of the same size.

Shapes: prompts B.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

FOLDER = "scores"
CALIBRATION, ANOMALY = "calibration", "anomaly"
# Groups of normals, with the titles of their panels: never pooled.
TITLES = {"normal_iid": "in distribution", "normal_shift": "shifted normals"}
NORMALS = tuple(TITLES)
GROUPS = (*NORMALS, ANOMALY)
NONE, FOUND, ORACLE = "none", "found", "oracle"  # circuits; an oracle is no detector
SUFFIXES = (".json", ".safetensors")
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".npy", ".npz", ".joblib")


@dataclass(frozen=True, order=True)
class Scorer:
    """A detector's name and the circuit that it looks through."""

    detector: str
    circuit: str = NONE

    def __str__(self) -> str:
        return (
            self.detector if self.circuit in (NONE, FOUND) else f"{self.detector} at {self.circuit}"
        )

    @property
    def random(self) -> bool:
        """Whether the circuit is a random one."""
        return self.circuit.startswith("random")

    @property
    def family(self) -> str | None:
        """Of a distance at one layer, `FAMILY, layer N`, the family."""
        found = re.fullmatch(r"(.+), layer \d+", self.detector)
        return found[1] if found is not None and self.circuit == NONE else None

    @property
    def baseline(self) -> bool:
        """Whether no circuit is used, and no layer chosen by looking at anomalies."""
        return self.circuit == NONE and self.family is None

    @property
    def shown(self) -> bool:
        """Whether tables name it."""
        return self.baseline or self.circuit in (FOUND, ORACLE)


@dataclass(frozen=True, order=True)
class Place:
    """Where something is measured: a stratum of one task's model.

    Of an AUROC, `group` is that of the normals, and `stratum` one of the anomalies; of a share that
    is flagged, both are of the flagged prompts.
    """

    task: str
    seed: int
    group: str
    stratum: str

    def __str__(self) -> str:
        return f"{self.task} {self.seed} {short(self.group)} {self.stratum}"


def short(group: str) -> str:
    """iid, shift or anomaly."""
    return group.removeprefix("normal_")


@dataclass(frozen=True)
class Scores:
    """Every score of one subject."""

    task: str
    seed: int
    strata: Mapping[str, Sequence[str]]  # of each prompt of each group
    about: Mapping[str, Any]  # the whole of the .json
    parts: Mapping[Scorer, Mapping[str, Float[Tensor, "B"]]]  # calibration and each group

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.task}-{self.seed}"

    @property
    def anomalous(self) -> bool:
        """Whether there are anomalies to tell from normals."""
        return ANOMALY in self.strata

    def rows(self, group: str) -> dict[str, Tensor]:
        """The rows of each stratum of a group, in alphabetical order."""
        own = self.strata[group]
        return {
            name: torch.tensor([row for row, stratum in enumerate(own) if stratum == name])
            for name in sorted(set(own))
        }


@dataclass(frozen=True)
class Results:
    """Every subject's scores."""

    subjects: tuple[Scores, ...]

    @cached_property
    def scorers(self) -> tuple[Scorer, ...]:
        """All that any subject has, random circuits too, in alphabetical order."""
        return tuple(sorted({scorer for subject in self.subjects for scorer in subject.parts}))

    def select(self, tasks: Sequence[str]) -> Results:
        """Only the subjects of some tasks.

        Raises:
            ValueError: none is left.
        """
        left = tuple(subject for subject in self.subjects if subject.task in tasks)
        if not left:
            there = ", ".join(subject.name for subject in self.subjects)
            raise ValueError(f"0 subjects with tasks={[*tasks]}; there are {there}")
        return Results(left)

    def of(self, scorers: Sequence[Scorer]) -> Results:
        """Only some scorers."""

        def left(subject: Scores) -> Scores:
            parts = {scorer: subject.parts[scorer] for scorer in scorers if scorer in subject.parts}
            return replace(subject, parts=parts)

        return Results(tuple(map(left, self.subjects)))


# --- reading --------------------------------------------------------------------------------------


def read(folder: Path) -> Results:
    """Returns what `run` left in `folder`/scores.

    Raises:
        FileNotFoundError: there are no scores, or one of a subject's two files is missing.
        ValueError: a file that cannot be read safely or at all, or whose contents do not fit
            together; it is named.
    """
    scores = Path(folder) / FOLDER
    files = sorted(scores.glob("*"))
    if pickles := [file for file in files if file.suffix in PICKLES]:
        raise ValueError(
            f"{pickles[0]} may hold code, and only .json and .safetensors are read; remove it"
        )
    stems = sorted({file.stem for file in files if file.suffix in SUFFIXES})
    if not stems:
        raise FileNotFoundError(
            f"{scores} holds no scores; run the benchmark with this folder first"
        )
    pairs = (scores / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES)
    if missing := [file for file in pairs if file not in files]:
        raise FileNotFoundError(
            f"{missing[0]} is missing: the subject is unfinished; run the benchmark again"
        )
    return Results(tuple(_read_subject(scores, stem) for stem in stems))


def _read_subject(folder: Path, stem: str) -> Scores:
    file = folder / f"{stem}.json"
    try:
        about = json.loads(file.read_text())
        task, seed = str(about["task"]), int(about["seed"])
        strata = {str(group): tuple(map(str, names)) for group, names in about["strata"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{file} is no record of a subject ({error!r}); score that subject anew"
        ) from error
    if stem != f"{task}-{seed}":
        raise ValueError(f"{file} says task={task!r} and seed={seed}; name it {task}-{seed}.json")
    if unknown := [group for group in strata if group not in GROUPS]:
        raise ValueError(f"{file} has a group {unknown[0]!r}; groups are {', '.join(GROUPS)}")
    if missing := [group for group in NORMALS if not strata.get(group)]:
        raise ValueError(
            f"{file} has 0 prompts in {missing[0]}; every subject needs normals of both regimes"
        )
    if ANOMALY in strata and not strata[ANOMALY]:
        raise ValueError(f"{file} has 0 prompts in {ANOMALY}; leave the group out, or score some")
    return Scores(task, seed, strata, about, _read_parts(folder / f"{stem}.safetensors", strata))


def _read_parts(file: Path, strata: Mapping[str, Sequence[str]]) -> dict[Scorer, dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"{file} is no safetensors file ({error}); score that subject anew"
        ) from error
    parts: dict[Scorer, dict[str, Tensor]] = {}
    lengths = {group: len(names) for group, names in strata.items()}
    for name, tensor in sorted(tensors.items()):
        words = name.split("|")
        if len(words) != 3 or words[2] not in (CALIBRATION, *lengths):
            raise ValueError(
                f"{file} has a tensor {name!r}; names are DETECTOR|CIRCUIT|PART, PART one of the "
                "groups"
            )
        # Only calibration has no strata: all must be as long as the first.
        _check_scores(file, name, tensor, lengths.setdefault(words[2], len(tensor)))
        parts.setdefault(Scorer(words[0], words[1]), {})[words[2]] = tensor
    for scorer, own in parts.items():
        if missing := [part for part in (CALIBRATION, *strata) if part not in own]:
            raise ValueError(
                f"{file} has no {scorer.detector}|{scorer.circuit}|{missing[0]}; score that "
                "subject anew"
            )
    return parts


def _check_scores(file: Path, name: str, scores: Tensor, prompts: int) -> None:
    if scores.dtype != torch.float32 or scores.ndim != 1:
        raise ValueError(
            f"{file}: {name!r} is {scores.dtype} {tuple(scores.shape)}; it must be a row of float32"
        )
    if len(scores) != prompts or not prompts:
        raise ValueError(f"{file}: {name!r} has {len(scores)} scores for {prompts} prompts")
    if bad := int((~torch.isfinite(scores)).sum()):
        raise ValueError(
            f"{file}: {bad} of {len(scores)} scores of {name!r} are not finite; mend the detector"
        )
