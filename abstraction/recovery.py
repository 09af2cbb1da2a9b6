"""What causal scrubbing leaves of a behaviour, beside the points at which nothing is left of it.

    recovered = (zero - scrubbed) / (zero - model)          of the means of a metric over prompts

of the loss: `loss recovered` (Chan et al. 2022).  Which zero is part of the figure:

    permuted        the model's own answers, held against another prompt's labels
    unconditional   the same nodes scrubbed with nothing held fixed: all features dropped
    marginal        always answering as often as each answer occurs, whatever the prompt

A confident model pays dearly for a wrong answer, so that against `permuted` a wrong hypothesis may
recover most of the loss, and no accuracy.  Means hide what cancels: the mean |difference| from the
model is told too.  Errors are standard errors over prompts, each prompt's resamples averaged first.

Shapes: prompts N, resamples K.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from abstraction.draws import Visit
from abstraction.features import Classes
from abstraction.hypothesis import Hypothesis
from circuits.circuit import Circuit
from circuits.prompts import Prompts

ZEROS = ("permuted", "unconditional", "marginal")
SMALLEST_GAP = 2.0  # standard errors between model and zero, below which a share means nothing


@dataclass(frozen=True)
class NodeDraws:
    """How a node's inputs were drawn: one way on which it is read."""

    name: str
    reader: str
    classes: int  # kinds of prompts that its feature tells apart
    mean_size: float  # prompts that agree with a prompt, itself included, on average
    alone: float  # share of prompts that agree with no other: nothing is exchanged there
    itself: float  # share of runs in which it was run on its reader's own input

    @classmethod
    def of(cls, visit: Visit, reader: Visit, agreeing: Mapping[str, Classes]) -> NodeDraws:
        """What a visit drew, as its reader saw it."""
        own, rows = agreeing[visit.name], reader.rows.get(visit.name)
        drawn = visit.references if rows is None else visit.references[rows]
        same = (drawn == reader.references).double().mean().item()
        sizes = own.size[own.of_prompt].double()
        alone = own.alone.double().mean().item()
        return cls(visit.name, reader.name, len(own.size), sizes.mean().item(), alone, same)


@dataclass(frozen=True)
class Share:
    """How much of a metric is recovered, with its standard error over prompts."""

    value: float
    error: float


@dataclass(frozen=True)
class Recovery:
    """What is left of a behaviour when a hypothesis is scrubbed.  Figures by metric, by prompt."""

    hypothesis: Hypothesis | Circuit
    mode: str
    resamples: int
    exclude_self: bool
    seed: int
    scrubbed: Mapping[str, Float[Tensor, "N K"]]
    unconditional: Mapping[str, Float[Tensor, "N K"]]
    model: Mapping[str, Float[Tensor, " N"]]
    permuted: Mapping[str, Float[Tensor, " N"]]
    marginal: Mapping[str, Float[Tensor, " N"]]
    draws: tuple[NodeDraws, ...]

    def zero(self, name: str, metric: str) -> Float[Tensor, " N"] | None:
        """A metric at a zero point, by prompt; None where that has no such metric."""
        if name == "unconditional":
            return self.unconditional[metric].mean(1)
        if name not in ZEROS:
            raise ValueError(f"zero={name!r}, but the zero points are {', '.join(ZEROS)}")
        return (self.permuted if name == "permuted" else self.marginal).get(metric)

    def recovered(self, metric: str = "cross_entropy", zero: str = "permuted") -> Share:
        """The share of a metric that is recovered.

        Raises:
            ValueError: no such metric or zero point, or one that is within two standard errors of
                the model, so that there is nothing to recover.
        """
        if metric not in self.scrubbed:
            raise ValueError(
                f"metric={metric!r}, but {', '.join(self.scrubbed)} were measured; the prompts "
                "must have what a metric needs"
            )
        nothing = self.zero(zero, metric)
        if nothing is None:
            raise ValueError(f"zero={zero!r} has no {metric}; use another zero point or metric")
        model, scrubbed = self.model[metric], self.scrubbed[metric].mean(1)
        gap = (nothing - model).mean().item()
        if not abs(gap) > SMALLEST_GAP * _error(nothing - model):
            raise ValueError(
                f"by {metric} the model ({model.mean():.3g}) is as good as the zero point {zero} "
                f"({nothing.mean():.3g}), so that there is nothing to recover; use another metric, "
                "or more prompts"
            )
        value = (nothing - scrubbed).mean().item() / gap
        return Share(value, _error(nothing - scrubbed - value * (nothing - model)) / abs(gap))

    def difference(self, metric: str = "cross_entropy") -> Float[Tensor, " N"]:
        """Mean |scrubbed - model| of each prompt."""
        return (self.scrubbed[metric] - self.model[metric][:, None]).abs().mean(1)

    def to_json(self) -> dict[str, Any]:
        """Figures of each metric, and how inputs were drawn; per-prompt values are not told."""
        figures = {}
        for metric, values in self.scrubbed.items():
            zeros = {zero: self.zero(zero, metric) for zero in ZEROS}
            zeros = {zero: nothing for zero, nothing in zeros.items() if nothing is not None}
            shares = {}
            for zero in zeros:
                try:
                    shares[zero] = asdict(self.recovered(metric, zero))
                except ValueError:
                    shares[zero] = None
            figures[metric] = {
                "model": self.model[metric].mean().item(),
                "scrubbed": values.mean().item(),
                "zero": {zero: nothing.mean().item() for zero, nothing in zeros.items()},
                "recovered": shares,
                "mean_difference": self.difference(metric).mean().item(),
            }
        if isinstance(self.hypothesis, Hypothesis):
            told = self.hypothesis.to_json()
        else:
            told = {"circuit": len(self.hypothesis), "edges": self.hypothesis.graph.n_edges}
        return {
            "hypothesis": told,
            "mode": self.mode,
            "prompts": len(next(iter(self.model.values()))),
            "resamples": self.resamples,
            "exclude_self": self.exclude_self,
            "seed": self.seed,
            "figures": figures,
            "draws": [asdict(draw) for draw in self.draws],
        }


def _error(values: Float[Tensor, " N"]) -> float:
    """The standard error of a mean over prompts."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.inf


def label_marginal(prompts: Prompts) -> dict[str, Float[Tensor, " N"]]:
    """Loss and accuracy of answering as often as each answer occurs among the prompts.

    Where several answers are right each counts its part.
    """
    if prompts.answers is None:
        return {}
    answers = prompts.answers
    present = answers >= 0
    each = present.double() / present.sum(-1, keepdim=True).clamp(min=1)
    shares = torch.zeros(int(answers.max()) + 1, dtype=torch.float64)
    shares.scatter_add_(0, answers[present], each[present])
    shares /= shares.sum()
    right = torch.where(present, shares[answers.clamp(min=0)], 0.0).sum(-1)
    scored = prompts.positions >= 0
    count = scored.sum(-1)
    best = (answers == shares.argmax()).any(-1).double()
    loss = torch.where(scored, -right.clamp(min=1e-300).log(), 0.0)
    return {
        "cross_entropy": loss.sum(-1) / count,
        "accuracy": torch.where(scored, best, 0.0).sum(-1) / count,
    }
