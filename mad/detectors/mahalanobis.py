"""Squared Mahalanobis distance of the residual stream from trusted ones, which needs no circuit.

With h_l the residual stream after l blocks (0: the embedding) at a token, each layer l has

    d_l = mean or largest over tokens of  (h_l - mean_l)' C_l^-1 (h_l - mean_l)

with C_l the shrunk covariance of trusted tokens (Lee et al. 2018, arXiv 1807.03888, without
classes).  Layers are put together, by their mean or the largest, after each d_l was divided by its
mean on trusted prompts.  A layer without spread, such as the embedding of a last token that never
varies, counts as 0.

Shapes: prompts B, positions S, d_model D, layers L (those that are looked at), tokens N.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.batches import in_batches
from circuits.engine import Engine
from circuits.engine.memory import Footprint
from circuits.files import refuse_not_finite, restored_tensors
from circuits.prompts import Prompts
from mad.detector import Context, labelled, part
from mad.detectors.settings import check_choice, check_shrinkage
from mad.statistics import Gaussian, Moments, from_precision

REDUCTIONS = {"largest": "amax", "mean": "mean"}  # over tokens


@dataclass
class Mahalanobis:
    """Distance of the residual stream from trusted ones."""

    name: str = "mahalanobis"
    # last: after the last block; a number: after so many blocks, 0 being the embedding; mean, max:
    # over all of them
    layers: str = "last"
    tokens: str = "scored"  # where distances are taken: scored positions, or all tokens
    over_tokens: str = "largest"  # of a prompt's distances: largest or mean
    # of the covariance towards a multiple of the identity; keeps it invertible
    shrinkage: float = 1e-3

    def check(self) -> None:
        """Raises ValueError when a setting is out of range."""
        if self.layers not in ("last", "mean", "max") and not self.layers.isdecimal():
            raise ValueError(
                f"layers={self.layers!r}, but it must be last, mean, max or a number of blocks"
            )
        check_choice("tokens", self.tokens, ("scored", "all"))
        check_choice("over_tokens", self.over_tokens, REDUCTIONS)
        check_shrinkage(self.shrinkage)

    def chosen(self, n_layers: int) -> Sequence[int]:
        """Which layers are looked at in a model of so many blocks.

        Raises:
            ValueError: it does not have that many.
        """
        if self.layers in ("mean", "max"):
            return range(n_layers + 1)
        layer = n_layers if self.layers == "last" else int(self.layers)
        if layer > n_layers:
            raise ValueError(f"layers={layer}, but the model has {n_layers} blocks; lower it")
        return [layer]


@dataclass(frozen=True)
class MahalanobisDetector:
    """What trusted residual streams are like, by layer."""

    config: Mahalanobis
    engine: Engine
    gaussians: Mapping[int, Gaussian]  # by layer
    typical: Float[Tensor, "L"]  # mean distance of trusted prompts; 1 where layers stay alone
    circuit = None
    scores_under = None

    def score(self, prompts: Prompts, *, memory: str = "2GB") -> Float[Tensor, "B"]:
        """The squared distance, over layers and tokens."""
        distances = _distances(self.config, self.engine, self.gaussians, prompts, memory)
        relative = torch.where(self.typical > 0, distances / self.typical, 0.0)
        return (relative.amax(1) if self.config.layers == "max" else relative.mean(1)).float()

    def state(self) -> dict[str, Tensor]:
        """What trusted streams are like."""
        state = {"typical": self.typical}
        for layer, gaussian in self.gaussians.items():
            state |= labelled(str(layer), vars(gaussian))
        return state


def fit_mahalanobis(
    config: Mahalanobis, context: Context, trusted: Prompts, *, memory: str = "2GB"
) -> MahalanobisDetector:
    """Returns the detector with means and covariances of trusted prompts.

    Raises:
        ValueError: fewer than two trusted tokens, or a setting out of range.
    """
    config.check()
    engine = context.engine
    moments = {layer: Moments() for layer in config.chosen(engine.graph.n_layers)}
    for rows, _, _ in _token_rows(config, engine, trusted, memory):
        for own, values in zip(moments.values(), rows, strict=True):
            own.add(values)
    gaussians = {layer: own.gaussian(config.shrinkage) for layer, own in moments.items()}
    typical = torch.ones(1, dtype=torch.float64)
    if len(gaussians) > 1:
        typical = _distances(config, engine, gaussians, trusted, memory).mean(0)
    return MahalanobisDetector(config, engine, gaussians, typical)


def restore_mahalanobis(
    config: Mahalanobis, context: Context, state: Mapping[str, Tensor], *, memory: str = "2GB"
) -> MahalanobisDetector:
    """Returns a saved detector."""
    config.check()
    layers = config.chosen(context.engine.graph.n_layers)
    if "precision" in state:  # version 0.1: the last layer alone
        gaussians = {layers[0]: from_precision(state["mean"], state["precision"])}
        return MahalanobisDetector(config, context.engine, gaussians, state["mean"].new_ones(1))
    width, typical = context.engine.architecture.width, state["typical"]
    if typical.shape != (len(layers),) or typical.dtype != torch.float64:
        raise TypeError(f"typical is {typical.dtype} of shape {tuple(typical.shape)}")
    refuse_not_finite("typical", typical)
    gaussians = {
        layer: restored_tensors(Gaussian, part(str(layer), state), c=width) for layer in layers
    }
    return MahalanobisDetector(config, context.engine, gaussians, typical)


def _distances(
    config: Mahalanobis,
    engine: Engine,
    gaussians: Mapping[int, Gaussian],
    prompts: Prompts,
    memory: str,
) -> Float[Tensor, "B L"]:
    """Each prompt's distance at each layer, over its tokens."""
    found = []
    for rows, owner, n_prompts in _token_rows(config, engine, prompts, memory):
        own = zip(gaussians.values(), rows, strict=True)
        distances = torch.stack([gaussian.squared_distance(values) for gaussian, values in own])
        reduced = distances.new_zeros(len(distances), n_prompts).scatter_reduce(
            1,
            owner.expand_as(distances),
            distances,
            reduce=REDUCTIONS[config.over_tokens],
            include_self=False,
        )
        found.append(reduced.T)
    return torch.cat(found)


@torch.no_grad()
def _token_rows(
    config: Mahalanobis, engine: Engine, prompts: Prompts, memory: str
) -> Iterator[tuple[Float[Tensor, "L N D"], Int[Tensor, "N"], int]]:
    """Yields residual streams at tokens, in float64 on the CPU; whose each token is; of how many.

    The stream where the logits are read from costs no more than a plain run.
    """
    layers, n_layers = config.chosen(engine.graph.n_layers), engine.graph.n_layers
    plain = config.tokens == "scored" and list(layers) == [n_layers]

    def each(size: Footprint) -> int:
        if plain:
            return size.plain
        # rows, and what a distance makes of them, in float64
        wide = 4 * 8 * len(layers) * size.tokens * size.width
        return size.prepared(True) + size.preparing(True) + wide

    for batch in in_batches(engine, prompts, each, memory=memory):
        scored = batch.positions >= 0
        owner, column = (scored if config.tokens == "scored" else batch.key_mask).nonzero().T
        if plain:
            rows = engine.residual(batch)[None, owner, column]
        else:
            position = batch.positions[owner, column] if config.tokens == "scored" else column
            rows = residual_stream(engine, batch)[:, owner, position][[*layers]]
        yield rows.double().cpu(), owner.cpu(), len(batch)


def residual_stream(engine: Engine, prompts: Prompts) -> Float[Tensor, "L B S D"]:
    """Returns the residual stream before the first block and after each, without the final norm."""
    return engine.ablated(engine.writers(prompts)).base[::2]
