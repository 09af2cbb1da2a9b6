"""How unusually what the circuit's nodes write departs from the model: log(|a(M) - a(C)|^2 + 1e-8).

See `mad.departure`.  The logarithm puts departures over orders of magnitude on one scale.

Shapes: prompts B, nodes n.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from circuits.prompts import Prompts
from mad.departure import departure
from mad.detectors.measured import Instrument, chosen_or_means, measuring
from mad.detectors.settings import check_ablation, check_choice, check_shrinkage
from mad.statistics import LARGEST, Summary, distance

FLOOR = 1e-8  # of a node's departure, under which differences are rounding
SUMMARIES = ("distance", "max")


@dataclass
class Nodes:
    """How unusually the circuit's nodes depart from the model's."""

    name: str = "nodes"
    # distance: squared Mahalanobis distance over all nodes; max: the largest z of a node
    summary: str = "distance"
    # what removed edges carry: mean, positional_mean, zero; null: means, by position if edges are
    ablation: str | None = None
    # of the covariance towards the identity: circuits have up to tens of correlated nodes
    shrinkage: float = 0.1

    def check(self) -> None:
        """Raises ValueError when a setting is out of range."""
        check_choice("summary", self.summary, SUMMARIES)
        check_ablation(self.ablation)
        check_shrinkage(self.shrinkage)


def node_departures(instrument: Instrument, prompts: Prompts, memory: str) -> Float[Tensor, "B n"]:
    """Returns the logarithm of each node's departure."""
    engine, circuit, ablation = instrument.against
    found = departure(engine, circuit.kept, ablation, prompts, memory=memory)
    return (found.nodes + FLOOR).log()


def _summary(config: Nodes) -> Summary:
    return LARGEST if config.summary == "max" else distance(config.shrinkage)


NODES = measuring(Nodes, node_departures, _summary, of_circuit=True, ablation=chosen_or_means)
