"""How unusually the circuit's heads are routed: distance of their log-odds' departures.

See `mad.departure`.

Shapes: prompts B, heads h.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from circuits.prompts import Prompts
from mad.departure import departure
from mad.detectors.measured import Instrument, chosen_or_means, measuring
from mad.detectors.settings import check_ablation, check_shrinkage
from mad.statistics import distance


@dataclass
class Routing:
    """How unusually the circuit's heads are pointed."""

    name: str = "routing"
    # what removed edges carry: mean, positional_mean, zero; null: means, by position if edges are
    ablation: str | None = None
    shrinkage: float = 0.1  # of the standardised covariance towards the identity

    def check(self) -> None:
        """Raises ValueError when a setting is out of range."""
        check_ablation(self.ablation)
        check_shrinkage(self.shrinkage)


def head_departures(instrument: Instrument, prompts: Prompts, memory: str) -> Float[Tensor, "B h"]:
    """Returns each head's departure in log-odds."""
    engine, circuit, ablation = instrument.against
    return departure(engine, circuit.kept, ablation, prompts, memory=memory).routing


ROUTING = measuring(
    Routing,
    head_departures,
    lambda config: distance(config.shrinkage),
    of_circuit=True,
    ablation=chosen_or_means,
)
