"""Detectors that measure several numbers of each input and ask how unusual these are.

The numbers (how far nodes depart from a circuit, say) are compared with those of trusted inputs by
one of the summaries of `mad.statistics`.

Shapes: prompts B, numbers c.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from circuits.ablation import Ablation, AblationConfig, fit_ablation, restore_ablation
from circuits.circuit import Circuit
from circuits.engine import Engine
from circuits.prompts import Prompts
from mad.detector import Context, DetectorKind, labelled, part
from mad.statistics import Summary, Usual


@dataclass(frozen=True)
class Instrument:
    """What numbers are measured with."""

    config: Any  # of the detector
    engine: Engine
    circuit: Circuit | None  # None: the numbers are of the model alone
    ablation: Ablation  # what removed edges carry

    @property
    def kept(self) -> Tensor:
        """The edges of the circuit, for numbers that are measured against one."""
        assert self.circuit is not None
        return self.circuit.kept


Measure = Callable[[Instrument, Prompts, str], Float[Tensor, "B c"]]  # the text is the memory


@dataclass(frozen=True)
class MeasuringDetector:
    """An instrument, and what it shows of trusted inputs."""

    instrument: Instrument
    measure: Measure
    usual: Usual

    @property
    def config(self) -> Any:
        """The configuration."""
        return self.instrument.config

    @property
    def circuit(self) -> Circuit | None:
        """The circuit that inputs are measured against."""
        return self.instrument.circuit

    @property
    def scores_under(self) -> str | None:
        """The ablation of that circuit."""
        return None if self.circuit is None else self.instrument.ablation.name

    def score(self, prompts: Prompts, *, memory: str = "2GB") -> Float[Tensor, "B"]:
        """How unusual a prompt's numbers are."""
        return self.usual.unusual(self.measure(self.instrument, prompts, memory)).float()

    def state(self) -> Mapping[str, Tensor]:
        """The ablation's values, and what trusted inputs are like."""
        ablation = labelled("ablation", self.instrument.ablation.state())
        return ablation | labelled("usual", vars(self.usual))


def measuring(
    schema: type,
    measure: Measure,
    summary: Callable[[Any], Summary],
    *,
    of_circuit: bool = True,
    most_trusted: int | None = None,
) -> DetectorKind:
    """Returns a kind of detector that measures.

    Args:
        schema: its configuration, with an `ablation` (None: means, at each position where edges
            have one) and a `check`.
        measure: what is measured.
        summary: by which it is compared with trusted inputs, given the configuration.
        of_circuit: whether numbers are measured against a circuit.
        most_trusted: on how many trusted prompts they are measured; None: all.
    """

    def circuit_of(config: Any, context: Context) -> Circuit | None:
        return context.circuit_for(config.name) if of_circuit else None

    def fit(
        config: Any, context: Context, trusted: Prompts, *, memory: str = "2GB"
    ) -> MeasuringDetector:
        circuit, engine = circuit_of(config, context), context.engine
        config.check()
        ablation = AblationConfig(_ablation_of(config, engine))
        means = fit_ablation(ablation, engine, trusted, memory=memory)
        instrument, chosen = Instrument(config, engine, circuit, means), summary(config)
        if chosen.fit is None:
            return MeasuringDetector(instrument, measure, chosen.restore())
        rows = measure(instrument, trusted.select(slice(most_trusted)), memory)
        return MeasuringDetector(instrument, measure, chosen.fit(rows))

    def restore(
        config: Any, context: Context, state: Mapping[str, Tensor], *, memory: str = "2GB"
    ) -> MeasuringDetector:
        circuit, engine = circuit_of(config, context), context.engine
        config.check()
        name = _ablation_of(config, engine)
        means = restore_ablation(name, engine, part("ablation", state))
        usual = summary(config).restore(**part("usual", state))
        return MeasuringDetector(Instrument(config, engine, circuit, means), measure, usual)

    return DetectorKind(schema, fit, restore)


def _ablation_of(config: Any, engine: Engine) -> str:
    if config.ablation is not None:
        return config.ablation
    return "mean" if engine.graph.n_positions is None else "positional_mean"
