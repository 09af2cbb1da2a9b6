"""Edge attribution patching: all edges scored by gradients, in a few passes.

EAP (Syed et al. 2023, arXiv 2310.10348) takes the gradient of the metric in the edge mask at all
ones,

    s(w -> r) = sum over pos, d of (a_w - ablated_w) . dm/dx_r

per prompt, then averaged; edges told apart by position have no sum over pos.  EAP-IG-inputs (Hanna
et al. 2024, arXiv 2403.17806) takes the mean of dm/dx_r over runs whose input embedding lies
k/steps of the way from the ablated to the clean one, k = 0 .. steps - 1; the difference in front
stays the full one.  Clean-corrupt takes the mean over the two ends alone (MIB: Mueller et al. 2025,
arXiv 2504.13151).

EAP-IG-activations (Hanna et al. 2024, as their code has it) leaves the input as it is and sets what
one group of writers writes (the input, the heads of a layer, an MLP) to

    ablated + k/steps (clean - ablated),    k = 0 .. steps - 1

and takes the mean of dm/dx_r over all groups and k.  (Their k is 1 .. steps, whose last run is the
clean one again for each group.)

`score(e)` estimates m(model) - m(model without e) with higher m better, so that positive supports
the behaviour.

Shapes: prompts B, positions S, d_model D, writers W, readers R, scored positions P, vocabulary V.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.discovery.method import Found
from circuits.engine.plain import Edit
from circuits.graph import Graph
from circuits.metrics import Metric
from circuits.objective import Batches, Contrast, Objective

Gradients = Iterable[tuple[int, Float[Tensor, "r B S D"]]]  # as `Engine.reader_gradients` yields


@dataclass
class ByGradient:
    """What all methods that go by gradients have in common."""

    name: str = ""
    # what the backward pass takes the model for. plain: what it is; relp: norms by a constant
    # scale, activations by a constant ratio, gated products halved, attention by a constant pattern
    # (edges to queries and keys then score 0); relp_qk: the same but for attention; gim: norms by a
    # constant scale, products halved, a softer softmax
    rule: str = "plain"


@dataclass
class EAP(ByGradient):
    """Edge attribution patching (Syed et al. 2023)."""

    name: str = "eap"


@dataclass
class CleanCorrupt(ByGradient):
    """Edge attribution patching, the mean of gradients at the clean and at the ablated input."""

    name: str = "clean_corrupt"


@dataclass
class EAPIG(ByGradient):
    """Edge attribution patching with integrated gradients along the inputs (Hanna et al. 2024)."""

    name: str = "eap_ig"
    steps: int = 5  # gradients from the ablated input towards the clean one; the paper's default


@dataclass
class EAPIGActivations(ByGradient):
    """Integrated gradients along what each group of writers writes (Hanna et al. 2024)."""

    name: str = "eap_ig_activations"
    # gradients for each of 1 + 2 * layers groups (input, heads of a layer, MLP), from what the
    # group writes when it is ablated towards the clean one
    steps: int = 5


def eap(config: EAP, objective: Objective[Batches]) -> Found:
    """Returns the EAP score of every edge.

    Raises:
        ValueError: a metric without gradient, or flat at the clean run (KL); a rule that is unknown
            or does not define the model.
    """
    return _along_inputs(config, objective)


def clean_corrupt(config: CleanCorrupt, objective: Objective[Batches]) -> Found:
    """Returns the clean-corrupt score of every edge; ValueError as `eap`, but KL is allowed."""
    return _along_inputs(config, objective)


def eap_ig(config: EAPIG, objective: Objective[Batches]) -> Found:
    """Returns the EAP-IG-inputs score of every edge.

    Raises:
        ValueError: as `eap` but that KL is allowed, or fewer than 1 step.
    """
    return _along_inputs(config, objective)


def eap_ig_activations(config: EAPIGActivations, objective: Objective[Batches]) -> Found:
    """Returns the EAP-IG-activations score of every edge; ValueError as `eap_ig`."""
    _check_steps(config.steps)
    check_differentiable(objective.metric)
    graph = objective.engine.graph
    groups = _groups(graph)

    def work(batch: Contrast, scores: Tensor) -> None:
        for place, writers in groups.items():
            difference = batch.values[writers].sum(0)
            for k in range(config.steps):
                edit = _moved(place, difference * (k / config.steps - 1))
                gradients = _gradients(config, objective, batch, batch.embedded, edit)
                add_products(scores, graph, gradients, batch.values)

    scores = over_contrasts(objective, config.name, work)
    return Found(scores / (len(groups) * config.steps))


def _groups(graph: Graph) -> dict[str, slice]:
    """Where writers of a group are put in a run (`Edit`), and which they are."""
    groups = {"input": slice(0, graph.n_inputs)}
    for layer in range(graph.n_layers):
        first = graph.first_writer(layer)
        groups[f"a{layer}"] = slice(first, first + graph.n_heads)
        if not graph.attention_only:
            groups[f"m{layer}"] = slice(first + graph.n_heads, first + graph.n_heads + 1)
    return groups


def _moved(place: str, away: Float[Tensor, "B S D"]) -> Edit:
    """What is at a place, as a constant, and a difference."""

    def edit(where: str, value: Tensor, given: Tensor) -> Tensor:
        if where != place:
            return value
        return value + away if place == "input" else value.detach() + away

    return edit


def points_of(config: EAP | CleanCorrupt | EAPIG, objective: Objective) -> tuple[float, ...]:
    """How far from the ablated to the clean input gradients are taken.

    Raises:
        ValueError: fewer than 1 step or, at the clean input alone, a metric flat there (KL).
    """
    if isinstance(config, EAP):
        check_slope(objective.metric, config.name)
        return (1.0,)
    if isinstance(config, CleanCorrupt):
        return (0.0, 1.0)
    _check_steps(config.steps)
    return tuple(k / config.steps for k in range(config.steps))


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps={steps}, but at least 1 is needed (5 is the published default)")


def check_slope(metric: Metric, method: str) -> None:
    """Raises ValueError for a metric that is flat at the clean run, where a method looks only."""
    if metric.flat_at_model:
        raise ValueError(
            f"metric={metric.name} has zero gradient at the clean run, the only one at which "
            f"method={method} takes gradients, so that all scores would be 0; use method=eap_ig, "
            "or metric=logit_diff"
        )


def check_differentiable(metric: Metric) -> None:
    """Raises ValueError for a metric without a gradient."""
    if not metric.differentiable:
        raise ValueError(
            f"metric={metric.name} has no gradient; use logit_diff, prob_diff or cross_entropy, or "
            "method=exact or acdc, which need none"
        )


def _along_inputs(config: EAP | CleanCorrupt | EAPIG, objective: Objective[Batches]) -> Found:
    """Edge scores by gradients at `ablated + point * (clean - ablated)`, averaged over points."""
    points, graph = points_of(config, objective), objective.engine.graph
    check_differentiable(objective.metric)

    def work(batch: Contrast, scores: Tensor) -> None:
        difference = batch.values[: graph.n_inputs].sum(0)
        for point in points:
            at = batch.embedded - (1.0 - point) * difference
            gradients = _gradients(config, objective, batch, at, None)
            add_products(scores, graph, gradients, batch.values)

    return Found(over_contrasts(objective, config.name, work) / len(points))


def over_contrasts(
    objective: Objective[Batches], label: str, work: Callable[[Contrast, Tensor], None]
) -> Float[Tensor, "R W *S"]:
    """Returns what `work` adds to the scores on each batch, per prompt."""
    graph, batches, n_prompts = objective.engine.graph, objective.batches, 0
    scores = torch.zeros(graph.exists.shape, dtype=torch.float32, device=objective.engine.device)
    progress = {"total": len(batches), "desc": label, "unit": "batch", "disable": None}
    for batch in tqdm(batches.contrasts(), **progress):
        n_prompts += len(batch.prompts)
        work(batch, scores)
    return (scores / n_prompts).cpu()


def _gradients(
    config: ByGradient,
    objective: Objective[Batches],
    batch: Contrast,
    embedded: Float[Tensor, "B S D"],
    edit: Edit | None,
) -> Gradients:
    """Gradients of the metric at all readers, by the method's rule."""
    scalar = scalar_of(objective.metric, batch)
    engine = objective.engine
    return engine.reader_gradients(batch.prompts, embedded, scalar, rule=config.rule, edit=edit)


def scalar_of(
    metric: Metric, batch: Contrast
) -> Callable[[Float[Tensor, "B P V"]], Float[Tensor, ""]]:
    """What is differentiated: the oriented metric, summed over the prompts of a batch."""
    return lambda logits: metric.oriented(logits, batch.prompts, batch.logits).sum()


def add_products(
    scores: Float[Tensor, "R W *S"],
    graph: Graph,
    gradients: Gradients,
    values: Float[Tensor, "W B S D"],
) -> None:
    """Adds the products of gradients at readers with the differences upstream of them."""
    flat = values.flatten(1)
    for first, group in gradients:
        upstream = graph.upstream[first]
        if graph.n_positions is None:
            products = group.flatten(1) @ flat[:upstream].T
        else:
            products = torch.einsum("rbsd,wbsd->rws", group, values[:upstream])
        scores[first : first + len(group), :upstream] += products
