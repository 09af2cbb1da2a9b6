"""How far the model departs from its circuit on an input.

With M the model and C the circuit (the same model, with every edge off the circuit carrying its
mean over trusted inputs),

    kl           mean over scored positions of KL(M(x) || C(x)), nats
    logit_diff   mean over scored positions of |d(M) - d(C)|, d = the logit of M's first choice less that of its second

An explanation shares the score out over the edges off the circuit by integrated gradients along the
mask, from the circuit (alpha = 0) to the model (alpha = 1), where the score is 0:

    part(e) = - integral over alpha of dscore / dm_e    at mask  circuit + alpha (1 - circuit)

(Sundararajan et al. 2017, arXiv 1703.01365); by completeness the parts sum to the score.  The
integral is a midpoint sum; what it misses is the residual.

Shapes: prompts B, scored positions P, vocabulary V, readers R, writers W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.ablation import Ablation, AblationConfig, fit_ablation, restore_ablation
from circuits.circuit import Circuit
from circuits.engine import Engine
from circuits.engine.masked import Ablated
from circuits.engine.memory import footprint, most_prompts, parse_memory
from circuits.metrics import METRICS
from circuits.prompts import Prompts
from mad.detector import Context, Explained


@dataclass
class Deviation:
    """How far the model's output is from its circuit's, on the same input."""

    name: str = "deviation"
    # kl: of the output distributions; logit_diff: of the model's first against second choice
    deviation: str = "kl"
    ablation: str = (
        "mean"  # what removed edges carry: mean or positional_mean over the fit split, or zero
    )
    explain_steps: int = 16  # points of the integral when a score is explained

    def check(self) -> None:
        """Raises ValueError when no input could be scored under these settings."""
        if self.deviation not in DEVIATIONS:
            raise ValueError(
                f"deviation={self.deviation!r}, but the deviations are {', '.join(DEVIATIONS)}"
            )
        if self.ablation not in ("mean", "positional_mean", "zero"):
            raise ValueError(
                f"detector.ablation={self.ablation!r}, but new inputs have no corrupt twin: use "
                "mean, positional_mean "
                "or zero"
            )
        if self.explain_steps < 1:
            raise ValueError(f"explain_steps={self.explain_steps}, but at least 1 is needed")


@dataclass(frozen=True)
class CircuitDetector:
    """A circuit with the ablation that it is scored under."""

    config: Deviation
    engine: Engine
    circuit: Circuit
    ablation: Ablation

    @torch.no_grad()
    def score(self, prompts: Prompts, *, memory: str = "2GB") -> Float[Tensor, "B"]:
        """The deviation of the model from the circuit."""
        size = footprint(self.engine, prompts)
        return torch.cat(
            [
                self._score(batch)
                for batch in self._batches(prompts, size.plain + size.masked(), memory)
            ]
        )

    def _score(self, prompts: Prompts) -> Float[Tensor, "B"]:
        prompts = prompts.to(self.engine.device)
        return self._deviation(prompts, self.circuit.mask, *self._ends(prompts)).cpu().float()

    def _batches(self, prompts: Prompts, each: int, memory: str) -> Iterator[Prompts]:
        """As many prompts at a time as fit, each of which takes so many bytes beside the ablated
        values.
        """
        size = footprint(self.engine, prompts)
        shared = size.shared(self.ablation.per_prompt) + size.mask
        return prompts.batches(most_prompts(prompts, each, parse_memory(memory), shared))

    def _ends(self, prompts: Prompts) -> tuple[Float[Tensor, "B P V"], Ablated]:
        """What a deviation is measured from: the model's logits, and what removed edges carry."""
        reference = self.engine.logits(prompts)
        return reference, self.ablation.values(self.engine, prompts)

    def _deviation(
        self,
        prompts: Prompts,
        mask: Tensor,
        reference: Tensor,
        ablated: Ablated,
        *,
        per_example: bool = False,
    ) -> Float[Tensor, "B"]:
        """How far the run under a mask, or under one mask per prompt, is from the model."""
        logits = self.engine.masked(prompts, mask, ablated, per_example=per_example)
        return DEVIATIONS[self.config.deviation](logits, prompts, reference)

    def explain(self, prompts: Prompts, *, memory: str = "2GB") -> Explained:
        """Shares of the score by edge, from one forward and backward pass per point of the
        integral.
        """
        size = footprint(self.engine, prompts)
        parts = [
            self._explain(batch)
            for batch in self._batches(prompts, size.plain + size.explanation, memory)
        ]
        shares, residuals = (
            [getattr(part, name) for part in parts] for name in ("shares", "residual")
        )
        return Explained(torch.cat(shares), torch.cat(residuals))

    def _explain(self, prompts: Prompts) -> Explained:
        engine, prompts, steps = (
            self.engine,
            prompts.to(self.engine.device),
            self.config.explain_steps,
        )
        with torch.no_grad():
            reference, ablated = self._ends(prompts)
            scores = self._deviation(prompts, self.circuit.mask, reference, ablated).float()
        total = integrated(
            engine,
            self.circuit.mask,
            len(prompts),
            steps,
            lambda masks: self._deviation(prompts, masks, reference, ablated, per_example=True),
        )
        flat = total.flatten(1) / scores.clamp(min=torch.finfo(scores.dtype).tiny)[:, None]
        return Explained(flat.view(total.shape).cpu(), (1 - flat.sum(1)).cpu())

    def state(self) -> Mapping[str, Tensor]:
        """The means; the circuit is saved beside the detector."""
        return self.ablation.state()


def integrated(
    engine: Engine,
    kept: Float[Tensor, "R W *S"],
    rows: int,
    steps: int,
    measure: Callable[[Float[Tensor, "n R W *S"]], Float[Tensor, "n"]],
) -> Float[Tensor, "n R W *S"]:
    """Returns - integral of d measure / d mask from a circuit to the model, by edge off the
    circuit, for each of n rows.

    `measure` takes one mask per row and runs under all of them; the integral is a sum over so many
    midpoints.
    """
    kept = kept.to(engine.device)
    off = engine.graph.exists.to(engine.device) & (kept == 0)
    total = torch.zeros(rows, *kept.shape, device=engine.device)
    for step in range(steps):
        masks = (
            (kept + (step + 0.5) / steps * off)
            .repeat(rows, *(1 for _ in kept.shape))
            .requires_grad_()
        )
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(measure(masks).sum(), masks)
        total -= gradient * off / steps
    return total


def _kl(logits: Tensor, prompts: Prompts, reference: Tensor) -> Tensor:
    return METRICS["kl"](logits, prompts, reference)


def _logit_diff(logits: Tensor, prompts: Prompts, reference: Tensor) -> Tensor:
    first, second = reference.topk(2, -1).indices.unbind(-1)  # [B, P] each

    def difference(values: Tensor) -> Tensor:
        pair = values.float().gather(-1, torch.stack((first, second), -1))
        return pair[..., 0] - pair[..., 1]

    scored = (prompts.positions >= 0).float()
    return ((difference(reference) - difference(logits)).abs() * scored).sum(-1) / scored.sum(-1)


DEVIATIONS: dict[str, Callable[[Tensor, Prompts, Tensor], Tensor]] = {
    "kl": _kl,
    "logit_diff": _logit_diff,
}


def fit_deviation(
    config: Deviation, context: Context, trusted: Prompts, *, memory: str = "2GB"
) -> CircuitDetector:
    """Returns the circuit detector with means over trusted prompts.

    Raises:
        ValueError: no circuit, an unknown deviation, or an ablation that new inputs cannot have.
    """
    circuit = context.circuit_for(config.name)
    config.check()
    ablation = fit_ablation(AblationConfig(config.ablation), context.engine, trusted, memory=memory)
    return CircuitDetector(config, context.engine, circuit, ablation)


def restore_deviation(
    config: Deviation, context: Context, state: Mapping[str, Tensor]
) -> CircuitDetector:
    """Returns a saved circuit detector."""
    config.check()
    ablation = restore_ablation(config.ablation, context.engine, state)
    return CircuitDetector(config, context.engine, context.circuit_for(config.name), ablation)
