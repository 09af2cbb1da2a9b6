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
from circuits.engine.live_nodes import live_nodes
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
    noise: Float[Tensor, "B"]  # how much of the score is rounding: smaller parts mean nothing


@runtime_checkable
class ExplainingDetector(Detector, Protocol):
    """A detector that can also say which edges of its circuit's graph a score comes from.

    Its score is 0, but for rounding, where every edge is kept.
    """

    def noise(self, prompts: Prompts, *, memory: str = "2GB") -> Float[Tensor, "B"]:
        """How much of each prompt's score is rounding, in units of the score; above 0."""
        ...

    def explain(
        self, prompts: Prompts, *, scores: Float[Tensor, "B"] | None = None, memory: str = "2GB"
    ) -> Iterator[Explained]:
        """Yields the explanations of as many prompts at a time as fit in `memory`, in order.

        `scores` are those of the prompts, where they are known: they are not computed again.

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
            ValueError: there is none, or it is no ground to score on: no kept edge leads from the
                input to the logits, or nothing is off it.
        """
        if self.circuit is None:
            raise ValueError(
                f"detector {detector} scores against a circuit; run `madcap extract` first"
            )
        kept, edges = len(self.circuit), self.circuit.graph.n_edges
        found = f"the circuit keeps {kept} of {edges} edges"
        if kept == edges:
            raise ValueError(
                f"{found}: nothing is off it, so that every score of detector {detector} would be "
                "rounding; extract one with fewer edges (a higher method.tau, or selection.edges)"
            )
        if not _reads_the_input(self.circuit):
            raise ValueError(
                f"{found}, and none leads from the input to the logits, so that detector "
                f"{detector} would compare with a run that knows nothing of it; extract one with "
                "more edges (a lower method.tau, or selection.edges)"
            )
        return self.circuit


def _reads_the_input(circuit: Circuit) -> bool:
    """Whether some path of kept edges leads from the input to the logits."""
    living = live_nodes(circuit.graph, circuit.mask[None]).writers.tolist()
    return any(circuit.graph.writers[writer].startswith("input") for writer in living)


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
