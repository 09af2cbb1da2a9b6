"""What edges off the circuit do to the output: |part(e)| in the KL between model and circuit.

The parts are integrated gradients (`mad.attribution`).

    mass    sum over removed edges of |part(e)|
    max     largest z of a removed edge's |part(e)| among trusted prompts
    tails   - sum over removed edges of log p(e),  p(e) = (1 + #{trusted >= |part(e)|}) / (n + 1)

Shapes: prompts B, removed edges E, readers R, writers W.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from jaxtyping import Float
from torch import Tensor

from circuits.batches import over_batches
from circuits.prompts import Prompts
from mad.attribution import explanation_bytes, halfway, integrated, midpoints, off_circuit
from mad.detectors.measured import Instrument, chosen_or_means, measuring
from mad.detectors.output_deviation import deviation_from
from mad.detectors.settings import check_ablation, check_choice, check_steps
from mad.statistics import LARGEST, TAILS, TOTAL

MOST_TRUSTED = 300  # prompts that effects are compared with: each takes gradients
SUMMARIES = {"mass": TOTAL, "max": LARGEST, "tails": TAILS}


@dataclass
class Effects:
    """What edges off the circuit do to the output."""

    name: str = "effects"
    # mass: of all edges; max: of the edge that does most, as trusted prompts go; tails: how many
    # edges do more than they usually do, and how rarely they do as much
    summary: str = "mass"
    # what removed edges carry: mean, positional_mean, zero; null: means, by position if edges are
    ablation: str | None = None
    steps: int = 8  # points of the integral

    def check(self) -> None:
        """Raises ValueError when a setting is out of range."""
        check_choice("summary", self.summary, SUMMARIES)
        check_ablation(self.ablation)
        check_steps(self, "steps")


def effects(instrument: Instrument, prompts: Prompts, memory: str) -> Float[Tensor, "B E"]:
    """Returns each removed edge's |part| in the KL, nats; edges in the order of the mask."""
    engine, circuit, ablation = instrument.against
    kept, steps = circuit.mask, instrument.config.steps
    removed = off_circuit(engine, kept)

    def work(batch: Prompts) -> Tensor:
        kl = partial(deviation_from(engine, ablation, batch, "kl"), per_example=True)
        points = midpoints(steps, halfway(len(batch)))
        return integrated(engine, kept, points, kl)[:, removed].abs().cpu()

    return over_batches(
        work,
        engine,
        prompts,
        lambda size: size.plain + explanation_bytes(size),
        memory=memory,
        shared=ablation.shared_bytes,
    )


EFFECTS = measuring(
    Effects,
    effects,
    lambda config: SUMMARIES[config.summary],
    of_circuit=True,
    ablation=chosen_or_means,
    most_trusted=MOST_TRUSTED,
)
