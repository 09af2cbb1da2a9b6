"""Scores that need no circuit, each fitted on the fit part of a subject's trusted prompts; high is
anomalous.

    max_probability             minus the log-probability of the model's first choice (Hendrycks & Gimpel 2017,
                                arXiv 1610.02136)
    mahalanobis_last_*, _all_*  with h_l the residual stream after l blocks (0: the embedding) at the scored or at all
                                real positions,
                                    d_l = mean over those positions of (h_l - mean_l)' precision_l
                                    (h_l - mean_l),
                                each over its mean on the fit part; then the mean or the largest
                                over layers (Lee et al. 2018, arXiv 1807.03888, without classes)
    attribution_mahalanobis     squared Mahalanobis distance of the vector of all edges' attributions,
                                    s(w -> r) = sum over positions of (a_w - mean_w) . dm/dx_r,
                                m = logit of the first choice less that of the second (the
                                attributions of EAP, Syed et al. 2023, arXiv 2310.10348)
    fine_tuned_kl               mean over scored positions of KL(model || the model fine-tuned on trusted prompts), nats
    length                      the number of tokens: what can be had without looking at the model

`layer_baselines` gives the distances at single layers as well.  The best of them is known only to
who knows the anomalies, so it is an oracle and no baseline.

Covariances are shrunk towards a multiple of the identity, as scikit-learn's ShrunkCovariance does.
What has no spread on the fit part, such as the embedding of a last token that never varies, takes
no part.

Shapes: prompts B, positions S, scored positions P, d_model D, layers L (embedding and blocks),
tokens N, writers W, readers R, edges E, vocabulary V.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.ablation import Ablation, AblationConfig, fit_ablation
from circuits.engine import Engine
from circuits.engine.memory import footprint, most_prompts, parse_memory
from circuits.metrics import metric_named
from circuits.model.load import _quietly, local_path
from circuits.prompts import NONE, Prompts
from mad.detectors.baselines import Mahalanobis, MaxProbability, MaxProbabilityDetector
from mad.study.subject import Subject

MEMORY = "500MB"  # that one call works with, beside the weights
NO_SPREAD = 1e-6  # a standard deviation below this share of the values' size is float32's rounding

Score = Callable[[Prompts], Float[Tensor, "B"]]  # float32, on the CPU, high = anomalous
Baseline = Callable[[Subject], Score]


def max_probability(subject: Subject) -> Score:
    """Returns minus the log-probability of the first choice; nothing is fitted."""
    return partial(MaxProbabilityDetector(MaxProbability(), subject.engine).score, memory=MEMORY)


def length(subject: Subject) -> Score:
    """Returns the number of tokens; nothing is fitted."""
    return lambda prompts: prompts.lengths.float().cpu()


# ---- distances of the residual stream
# -----------------------------------------------------------------


@torch.no_grad()
def residual_stream(engine: Engine, prompts: Prompts) -> Float[Tensor, "L B S D"]:
    """Returns the residual stream before the first block and after each, without the final norm."""
    clean = engine.clean(prompts.clean, prompts.key_mask, prompts.positions[:, :1])
    return engine.ablated(clean.writers).base[::2]


def _scored_tokens(prompts: Prompts) -> Bool[Tensor, "B S"]:
    width = prompts.clean.shape[1]
    chosen = torch.zeros(len(prompts), width + 1, dtype=torch.bool, device=prompts.clean.device)
    return chosen.scatter_(1, prompts.positions % (width + 1), True)[
        :, :width
    ]  # -1 is the column that is dropped


def _real_tokens(prompts: Prompts) -> Bool[Tensor, "B S"]:
    return prompts.key_mask


# where a prompt's distance is taken; "last", since in most tasks the last token is the one that is
# scored
PLACES: dict[str, Callable[[Prompts], Bool[Tensor, "B S"]]] = {
    "last": _scored_tokens,
    "all": _real_tokens,
}


@dataclass(frozen=True)
class Normal:
    """A mean and inverse covariance for each layer, in float64; the inverse is 0 where a layer has
    no spread.
    """

    mean: Float[Tensor, "L D"]
    precision: Float[Tensor, "L D D"]

    def squared_distance(self, rows: Float[Tensor, "L N D"]) -> Float[Tensor, "L N"]:
        """Squared Mahalanobis distances from the mean."""
        centred = rows - self.mean[:, None]
        return (centred @ self.precision * centred).sum(-1)


@dataclass(frozen=True)
class LayerDistances:
    """A prompt's distance from the fit part at each layer and place, over its mean on the fit part."""

    engine: Engine
    normals: Mapping[str, Normal]  # by place
    typical: Mapping[str, Float[Tensor, "L"]]  # mean distance on the fit part, by place
    _distances: dict = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, prompts: Prompts) -> Mapping[str, Float[Tensor, "B L"]]:
        """The distances by place; kept, since several scores read them."""
        if id(prompts) not in self._distances:
            found = {
                place: torch.where(self.typical[place] > 0, distance / self.typical[place], 0)
                for place, distance in _distances(self.engine, self.normals, prompts).items()
            }
            self._distances[id(prompts)] = (prompts, found)
        return self._distances[id(prompts)][1]


def fit_layer_distances(subject: Subject, places: Sequence[str] = tuple(PLACES)) -> LayerDistances:
    """Returns the distances from the fit part at some places, in two passes over it.

    Raises:
        ValueError: the fit part has fewer than 2 prompts.
    """
    engine, prompts = subject.engine, _fit_part(subject)
    totals: dict[str, _Sums] = {}
    for batch in _stream_batches(engine, prompts):
        residual = residual_stream(engine, batch)
        for place in places:
            rows = residual[:, PLACES[place](batch)].double().cpu()  # L N D
            totals.setdefault(place, _Sums(shift=rows.mean(1))).add(rows)
    normals = {place: totals[place].normal() for place in places}
    typical = {
        place: found.mean(0) for place, found in _distances(engine, normals, prompts).items()
    }
    return LayerDistances(engine, normals, typical)


def layer_baselines(subject: Subject, places: Sequence[str] = tuple(PLACES)) -> dict[str, Score]:
    """Returns the scores `mahalanobis_PLACE_mean`, `_max` and `_layer_N`, which share their
    distances.

    The best layer, chosen by who knows the anomalies, is an oracle.

    Raises:
        ValueError: the fit part has fewer than 2 prompts.
    """
    distances = fit_layer_distances(subject, places)
    scores: dict[str, Score] = {}
    for place in places:
        for name, over_layers in _over_layers(len(distances.typical[place])).items():
            scores[f"mahalanobis_{place}_{name}"] = partial(
                _layer_score, distances, place, over_layers
            )
    return scores


def _over_layers(n_layers: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """What can be made of distances [B, L], by name."""
    layers = {
        f"layer_{layer}": partial(torch.select, dim=1, index=layer) for layer in range(n_layers)
    }
    return {"mean": partial(torch.mean, dim=1), "max": partial(torch.amax, dim=1), **layers}


def _layer_score(
    distances: LayerDistances, place: str, over_layers: Callable[[Tensor], Tensor], prompts: Prompts
) -> Float[Tensor, "B"]:
    return over_layers(distances(prompts)[place]).float()


def _layer_baseline(place: str, name: str, subject: Subject) -> Score:
    return layer_baselines(subject, (place,))[f"mahalanobis_{place}_{name}"]


def _distances(
    engine: Engine, normals: Mapping[str, Normal], prompts: Prompts
) -> dict[str, Float[Tensor, "B L"]]:
    """The mean squared distance over each prompt's tokens, by place."""
    found: dict[str, list[Tensor]] = {place: [] for place in normals}
    for batch in _stream_batches(engine, prompts):
        residual = residual_stream(engine, batch)
        for place, normal in normals.items():
            chosen = PLACES[place](batch)  # B S
            distance = normal.squared_distance(residual[:, chosen].double().cpu())  # L N
            chosen = chosen.cpu()
            total = distance.new_zeros(len(batch), len(distance)).index_add_(
                0, chosen.nonzero()[:, 0], distance.T
            )
            found[place].append(total / chosen.sum(1, keepdim=True))
    return {place: torch.cat(parts) for place, parts in found.items()}


@dataclass
class _Sums:
    """Sums over tokens of what a mean and a covariance need, less a shift near the mean against
    cancellation.
    """

    shift: Float[Tensor, "L D"]
    count: int = 0
    first: Tensor | float = 0.0
    second: Tensor | float = 0.0

    def add(self, rows: Float[Tensor, "L N D"]) -> None:
        centred = rows - self.shift[:, None]
        self.count += rows.shape[1]
        self.first = self.first + centred.sum(1)
        self.second = self.second + centred.mT @ centred

    def normal(self) -> Normal:
        assert isinstance(self.first, Tensor) and isinstance(self.second, Tensor)
        offset = self.first / self.count
        mean, covariance = (
            self.shift + offset,
            self.second / self.count - offset[:, :, None] * offset[:, None],
        )
        return Normal(mean, torch.stack([_precision(*layer) for layer in zip(mean, covariance)]))


def _precision(mean: Float[Tensor, "D"], covariance: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """The inverse of the shrunk covariance; 0 where there is no spread."""
    from scipy.linalg import pinvh
    from sklearn.covariance import shrunk_covariance

    if covariance.trace() <= NO_SPREAD**2 * mean.square().sum():
        return torch.zeros_like(covariance)
    return torch.from_numpy(pinvh(shrunk_covariance(covariance.numpy(), Mahalanobis().shrinkage)))


def _stream_batches(engine: Engine, prompts: Prompts) -> Iterator[Prompts]:
    size = footprint(engine, prompts)
    in_float64 = (
        4 * 8 * (size.layers + 1) * size.tokens * size.width
    )  # rows, centred, times precision, times centred
    return _batches(engine, prompts, size.prepared(True) + size.preparing(True) + in_float64)


# ---- distances of attributions
# ------------------------------------------------------------------------

ATTRIBUTION_SHRINKAGE = 0.1  # of edges' attributions: there may be more edges than prompts


@torch.no_grad()
def attributions(engine: Engine, means: Ablation, prompts: Prompts) -> Float[Tensor, "B E"]:
    """Returns each prompt's attribution of each edge, in the order of `Graph.edges`; float32, on
    the CPU.

    One forward pass for what writers write, and one forward and one backward pass for the
    gradients.  The attributed number is a difference of logits, since that of log-probabilities
    saturates; it is averaged over scored positions.
    """
    graph, rows = engine.graph, []
    assert graph.n_positions is None, "edges must be the same at every position"
    size = footprint(engine, prompts)
    for batch in _batches(
        engine, prompts, 2 * size.attribution
    ):  # twice: the products are made from copies
        clean = engine.clean(batch.clean, batch.key_mask, batch.positions)
        embedded = clean.writers[: graph.n_inputs].sum(0)
        difference = clean.writers.sub_(means.writers(engine, batch))
        products = torch.zeros(
            len(batch), *graph.exists.shape, dtype=engine.dtype, device=engine.device
        )
        lead = partial(_lead, positions=batch.positions)
        for first, gradients in engine.reader_gradients(
            embedded, lead, batch.key_mask, batch.positions
        ):
            upstream = graph.upstream[first]
            products[:, first : first + len(gradients), :upstream] = torch.einsum(
                "rbsd,wbsd->brw", gradients, difference[:upstream]
            )
        rows.append(products[:, graph.exists.to(engine.device)].float().cpu())
    return torch.cat(rows)


def _lead(logits: Float[Tensor, "B P V"], positions: Int[Tensor, "B P"]) -> Float[Tensor, ""]:
    """The first choice's logit less the second's, averaged over scored positions and summed over
    prompts.
    """
    first, second = logits.topk(2).values.unbind(-1)  # each B P
    scored = (positions >= 0).to(logits.dtype)
    return ((first - second) * scored / scored.sum(-1, keepdim=True)).sum()


@dataclass(frozen=True)
class Standardised:
    """A mean and shrunk covariance of columns that are scaled to unit variance, in float64.

    The inverse is kept as the identity over the shrinkage and what differs from it, in the
    directions of at most as many eigenvectors as there were rows: edges may be thousands.
    """

    mean: Float[Tensor, "E"]
    scale: Float[Tensor, "E"]  # one over the standard deviation; 0 where there is no spread
    directions: Float[Tensor, "E K"]
    inverse: Float[Tensor, "K"]  # of the shrunk eigenvalues
    shrinkage: float

    def squared_distance(self, rows: Float[Tensor, "B E"]) -> Float[Tensor, "B"]:
        """Squared Mahalanobis distances from the mean."""
        scaled = (rows - self.mean) * self.scale
        along = (scaled @ self.directions).square()
        return scaled.square().sum(1) / self.shrinkage + along @ (self.inverse - 1 / self.shrinkage)


def standardise(rows: Float[Tensor, "B E"], shrinkage: float) -> Standardised:
    """Returns mean and covariance of float64 rows after each column is scaled to unit variance.

    A column whose standard deviation is below `NO_SPREAD` of the largest is left out.
    """
    mean, deviation = rows.mean(0), rows.std(0, correction=0)
    scale = torch.where(deviation > NO_SPREAD * deviation.max(), 1 / deviation, 0)
    _, singular, directions = torch.linalg.svd((rows - mean) * scale, full_matrices=False)
    eigenvalues = singular.square() / len(
        rows
    )  # their mean over columns is 1, to which they are shrunk
    return Standardised(
        mean, scale, directions.T, 1 / ((1 - shrinkage) * eigenvalues + shrinkage), shrinkage
    )


def attribution_mahalanobis(subject: Subject) -> Score:
    """Returns the squared Mahalanobis distance of a prompt's attributions of all edges.

    Raises:
        ValueError: the fit part has fewer than 2 prompts.
    """
    fit = _fit_part(subject)
    means = fit_ablation(AblationConfig("mean"), subject.engine, fit, memory=MEMORY)
    fitted = standardise(attributions(subject.engine, means, fit).double(), ATTRIBUTION_SHRINKAGE)

    def score(prompts: Prompts) -> Float[Tensor, "B"]:
        return fitted.squared_distance(
            attributions(subject.engine, means, prompts).double()
        ).float()

    return score


# ---- KL to a fine-tuned model
# -------------------------------------------------------------------------


@dataclass(frozen=True)
class FineTuning:
    """How the copy is trained on the fit part."""

    steps: int = 200  # of AdamW, on all weights
    batch: int = 64  # prompts in each, drawn without replacement
    learning_rate: float = 3e-3
    weight_decay: float = 0.1  # moves the copy off what trusted prompts do not need


def fine_tuned_kl(subject: Subject, config: FineTuning = FineTuning()) -> Score:  # noqa: B008
    """Returns KL(model || fine-tuned copy) at the scored positions.

    Raises:
        ValueError: the model did not come from a HuggingFace folder.
    """
    engine, tuned, kl = subject.engine, fine_tune(subject, config), metric_named("kl")

    @torch.no_grad()
    def score(prompts: Prompts) -> Float[Tensor, "B"]:
        scores = []
        for batch in _batches(
            engine, prompts, 3 * footprint(engine, prompts).plain
        ):  # two runs, and their metric
            model = engine.logits(batch.clean, batch.key_mask, batch.positions)
            scores.append(kl(_logits(tuned, batch), batch, model).float().cpu())
        return torch.cat(scores)

    return score


def fine_tune(subject: Subject, config: FineTuning) -> Any:
    """Returns a HuggingFace copy of the model, trained to give the model's own first choice on the
    fit part.

    `subject.seed` draws the batches; there is no dropout, and the caller's random state is left as
    it was.

    Raises:
        ValueError: the model did not come from a HuggingFace folder.
    """
    engine, prompts = subject.engine, subject.trusted["fit"].to(subject.engine.device)
    tuned = _copy(subject)
    first_choice = _first_choice(engine, prompts)
    optimiser = torch.optim.AdamW(
        tuned.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    generator = torch.Generator().manual_seed(subject.seed)
    for _ in range(config.steps):
        rows = torch.randperm(len(prompts), generator=generator)[: config.batch].to(engine.device)
        batch = prompts.select(rows)
        logits = _logits(tuned, batch)  # B P V
        wanted = first_choice[rows, : logits.shape[1]]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), ignore_index=NONE
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return tuned.requires_grad_(False)


def _copy(subject: Subject) -> Any:
    """The model of a subject, read once more from its folder and not wrapped; in evaluation mode."""
    from transformers import AutoModelForCausalLM

    model, engine = subject.model, subject.engine
    if model.hf_config is None or model.head is not None:
        raise ValueError(
            f"model.path={model.path!r} is no HuggingFace language model with its own unembedding, "
            "so that no copy of "
            "it can be fine-tuned; leave fine_tuned_kl out"
        )
    try:
        with torch.random.fork_rng(devices=[]), _quietly():
            copy: Any = AutoModelForCausalLM.from_pretrained(
                str(local_path(model.path)), local_files_only=True, dtype=engine.dtype
            )
    except OSError as error:
        raise ValueError(
            f"model.path={model.path!r} is no HuggingFace folder to read a copy from; save the "
            "model and load it with "
            "load_model"
        ) from error
    return copy.to(engine.device).eval()


@torch.no_grad()
def _first_choice(engine: Engine, prompts: Prompts) -> Int[Tensor, "B P"]:
    """The model's first choice at the scored positions; -1 where a prompt has fewer."""
    found = torch.full_like(prompts.positions, NONE)
    start = 0
    for batch in _batches(engine, prompts, footprint(engine, prompts).plain):
        choice = engine.logits(batch.clean, batch.key_mask, batch.positions).argmax(-1)
        found[start : start + len(batch), : choice.shape[1]] = choice.masked_fill(
            batch.positions < 0, NONE
        )
        start += len(batch)
    return found


def _logits(model: Any, prompts: Prompts) -> Float[Tensor, "B P V"]:
    """A HuggingFace model's logits at the scored positions; absent ones give those of position 0.

    All families that are read from HuggingFace are causal, so that padding on the right needs no
    mask; with one, a padding token whose window holds nothing but padding is NaN and spoils the
    rest (Gemma 2).
    """
    kept, index = prompts.positions.clamp(min=0).unique(return_inverse=True)
    logits = model(prompts.clean, logits_to_keep=kept, use_cache=False).logits
    return logits[torch.arange(len(prompts), device=index.device)[:, None], index]


# ---- all of them
# --------------------------------------------------------------------------------------


BASELINES: dict[str, Baseline] = {
    "max_probability": max_probability,
    **{
        f"mahalanobis_{place}_{name}": partial(_layer_baseline, place, name)
        for place in PLACES
        for name in ("mean", "max")
    },
    "attribution_mahalanobis": attribution_mahalanobis,
    "fine_tuned_kl": fine_tuned_kl,
    "length": length,
}


def fit_baselines(subject: Subject, names: Sequence[str] = tuple(BASELINES)) -> dict[str, Score]:
    """Returns the named baselines, fitted; those that need distances at layers share them.

    Raises:
        ValueError: there is no baseline of that name, or it cannot be fitted.
    """
    if unknown := [name for name in names if name not in BASELINES]:
        raise ValueError(f"baseline={unknown[0]!r}, but the baselines are {', '.join(BASELINES)}")
    by_layer = (
        layer_baselines(subject) if any(name.startswith("mahalanobis") for name in names) else {}
    )
    return {
        name: by_layer[name] if name in by_layer else BASELINES[name](subject) for name in names
    }


def _fit_part(subject: Subject) -> Prompts:
    if len(prompts := subject.trusted["fit"]) < 2:
        raise ValueError(f"fit={len(prompts)} prompts, but a covariance needs at least 2; raise it")
    return prompts


def _batches(engine: Engine, prompts: Prompts, each: int) -> Iterator[Prompts]:
    """As many prompts at a time as fit with so many bytes each, on the engine's device."""
    size = most_prompts(prompts, each, parse_memory(MEMORY))
    return (batch.to(engine.device) for batch in prompts.batches(size))
