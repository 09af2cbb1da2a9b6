"""The detector protocol, and calibration.

A detector is fitted on trusted inputs and then gives every input a score; **high means anomalous**.
Calibration turns scores into split-conformal p-values,

    p(s) = (1 + #{calibration scores >= s}) / (n + 1)

(Vovk et al. 2005; Papadopoulos et al. 2002): on inputs that are exchangeable with the n calibration
inputs, which neither found nor tuned anything, P(p <= alpha) <= alpha for every alpha, at any n.

Shapes: inputs B, readers R, writers W.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.circuit import Circuit
from circuits.engine import Engine
from circuits.prompts import Prompts


@runtime_checkable
class Detector(Protocol):
    """A fitted detector.  `config` is its configuration, whose `name` picks it from `DETECTORS`."""

    @property
    def config(self) -> Any:
        """The configuration that it was fitted with."""
        ...

    def score(self, prompts: Prompts, *, memory: str = "2GB") -> Float[Tensor, "B"]:
        """How anomalous each prompt is; float32 on the CPU, high = anomalous.

        As many prompts are run at once as fit in `memory`, beside the model's own weights.

        Raises:
            TooLittleMemory: not even one does.
        """
        ...

    def state(self) -> Mapping[str, Tensor]:
        """The tensors from which the detector can be restored."""
        ...


@dataclass(frozen=True)
class Explained:
    """Each prompt's score as a sum over edges: shares of it, and what they leave unexplained."""

    shares: Float[Tensor, "B R W *S"]  # share = the edge's part / the score
    residual: Float[Tensor, "B"]  # 1 - sum of the shares


@runtime_checkable
class ExplainingDetector(Detector, Protocol):
    """A detector that can also say which edges a score comes from."""

    def explain(self, prompts: Prompts, *, memory: str = "2GB") -> Explained: ...


@dataclass(frozen=True)
class Context:
    """What a detector may use: the model, and the circuit where it needs one."""

    engine: Engine
    circuit: Circuit | None = None

    def circuit_for(self, detector: str) -> Circuit:
        """The circuit, for a detector that cannot do without.

        Raises:
            ValueError: there is none.
        """
        if self.circuit is None:
            raise ValueError(
                f"detector {detector} scores against a circuit; run `madcap extract` first"
            )
        return self.circuit


@dataclass(frozen=True)
class Calibration:
    """Sorted scores of held-out trusted inputs."""

    scores: Float[Tensor, "n"]

    @classmethod
    def of(cls, scores: Float[Tensor, "n"]) -> Calibration:
        """Sorts the scores.

        Raises:
            ValueError: there are none, or some are not finite.
        """
        if not len(scores):
            raise ValueError(
                "0 calibration scores; give at least one trusted input to calibrate on"
            )
        if not torch.isfinite(scores).all():
            raise ValueError(
                "calibration scores are not finite; check the model's logits on the calibration "
                "inputs"
            )
        return cls(scores.double().sort().values)

    def p_values(self, scores: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """The conformal p-value of each score."""
        at_least = len(self.scores) - torch.searchsorted(self.scores, scores.double(), side="left")
        return (1 + at_least).double() / (len(self.scores) + 1)

    def threshold(self, alpha: float) -> float:
        """The largest calibration score that is not flagged at `alpha`: scores above it are."""
        allowed = (
            math.floor(alpha * (len(self.scores) + 1) + 1e-9) - 1
        )  # calibration scores >= s, at most
        return self.scores[len(self.scores) - 1 - allowed].item()

    def problem(self, alpha: float) -> str | None:
        """Why `alpha` cannot be used, in one line; None when it can.

        Raises:
            ValueError: alpha is not between 0 and 1.
        """
        check_alpha(alpha)
        needed = math.ceil(1 / alpha - 1 - 1e-9)
        if len(self.scores) >= needed:
            return None
        return (
            f"alpha={alpha:g} needs at least {needed} calibration inputs, but there are "
            f"{len(self.scores)}: the "
            f"smallest possible p-value is {1 / (len(self.scores) + 1):.3g}; calibrate on more "
            "trusted inputs or "
            "raise alpha"
        )


def check_alpha(alpha: float) -> None:
    """Raises ValueError when alpha is no false-alarm rate."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha}, but it must be above 0 and under 1")
