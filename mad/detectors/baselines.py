"""Baselines that know no circuit, from well-kept libraries.

    max_probability   minus the log-probability of the model's first choice, averaged over scored positions
                      (Hendrycks & Gimpel 2017, arXiv 1610.02136)
    mahalanobis       the largest squared Mahalanobis distance of the last block's residual at a scored position from
                      trusted ones, with scikit-learn's shrunk covariance (Lee et al. 2018, arXiv 1807.03888)

Shapes: prompts B, scored positions P, d_model D.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.engine import Engine
from circuits.engine.memory import footprint, most_prompts, parse_memory
from circuits.prompts import Prompts
from mad.detector import Context


def _batches(engine: Engine, prompts: Prompts, memory: str) -> Iterator[Prompts]:
    """As many prompts at a time as fit into a plain run."""
    return prompts.batches(
        most_prompts(prompts, footprint(engine, prompts).plain, parse_memory(memory))
    )


@dataclass
class MaxProbability:
    """How unsure the model is."""

    name: str = "max_probability"

    def check(self) -> None:
        """There is nothing to get wrong."""


@dataclass(frozen=True)
class MaxProbabilityDetector:
    """How unsure a model is."""

    config: MaxProbability
    engine: Engine

    def score(self, prompts: Prompts, *, memory: str = "2GB") -> Float[Tensor, "B"]:
        """Minus the log-probability of the first choice."""
        return torch.cat([self._score(batch) for batch in _batches(self.engine, prompts, memory)])

    @torch.no_grad()
    def _score(self, prompts: Prompts) -> Float[Tensor, "B"]:
        prompts = prompts.to(self.engine.device)
        logits = self.engine.logits(prompts).float()
        scored = (prompts.positions >= 0).float()
        return -((logits.log_softmax(-1).amax(-1) * scored).sum(-1) / scored.sum(-1)).cpu()

    def state(self) -> dict[str, Tensor]:
        """Nothing was fitted."""
        return {}


def fit_max_probability(
    config: MaxProbability, context: Context, trusted: Prompts, *, memory: str = "2GB"
) -> MaxProbabilityDetector:
    """Returns the detector; trusted prompts only calibrate it."""
    return MaxProbabilityDetector(config, context.engine)


def restore_max_probability(
    config: MaxProbability, context: Context, state: Mapping[str, Tensor]
) -> MaxProbabilityDetector:
    """Returns a saved detector."""
    return MaxProbabilityDetector(config, context.engine)


@dataclass
class Mahalanobis:
    """Distance of the last residual from trusted ones."""

    name: str = "mahalanobis"
    shrinkage: float = (
        1e-3  # of the covariance towards a multiple of the identity; keeps it invertible
    )

    def check(self) -> None:
        """Raises ValueError when the shrinkage is no share."""
        if not 0 <= self.shrinkage <= 1:
            raise ValueError(f"shrinkage={self.shrinkage}, but it must be from 0 to 1")


@dataclass(frozen=True)
class MahalanobisDetector:
    """A trusted mean and inverse covariance."""

    config: Mahalanobis
    engine: Engine
    mean: Float[Tensor, "D"]
    precision: Float[Tensor, "D D"]

    def score(self, prompts: Prompts, *, memory: str = "2GB") -> Float[Tensor, "B"]:
        """The largest squared distance over the scored positions."""
        return torch.cat([self._score(batch) for batch in _batches(self.engine, prompts, memory)])

    def _score(self, prompts: Prompts) -> Float[Tensor, "B"]:
        residual = _residual(self.engine, prompts) - self.mean
        distance = torch.einsum("bpd,de,bpe->bp", residual, self.precision, residual)
        return distance.masked_fill(prompts.positions.cpu() < 0, float("-inf")).amax(-1).float()

    def state(self) -> dict[str, Tensor]:
        """Mean and inverse covariance."""
        return {"mean": self.mean, "precision": self.precision}


@torch.no_grad()
def _residual(engine: Engine, prompts: Prompts) -> Float[Tensor, "B P D"]:
    """The last block's residual at the scored positions, in float64 on the CPU."""
    prompts = prompts.to(engine.device)
    residual = engine.residual(prompts)
    return residual.double().cpu()


def fit_mahalanobis(
    config: Mahalanobis, context: Context, trusted: Prompts, *, memory: str = "2GB"
) -> MahalanobisDetector:
    """Returns the detector with mean and covariance of trusted prompts.

    Raises:
        ValueError: fewer than two trusted residuals, or a shrinkage outside 0 to 1.
    """
    config.check()
    from sklearn.covariance import ShrunkCovariance

    batches = _batches(context.engine, trusted, memory)
    rows = torch.cat(
        [_residual(context.engine, batch)[batch.positions.cpu() >= 0] for batch in batches]
    )
    if len(rows) < 2:
        raise ValueError(
            f"{len(rows)} trusted residual, but a covariance needs at least 2; give more trusted "
            "prompts"
        )
    fitted = ShrunkCovariance(shrinkage=config.shrinkage).fit(rows.numpy())
    return MahalanobisDetector(
        config,
        context.engine,
        torch.from_numpy(fitted.location_),
        torch.from_numpy(fitted.get_precision()),
    )


def restore_mahalanobis(
    config: Mahalanobis, context: Context, state: Mapping[str, Tensor]
) -> MahalanobisDetector:
    """Returns a saved detector."""
    return MahalanobisDetector(config, context.engine, state["mean"], state["precision"])
