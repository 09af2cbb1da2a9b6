"""What is timed beside a peer: each piece of work as the peer is asked for it and as it is done
here, and how far the two results agree.

Shapes: prompts B, vocabulary V, edges E in the order of a sweep, readers R, writers W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.ablation import AblationConfig, fit_ablation
from circuits.discovery import METHODS
from circuits.engine import Engine
from circuits.metrics import metric_named
from circuits.objective import Objective, prepare
from circuits.prompts import Prompts
from circuits.selection import select
from circuits.timing import seconds
from mad.benchmark.peers_side import TRAINING_STEPS

IG_STEPS = 5
CIRCUIT_SHARE = 0.02
SEED = 0  # of random masks
SWEEPS, TRAININGS = 1, 3  # rounds of what takes long
PLAIN, BARE = "plain forward", "plain forward, bare module"


@dataclass(frozen=True)
class Work:
    """A piece of work on both sides, or on the one that can do it."""

    name: str
    request: dict[str, Any] | None  # to the peer: `work` and its arguments
    ours: Callable[[], tuple[float, Any]] | None = None  # seconds, and what came of it
    agreement: Callable[[dict[str, Any], Any], dict[str, float]] | None = None
    rounds: int | None = None  # None: the shape's


def all_work(
    module: Any, engine: Engine, prompts: Prompts, thresholds: Sequence[float]
) -> list[Work]:
    """Everything that is compared; `module` is the bare model, `thresholds` are those of ACDC."""
    return [
        Work(BARE, None, _timed(engine, lambda: module(prompts.clean))),
        *forwards_and_masks(engine, prompts),
        *attributions(engine, prompts),
        *sweeps(engine, prompts, thresholds),
        *training(engine, prompts),
    ]


def forwards_and_masks(engine: Engine, prompts: Prompts) -> list[Work]:
    """Plain forwards, and runs under masks, the ablated values being at hand on both sides."""
    plain = Work(
        PLAIN,
        {"work": "forward"},
        _timed(engine, lambda: engine.model.bridge(prompts.clean)[:, -1]),
        logits_agree,
    )
    counterfactual = fit_ablation(AblationConfig("counterfactual"), engine, prompts)
    ablated = counterfactual.values(engine, prompts)
    work = [plain]
    for name, kept in _masks(engine).items():
        run = _timed(engine, lambda kept=kept: engine.masked(prompts, kept, ablated)[:, -1])
        request = {"work": "masked", "kept": _in_order(engine, kept.float()).tolist()}
        work.append(Work(f"run under a mask, {name}", request, run, logits_agree))
    return work


def _masks(engine: Engine) -> dict[str, Bool[Tensor, "R W"]]:
    """Random edges, and a random circuit that hangs together."""
    graph = engine.graph
    drawn = torch.rand(graph.exists.shape, generator=torch.Generator().manual_seed(SEED))
    few = select(graph, drawn, edges=max(1, round(CIRCUIT_SHARE * graph.n_edges)))
    masks = {"half of the edges": (drawn < 0.5) & graph.exists}
    return {**masks, f"circuit of {CIRCUIT_SHARE:.0%}": few}


def attributions(engine: Engine, prompts: Prompts) -> list[Work]:
    """EAP and EAP-IG from prompts to scores.

    The peer integrates along the mask, this engine along the input (Hanna et al. 2024): the same
    number of gradients, and scores that agree in part.
    """

    def scores(name: str, **settings: Any) -> Callable[[], Tensor]:
        method = METHODS[name]
        config = method.schema(**settings)
        return lambda: _in_order(
            engine, method.run(config, _objective(engine, prompts, "logit_diff")).scores
        )

    integrated = {"work": "integrated", "steps": IG_STEPS}
    ours = _timed(engine, scores("eap_ig", steps=IG_STEPS))
    return [
        Work("EAP, all edges", {"work": "eap"}, _timed(engine, scores("eap")), scores_agree),
        Work(f"EAP-IG, {IG_STEPS} steps", integrated, ours, scores_agree),
    ]


def sweeps(engine: Engine, prompts: Prompts, thresholds: Sequence[float]) -> list[Work]:
    """Whole sweeps of ACDC by the divergence, from prompts to kept edges, in the same order."""
    method = METHODS["acdc"]

    def kept(tau: float) -> Tensor:
        found = method.run(method.schema(tau=tau), _objective(engine, prompts, "kl"))
        assert found.kept is not None, "ACDC decides itself"
        return _in_order(engine, found.kept.float())

    return [
        Work(
            f"ACDC, tau {tau:g}",
            {"work": "acdc", "tau": tau},
            _timed(engine, lambda tau=tau: kept(tau)),
            circuits_agree,
            rounds=SWEEPS,
        )
        for tau in thresholds
    ]


def training(engine: Engine, prompts: Prompts) -> list[Work]:
    """One step of subnetwork probing, all edges open in part: a longer training less a step's."""
    method = METHODS["subnetwork_probing"]
    objective = _objective(engine, prompts, "kl")

    def train(steps: int) -> float:
        config = method.schema(steps=steps, penalty=0.1, learning_rate=0.1)
        return seconds(engine.device, lambda: method.run(config, objective), repeats=1)

    def step() -> tuple[float, None]:
        first = train(1)
        return (train(1 + TRAINING_STEPS) - first) / TRAINING_STEPS, None

    return [Work("training step of a mask", {"work": "training_step"}, step, rounds=TRAININGS)]


def _objective(engine: Engine, prompts: Prompts, metric: str) -> Objective:
    ablation = fit_ablation(AblationConfig("counterfactual"), engine, prompts)
    return prepare(engine, prompts, metric_named(metric), ablation)


def _in_order(engine: Engine, values: Float[Tensor, "R W"]) -> Float[Tensor, "E"]:
    """Values of the edges in the order of a sweep."""
    readers, writers = torch.tensor(engine.graph.sweep_order()).T
    return values[readers, writers]


def _timed(engine: Engine, work: Callable[[], Any]) -> Callable[[], tuple[float, Any]]:
    """Work that says how long it took, and takes no gradients but those that it asks for."""

    @torch.no_grad()
    def run() -> tuple[float, Any]:
        results: list[Any] = []
        taken = seconds(engine.device, lambda: results.append(work()), repeats=1)
        return taken, results[0]

    return run


# ---- whether both did the same -------------------------------------------------------------------


def logits_agree(theirs: dict[str, Any], ours: Float[Tensor, "B V"]) -> dict[str, float]:
    """The largest difference; the peer centres what it unembeds, so that logits are normalised."""
    other = torch.tensor(theirs["logits"]).log_softmax(-1)
    difference = (other - ours.cpu().log_softmax(-1)).abs().max()
    return {"log-probabilities differ by": difference.item()}


def scores_agree(theirs: dict[str, Any], ours: Float[Tensor, "E"]) -> dict[str, float]:
    """The rank correlation of the scores."""
    from scipy.stats import spearmanr

    found: Any = spearmanr(theirs["scores"], ours.cpu())
    return {"rank correlation": float(found.statistic)}


def circuits_agree(theirs: dict[str, Any], ours: Float[Tensor, "E"]) -> dict[str, float]:
    """How many edges both keep, as a share of what either keeps."""
    other, own = torch.tensor(theirs["scores"]) > 0, ours.cpu() > 0
    both, either = int((other & own).sum()), int((other | own).sum())
    shared = both / either if either else 1.0
    return {"edges": int(own.sum()), "peer's edges": int(other.sum()), "Jaccard": shared}
