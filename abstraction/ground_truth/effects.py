"""Which edges matter: the effects of removing them, found by intervention and not by assumption.

The program says which edges it reads through.  Under a given ablation some of them carry nothing:
the position embedding, say, is the same in a prompt and in its corrupt twin, so that
ablation=counterfactual cannot touch what is read from it.  So an edge is true, under an ablation,
if the program reads through it and

    effect(e) = mean over prompts of KL(model || model without e)  >  bound.

Edges that carry one variable from several redundant heads form a group: the group is true if
removing all of it has an effect, though removing one edge alone may have none.  With a majority
(copies=3, needed=2) it has none under any ablation.  With a spare (copies=2, needed=1) it has none
where what is removed is gone or blurred (zero, mean), but under counterfactual and resample the
head then speaks for another value, and one voice against one is a tie.

What holds for whole edges need not hold position by position: with means, some edges have no effect
alone but matter together.  There take zero, counterfactual or resample.

Shapes: readers R, writers W.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from abstraction.ground_truth.compiled import Compiled
from circuits.ablation import Ablation
from circuits.engine import Engine
from circuits.graph import Graph
from circuits.metrics import metric_named
from circuits.objective import Objective, prepare
from circuits.prompts import Prompts

BOUND = 1e-3  # nats: far above rounding (1e-6), far below the effect of an edge that is used at all
AT_ONCE = 16  # masks in one run


@dataclass(frozen=True)
class Effect:
    """What removing a group of edges, mostly one, does to the full model, in nats."""

    edges: tuple[str, ...]
    mechanism: str
    effect: float  # of removing all of them
    alone: tuple[float, ...]  # of removing each one
    true: bool  # effect > bound


def true_edges(
    compiled: Compiled,
    engine: Engine,
    prompts: Prompts,
    ablation: Ablation,
    *,
    bound: float = BOUND,
) -> tuple[Effect, ...]:
    """Returns the effect of every group of the program's edges; the true ones are the ground truth.

    >>> from abstraction import PROGRAMS, compile
    >>> from circuits.ablation import AblationConfig, fit_ablation
    >>> from circuits.prompts import prompts_from_records
    >>> compiled = compile(PROGRAMS["greater_than"]())
    >>> engine, prompts = Engine(compiled.model), prompts_from_records(compiled.records(16, seed=0))
    >>> ablation = fit_ablation(AblationConfig("counterfactual"), engine, prompts)
    >>> found = true_edges(compiled, engine, prompts, ablation)
    >>> sum(effect.true for effect in found), len(found)
    (6, 8)

    Raises:
        ValueError: the engine runs another model, the bound is not positive, ablation=zero with RMS
            normalisation, or the prompts lack what the ablation needs.
    """
    if engine.model is not compiled.model:
        raise ValueError(
            "the engine runs another model than this compiled one; use Engine(compiled.model)"
        )
    if ablation.name == "zero" and compiled.options.norm == "rms":
        raise ValueError(
            "ablation=zero removes the constant that keeps the norm of an RMS model, so that "
            "nothing reads right; use another ablation, or compile with norm=none"
        )
    if not bound > 0:
        raise ValueError(f"bound={bound}, but it must be above 0, or every edge counts")
    graph, objective = engine.graph, prepare(engine, prompts, metric_named("kl"), ablation)
    per_position = graph.n_positions is not None
    groups = compiled.groups(split_input=graph.split_input, per_position=per_position)
    together = effects(objective, [group.edges for group in groups])
    single = list(dict.fromkeys(edge for group in groups for edge in group.edges))
    alone = dict(zip(single, effects(objective, [(edge,) for edge in single]), strict=True))
    found = []
    for group, effect in zip(groups, together, strict=True):
        each = tuple(alone[edge] for edge in group.edges)
        found.append(Effect(group.edges, group.mechanism, effect, each, effect > bound))
    return tuple(found)


def effects(
    objective: Objective,
    removed: Sequence[Sequence[str]],
    kept: Bool[Tensor, "R W *S"] | None = None,
) -> list[float]:
    """Returns by how much the metric falls when each set of edges is removed, by default of all."""
    graph = objective.engine.graph
    kept = graph.exists if kept is None else kept
    masks = torch.stack([kept & ~mask_of(graph, edges) for edges in removed] + [kept])
    values = torch.cat([objective.measure(part).double().mean(-1) for part in masks.split(AT_ONCE)])
    return (values[-1] - values[:-1]).tolist()


def mask_of(graph: Graph, edges: Iterable[str]) -> Bool[Tensor, "R W *S"]:
    """Returns True at the named edges; ValueError for a name that is no edge of this graph."""
    mask = torch.zeros_like(graph.exists)
    for edge in edges:
        mask[graph.edge_index(edge)] = True
    return mask


def circuit_of(graph: Graph, found: Iterable[Effect]) -> Bool[Tensor, "R W *S"]:
    """Returns True at the true edges."""
    return mask_of(graph, (edge for effect in found if effect.true for edge in effect.edges))


def accuracy(objective: Objective, kept: Bool[Tensor, "R W *S"]) -> Float[Tensor, "N"]:
    """Returns, per prompt, the share of scored positions at which the answer comes first."""
    return replace(objective, metric=metric_named("accuracy")).measure(kept)
