"""How far the model departs from its circuit on an input.

With M the model and C the circuit (the same model, with every edge off the circuit carrying its
mean over trusted inputs),

    kl           mean over scored positions of KL(M(x) || C(x)), nats
    logit_diff   mean over scored positions of |d(M) - d(C)|,
                 d = the logit of M's first choice less that of its second

averaged over circuits.  It is explained by `mad.attribution`.

Shapes: prompts B, scored positions P, vocabulary V, circuits C, readers R, writers W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.ablation import Ablation, AblationConfig, fit_ablation, restore_ablation
from circuits.batches import in_batches, over_batches
from circuits.circuit import Circuit
from circuits.engine import Engine
from circuits.metrics import METRICS
from circuits.prompts import Prompts
from mad.attribution import explanation_bytes, halfway, integrated, midpoints, rounding, shares
from mad.detector import Context, Explained
from mad.detectors.measured import chosen_or_means
from mad.detectors.settings import check_ablation, check_at_least_one, check_steps
from mad.redrawn import further_circuits, restored_masks, stacked

Measure = Callable[..., Float[Tensor, "B"]]  # how far runs of some prompts are, given the mask


@dataclass
class Deviation:
    """How far the model's output is from its circuit's, on the same input."""

    name: str = "deviation"
    # kl: of the output distributions; logit_diff: of the model's first against second choice
    deviation: str = "kl"
    # what removed edges carry: mean or positional_mean over the fit split, or zero; null: means, by
    # position if edges are
    ablation: str | None = None
    # the first is the one that was extracted, the others are found by its method on redrawn prompts
    circuits: int = 1
    explain_steps: int = 16  # points of the integral when a score is explained

    def check(self) -> None:
        """Raises ValueError when no input could be scored under these settings."""
        if self.deviation not in DEVIATIONS:
            raise ValueError(
                f"deviation={self.deviation!r}, but the deviations are {', '.join(DEVIATIONS)}"
            )
        check_ablation(self.ablation)
        check_at_least_one(self, "circuits")
        check_steps(self, "explain_steps")


@dataclass(frozen=True)
class DeviationDetector:
    """Circuits with the ablation that they are scored under."""

    config: Deviation
    engine: Engine
    circuit: Circuit
    masks: Float[Tensor, "C R W *S"]  # of all circuits; the first is `circuit`
    ablation: Ablation

    @property
    def scores_under(self) -> str:
        """The ablation's name."""
        return self.ablation.name

    def score(self, prompts: Prompts, *, memory: str = "2GB") -> Float[Tensor, "B"]:
        """The mean over circuits of how far the model is from them."""
        return self._measured(self._scores, prompts, memory)

    def noise(self, prompts: Prompts, *, memory: str = "2GB") -> Float[Tensor, "B"]:
        """How far the model is from itself, run as a circuit that keeps every edge."""
        return self._measured(self._noise, prompts, memory)

    @torch.no_grad()
    def _measured(
        self, of: Callable[[Measure], Tensor], prompts: Prompts, memory: str
    ) -> Float[Tensor, "B"]:
        return over_batches(
            lambda batch: of(self._deviation(batch)).cpu(),
            self.engine,
            prompts,
            lambda size: size.plain + size.masked(),
            memory=memory,
            shared=self.ablation.shared_bytes,
        )

    def explain(
        self, prompts: Prompts, *, scores: Tensor | None = None, memory: str = "2GB"
    ) -> Iterator[Explained]:
        """Yields shares of the score by edge, batch by batch; `scores` is not needed."""
        for batch in in_batches(
            self.engine,
            prompts,
            lambda size: size.plain + explanation_bytes(size),
            memory=memory,
            shared=self.ablation.shared_bytes,
        ):
            yield self._explained(batch)

    def _explained(self, prompts: Prompts) -> Explained:
        with torch.no_grad():
            measure = self._deviation(prompts)
            scores, noise = self._scores(measure), self._noise(measure)
        measure_each = partial(measure, per_example=True)
        total = torch.zeros(len(prompts), *self.circuit.kept.shape, device=self.engine.device)
        points = midpoints(self.config.explain_steps, halfway(len(prompts)))
        for mask in self.masks:
            total += integrated(self.engine, mask, points, measure_each)
        return shares(total / len(self.masks), scores, noise)

    def _deviation(self, prompts: Prompts) -> Measure:
        return deviation_from(self.engine, self.ablation, prompts, self.config.deviation)

    def _scores(self, measure: Measure) -> Float[Tensor, "B"]:
        return torch.stack([measure(mask).float() for mask in self.masks]).mean(0)

    def _noise(self, measure: Measure) -> Float[Tensor, "B"]:
        every = self.engine.graph.exists.to(self.masks)
        return rounding(self.engine, measure(every).float())

    def state(self) -> Mapping[str, Tensor]:
        """The means, and the further circuits; the first is saved beside the detector."""
        further = {} if len(self.masks) == 1 else {"masks": self.masks[1:].bool()}
        return {**self.ablation.state(), **further}


@torch.no_grad()
def deviation_from(engine: Engine, ablation: Ablation, prompts: Prompts, deviation: str) -> Measure:
    """Returns how far runs of some prompts are from the model, as a function of the mask."""
    reference, ablated = engine.logits(prompts), ablation.values(engine, prompts)

    def measure(mask: Tensor, *, per_example: bool = False) -> Float[Tensor, "B"]:
        logits = engine.masked(prompts, mask, ablated, per_example=per_example)
        return DEVIATIONS[deviation](logits, prompts, reference)

    return measure


def _logit_diff(logits: Tensor, prompts: Prompts, reference: Tensor) -> Tensor:
    choices = reference.topk(2, -1).indices

    def difference(values: Tensor) -> Tensor:
        first, second = values.float().gather(-1, choices).unbind(-1)  # [B, P] each
        return first - second

    return prompts.mean_over_scored((difference(reference) - difference(logits)).abs())


DEVIATIONS: dict[str, Callable[[Tensor, Prompts, Tensor], Tensor]] = {
    "kl": METRICS["kl"],
    "logit_diff": _logit_diff,
}


def fit_deviation(
    config: Deviation, context: Context, trusted: Prompts, *, memory: str = "2GB"
) -> DeviationDetector:
    """Returns the detector with means over trusted prompts.

    Raises:
        ValueError: no circuit, an unknown deviation, an ablation that new inputs cannot have, or a
            circuit that cannot be found again where there are to be more.
    """
    circuit, engine = context.circuit_for(config.name), context.engine
    config.check()
    chosen = AblationConfig(chosen_or_means(config, engine))
    ablation = fit_ablation(chosen, engine, trusted, memory=memory)
    further = further_circuits(circuit, engine, trusted, config.circuits - 1, memory=memory)
    return DeviationDetector(config, engine, circuit, stacked(circuit, further), ablation)


def restore_deviation(
    config: Deviation, context: Context, state: Mapping[str, Tensor], *, memory: str = "2GB"
) -> DeviationDetector:
    """Returns a saved detector."""
    config.check()
    circuit, engine = context.circuit_for(config.name), context.engine
    means = {name: tensor for name, tensor in state.items() if name != "masks"}
    ablation = restore_ablation(chosen_or_means(config, engine), engine, means)
    masks = restored_masks(circuit, config.circuits, state)
    return DeviationDetector(config, engine, circuit, masks, ablation)
