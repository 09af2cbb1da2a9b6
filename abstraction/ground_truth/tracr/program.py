"""What is known of a Tracr program: weights, tokens, the label of every dimension, its output.

A label is `variable:value` or `variable`.  Inputs begin with BOS.

Shapes: batch B, positions S, scored positions P, outputs O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from abstraction.ground_truth.program import encode
from circuits.engine import Engine
from circuits.model.load import LoadedModel
from circuits.prompts import Prompts, prompts_from_records

PAD = "compiler_pad"


@dataclass(frozen=True, eq=False)
class Inputs:
    """Inputs with what the program should say at the scored positions: outputs, or numbers."""

    tokens: Int[Tensor, "B S"]
    labels: Num[Tensor, "B P"]
    positions: tuple[int, ...]

    @property
    def prompts(self) -> Prompts:
        """The inputs as prompts, without answers."""
        at = list(self.positions)
        return prompts_from_records({"clean": row, "positions": at} for row in self.tokens.tolist())


@dataclass(frozen=True, eq=False)
class TracrProgram:
    """A compiled program, and what is known about it."""

    name: str
    model: LoadedModel  # token and position embedding are two writers
    tokens: tuple[str, ...]  # the id is the index
    bos: str
    labels: tuple[str, ...]  # of the dimensions of the residual stream
    output: str  # the variable that the logits read
    outputs: tuple[str, ...] | None  # its values, one a logit; None: it is a number
    inputs: Inputs | None = None
    # edges: all, input_varying, effective
    published: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return "numerical" if self.outputs is None else "categorical"

    @property
    def length(self) -> int:
        """How many tokens an input may have, BOS not counted."""
        return self.model.context - 1

    @property
    def variables(self) -> dict[str, tuple[int, ...]]:
        """The dimensions of the residual stream that each variable has."""
        dimensions: dict[str, tuple[int, ...]] = {}
        for index, name in enumerate(map(variable_of, self.labels)):
            dimensions[name] = (*dimensions.get(name, ()), index)
        return dimensions

    def encode(self, names: Sequence[str]) -> list[int]:
        """Token ids of token names, with BOS put in front; ValueError as in `program.encode`."""
        known = [token for token in self.tokens if token not in (self.bos, PAD)]
        encode(self.name, names, known, self.length)
        return [self.tokens.index(name) for name in (self.bos, *names)]

    def decode(self, logits: Float[Tensor, "*batch O"]) -> Num[Tensor, "*batch"]:
        """What the program says: the number of an output, or a number."""
        return logits[..., 0] if self.outputs is None else logits.argmax(-1)

    @torch.no_grad()
    def run(self, names: Sequence[str]) -> list[str] | list[float]:
        """What the program says at each token of an input; ValueError as in `encode`."""
        bridge = self.model.bridge
        logits = bridge(torch.tensor([self.encode(names)], device=bridge.cfg.device))
        said = self.decode(logits)[0, 1:].tolist()
        return said if self.outputs is None else [self.outputs[value] for value in said]


def check(program: TracrProgram) -> None:
    """Raises ValueError where names and weights do not fit, or Tracr compiles no such model."""
    _check_counts(program)
    name, bridge = program.name, program.model.bridge
    if bridge.cfg.normalization_type is not None:
        raise ValueError(
            f"{name}: normalization_type={bridge.cfg.normalization_type!r}, but Tracr compiles "
            "without; its edges cannot be read off the weights"
        )
    for key, value in bridge.named_parameters():
        if key.endswith("bias") and value.any():
            raise ValueError(f"{name}: {key} is not zero, but Tracr compiles without biases")
    _check_order(program)


def _check_counts(program: TracrProgram) -> None:
    for what, named, weighed in (
        ("tokens", program.tokens, program.model.vocabulary),
        ("residual labels", program.labels, program.model.bridge.cfg.d_model),
        ("outputs", program.outputs or ("a number",), program.model.outputs),
    ):
        if len(named) != weighed:
            raise ValueError(
                f"{program.name}: {len(named)} {what} are named, but the weights have {weighed}; "
                "name each one"
            )


def _check_order(program: TracrProgram) -> None:
    weights: Any = Engine(program.model).architecture
    for what, module, labels in (
        ("embedding of token", weights.token, [f"tokens:{token}" for token in program.tokens]),
        ("unembedding of output", weights.unembed, read_labels(program.output, program.outputs)),
    ):
        for row, label in zip(module.weight, labels, strict=True):
            written = [program.labels[i] for i in row.nonzero()[:, 0].tolist()]
            if label not in written:
                raise ValueError(
                    f"{program.name}: the {what} {label!r} is {written}; names and weights are in "
                    "another order"
                )


def read_labels(name: str, outputs: tuple[str, ...] | None) -> list[str]:
    """The labels of the dimensions that the logits read."""
    return [name] if outputs is None else [f"{name}:{value}" for value in outputs]


def variable_of(label: str) -> str:
    """The variable that a label of the residual stream belongs to."""
    return label.partition(":")[0]


def in_order(where: str, encoding: Any) -> tuple[str, ...]:
    """The names of an encoding {name: id}, by id."""
    if not isinstance(encoding, Mapping) or set(encoding.values()) != set(range(len(encoding))):
        raise ValueError(f"{where} is {encoding}, but it must give each name its own id, from 0 up")
    names = tuple(str(name) for name, _ in sorted(encoding.items(), key=lambda item: item[1]))
    if len(set(names)) < len(names):
        raise ValueError(f"{where} has two names that read alike: {', '.join(names)}; rename one")
    return names
