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
from circuits.files import restored_tensors
from circuits.prompts import Prompts
from mad.detector import Context, DetectorKind, labelled, part
from mad.statistics import Summary, Usual


@dataclass(frozen=True)
class Instrument:
    """What numbers are measured with."""

    config: Any  # of the detector
    engine: Engine
    circuit: Circuit | None  # None: the numbers are of the model alone
    ablation: Ablation | None  # what removed edges carry; None: none are removed

    @property
    def against(self) -> tuple[Engine, Circuit, Ablation]:
        """What the numbers of a circuit are measured with."""
        assert self.circuit is not None and self.ablation is not None
        return self.engine, self.circuit, self.ablation


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
        return None if self.circuit is None else self.instrument.against[2].name

    def score(self, prompts: Prompts, *, memory: str = "2GB") -> Float[Tensor, "B"]:
        """How unusual a prompt's numbers are."""
        rows, columns = self.measure(self.instrument, prompts, memory), self.usual.columns
        if columns not in (None, rows.shape[1]):  # nothing that is saved tells how many there are
            raise ValueError(
                f"detector {self.config.name} knows what {columns} numbers of trusted inputs are "
                f"like, but measures {rows.shape[1]}; fit the detector again"
            )
        return self.usual.unusual(rows).float()

    def state(self) -> Mapping[str, Tensor]:
        """The ablation's values, and what trusted inputs are like."""
        ablation = self.instrument.ablation
        values = {} if ablation is None else ablation.state()
        return labelled("ablation", values) | labelled("usual", vars(self.usual))


def measuring(
    schema: type,
    measure: Measure,
    summary: Callable[[Any], Summary],
    *,
    of_circuit: bool = False,
    ablation: Callable[[Any, Engine], str] | None = None,
    most_trusted: int | None = None,
) -> DetectorKind:
    """Returns a kind of detector that measures.

    Args:
        schema: its configuration.
        measure: what is measured.
        summary: by which it is compared with trusted inputs, given the configuration.
        of_circuit: whether numbers are measured against a circuit.
        ablation: what removed edges carry, fitted on trusted prompts; None: none are removed.
        most_trusted: on how many trusted prompts numbers are measured; None: all.
    """

    def circuit_of(config: Any, context: Context) -> Circuit | None:
        config.check()
        return context.circuit_for(config.name) if of_circuit else None

    def fit(
        config: Any, context: Context, trusted: Prompts, *, memory: str = "2GB"
    ) -> MeasuringDetector:
        circuit, engine, values = circuit_of(config, context), context.engine, None
        if ablation is not None:
            chosen = AblationConfig(ablation(config, engine))
            values = fit_ablation(chosen, engine, trusted, memory=memory)
        instrument, compared = Instrument(config, engine, circuit, values), summary(config)
        if compared.fit is None:
            return MeasuringDetector(instrument, measure, compared.kind())
        rows = measure(instrument, trusted.select(slice(most_trusted)), memory)
        return MeasuringDetector(instrument, measure, compared.fit(rows))

    def restore(
        config: Any, context: Context, state: Mapping[str, Tensor], *, memory: str = "2GB"
    ) -> MeasuringDetector:
        circuit, engine, values = circuit_of(config, context), context.engine, None
        if ablation is not None:
            values = restore_ablation(ablation(config, engine), engine, part("ablation", state))
        usual = restored_tensors(summary(config).kind, part("usual", state))
        return MeasuringDetector(Instrument(config, engine, circuit, values), measure, usual)

    return DetectorKind(schema, fit, restore)


def chosen_or_means(config: Any, engine: Engine) -> str:
    """The configured ablation, or means: at each position where edges are told apart by it."""
    if config.ablation is not None:
        return config.ablation
    return "mean" if engine.graph.n_positions is None else "positional_mean"
