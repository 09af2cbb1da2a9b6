"""What a detector is: fitted on trusted inputs, it scores others, and **high is anomalous**.

Shapes: inputs B, readers R, writers W; `*S` positions, where edges are told apart by position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from circuits.circuit import Circuit
from circuits.engine import Engine
from circuits.prompts import Prompts


@runtime_checkable
class Detector(Protocol):
    """A fitted detector."""

    @property
    def config(self) -> Any:
        """The configuration that it was fitted with, whose `name` picks it from `DETECTORS`."""
        ...

    @property
    def circuit(self) -> Circuit | None:
        """The circuit that it scores against; None: it needs none."""
        ...

    @property
    def scores_under(self) -> str | None:
        """The ablation that this circuit is scored under; None where there is no circuit."""
        ...

    def score(self, prompts: Prompts, *, memory: str = "2GB") -> Float[Tensor, "B"]:
        """How anomalous each prompt is; float32 on the CPU, high = anomalous.

        As many prompts are run at once as fit in `memory`, beside the model's own weights.

        Raises:
            InputError: a prompt cannot be scored.
            TooLittleMemory: not even one fits.
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
    """A detector that can also say which edges of its circuit's graph a score comes from."""

    def explain(self, prompts: Prompts, *, memory: str = "2GB") -> Iterator[Explained]:
        """Yields the explanations of as many prompts at a time as fit in `memory`, in order.

        Raises:
            InputError: a prompt cannot be scored.
            TooLittleMemory: not even one fits; before anything is yielded.
        """
        ...


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
class DetectorKind:
    """A kind of detector: its configuration, and what makes a detector of it.

    fit(config, context, trusted, memory=)      from trusted prompts
    restore(config, context, state, memory=)    from the state of one that was fitted
    """

    schema: type  # a dataclass, whose `name` is the detector's; its `check()` refuses bad settings
    fit: Callable[..., Detector]
    restore: Callable[..., Detector]


def labelled(label: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of one part of a state, as `LABEL.NAME`."""
    return {f"{label}.{name}": tensor for name, tensor in tensors.items()}


def part(label: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state that `labelled` has put there."""
    start = f"{label}."
    return {
        name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)
    }
