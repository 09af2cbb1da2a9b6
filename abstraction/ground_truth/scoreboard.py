"""Discovery methods put to the test where the right answer is known: compiled and trained programs.

Each method finds edges in each model; the truth is the program's edges that have an effect under
the same ablation (`abstraction.ground_truth.effects`).  A method that decides is exact if it keeps
just the true edges; one that scores, if every true edge has a larger |score| than every other one,
by more than rounding (1e-6 of the largest), so that ties at 0 are no success.  The AUC is that of a
random true edge against a random other one, by

    |score|, with kept edges before all others where the method decides;

for nodes, by the best of the edges out of the node, where a node is true if a true edge leaves it
(Conmy et al. 2023 give both for ACDC).

Shapes: readers R, writers W.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from abstraction.ground_truth.compiled import compile
from abstraction.ground_truth.effects import BOUND, effects, mask_of
from abstraction.ground_truth.options import Options
from abstraction.ground_truth.programs import PROGRAMS
from abstraction.ground_truth.trained import TRUTHS, load_trained
from circuits.ablation import AblationConfig, fit_ablation
from circuits.discovery import METHODS, Found, default_metric
from circuits.engine import Engine
from circuits.evaluation.known import auc, kept_first
from circuits.graph import Graph
from circuits.metrics import metric_named
from circuits.objective import Objective, prepare
from circuits.prompts import prompts_from_records

MARGIN = 1e-6  # of the largest |score|

TRAINED = "trained"
COMPILED: Mapping[str, Options] = {
    "plain": Options(),
    "rotated": Options(rotate=True),
    "distractors": Options(distractor_heads=1, distractor_neurons=8),
    "rotated, distractors": Options(rotate=True, distractor_heads=1, distractor_neurons=8),
}
VARIANTS = (*COMPILED, TRAINED)  # trained: only the programs that are shipped so


@dataclass(frozen=True)
class Result:
    """How a method did on one compiled program."""

    program: str
    variant: str
    method: str
    edges: int  # in the graph
    true_edges: int
    found_edges: int  # kept by the method, or as many as are true where it only scores
    edge_auc: float
    node_auc: float
    exact: bool
    missing: tuple[str, ...]  # true edges that were not found
    extra: tuple[str, ...]  # found edges that are not true
    seconds: float


def put_to_the_test(
    methods: Mapping[str, Any],
    programs: Sequence[str] = tuple(PROGRAMS),
    variants: Sequence[str] = VARIANTS,
    *,
    metric: str | None = None,
    ablation: str = "resample",
    prompts: int = 64,
    seed: int = 0,
) -> Iterator[Result]:
    """Yields the result of each method (name -> configuration) on each program in each variant.

    Without `metric` methods go by KL, and those that it gives no gradient (EAP, AtP*) by the
    logit difference.

    >>> from circuits.discovery import METHODS
    >>> acdc = {"acdc": METHODS["acdc"].schema()}
    >>> (result,) = put_to_the_test(acdc, ["majority"], ["plain"], prompts=16)
    >>> result.exact, result.edge_auc
    (True, 1.0)

    Raises:
        ValueError: an unknown method, program, variant, metric or ablation; or what a method
            refuses.
    """
    _require_known("method", methods, METHODS)
    _require_known("program", programs, PROGRAMS)
    _require_known("variant", variants, VARIANTS)
    for program, variant in cases(programs, variants):
        objective, truth = subject(program, variant, ablation, prompts, seed)
        for method, config in methods.items():
            own = metric or default_metric(method)
            started = time.perf_counter()
            found = METHODS[method].run(config, replace(objective, metric=metric_named(own)))
            seconds = time.perf_counter() - started
            names = {"program": program, "variant": variant, "method": method}
            yield judge(objective.engine.graph, truth, found, **names, seconds=seconds)


def _require_known(kind: str, names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{kind} {name!r} is unknown; the {kind}s are {', '.join(known)}")


def cases(programs: Sequence[str], variants: Sequence[str]) -> list[tuple[str, str]]:
    """The programs in the variants that there are of them."""
    pairs = itertools.product(programs, variants)
    return [(name, variant) for name, variant in pairs if variant != TRAINED or name in TRUTHS]


def subject(
    program: str, variant: str, ablation: str, count: int, seed: int
) -> tuple[Objective, Bool[Tensor, "R W"]]:
    """What methods go by on a model, with KL as metric, and the true edges."""
    trained = variant == TRAINED
    made = load_trained(program) if trained else compile(PROGRAMS[program](), COMPILED[variant])
    engine = Engine(made.model)
    prompts = prompts_from_records(made.records(count, seed=seed))
    reference = prompts_from_records(made.records(count, seed=seed + 1))
    fitted = fit_ablation(AblationConfig(ablation, seed), engine, reference)
    objective = prepare(engine, prompts, metric_named("kl"), fitted)
    claimed = made.claimed_edges
    shown = zip(claimed, effects(objective, claimed), strict=True)
    true = [edge for edges, effect in shown if effect > BOUND for edge in edges]
    return objective, mask_of(engine.graph, true)


def judge(
    graph: Graph,
    truth: Bool[Tensor, "R W"],
    found: Found,
    *,
    program: str,
    variant: str,
    method: str,
    seconds: float,
) -> Result:
    """Compares what a method found with the truth."""
    rank = found.scores.abs().double()
    if found.kept is not None:
        rank = kept_first(rank, found.kept)
    kept = best(graph, rank, int(truth.sum())) if found.kept is None else found.kept
    ranked = rank[graph.exists], truth[graph.exists]
    out, wanted = (rank * graph.exists).amax(0), truth.any(0)

    def names(edges: Tensor) -> tuple[str, ...]:
        return tuple(graph.edge_name(*edge) for edge in edges.nonzero().tolist())

    return Result(
        program=program,
        variant=variant,
        method=method,
        edges=graph.n_edges,
        true_edges=int(truth.sum()),
        found_edges=int(kept.sum()),
        edge_auc=auc(*ranked),
        node_auc=auc(out, wanted),
        exact=torch.equal(kept, truth) and (found.kept is not None or _apart(*ranked)),
        missing=names(truth & ~kept),
        extra=names(kept & ~truth),
        seconds=seconds,
    )


def _apart(rank: Float[Tensor, "n"], true: Bool[Tensor, "n"]) -> bool:
    """Whether all true edges rank above all others by more than rounding."""
    others = rank[~true]
    highest = others.max() if len(others) else rank.new_zeros(())
    return bool(true.any() and rank[true].min() > highest + MARGIN * rank.max())


def best(graph: Graph, rank: Float[Tensor, "R W"], count: int) -> Bool[Tensor, "R W"]:
    """The edges of the highest rank; ties in edge order."""
    order = sorted(graph.edges(), key=lambda edge: -rank[edge].item())
    kept = torch.zeros_like(graph.exists)
    for edge in order[:count]:
        kept[edge] = True
    return kept
