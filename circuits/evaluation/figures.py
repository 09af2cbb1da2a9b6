"""What every extraction measures of its circuit: by metric, over sizes, beside random circuits.

    NDF = mean over prompts of 1 - min(|m(M) - m(C)| / |m(M) - m(0)|, 1)

(Normalised Deviation Faithfulness; arXiv 2509.24808, where m(0) is the model on the corrupt prompt:
the same as every edge removed under counterfactual ablation).  Faithfulness lets prompts on which
the circuit does too much make up for those on which it does too little; NDF does not.  Prompts on
which the model and the ablated model are equal have none and are left out.

What they count is edges, or units where the circuit is of units.

Shapes: prompts N; circuits K; draws of prompts D; `*E` the axes of a mask.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from circuits.evaluation.areas import SHARES, Rankings, areas, edges_at
from circuits.evaluation.bootstrap import Resampled, figure
from circuits.faithfulness import (
    FaithfulnessScale,
    Measured,
    by_metric,
    under_each_metric,
    worse_than_none,
)
from circuits.selection import Ranking, random_circuits, random_rankings, sizes
from circuits.space import Space

RANDOM_PER_SIZE = 5  # random orders of the band beside the curve


def figures(
    scale: FaithfulnessScale,
    kept: Bool[Tensor, "*E"],
    ranked: Rankings,
    *,
    random_draws: int = 20,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns a circuit's figures: by metric, beside random circuits of its size, over sizes.

    `worse_than_none` names the metrics by which it is worse than the empty circuit.

    Args:
        ranked: the orders in which circuits of other sizes take their edges.
        random_draws: how many random circuits of its size it is compared with.
        seed: of the random circuits.
    """
    graph, edges = scale.objective.space, int(kept.sum())
    noun = graph.noun
    resampled = Resampled.of(len(scale.full_each), seed)
    values = under_each_metric(scale.objective, kept)
    own = scale.of(values[scale.objective.metric.name].circuit)
    drawn = random_circuits(graph, edges, random_draws, seed) if edges else []
    ladder = {int(mask.sum()): mask for mask in map(ranked.own.circuit, sizes(graph))}
    chance = random_rankings(graph, min(RANDOM_PER_SIZE, random_draws), seed + 1) if drawn else []
    groups = {
        "drawn": drawn,
        "curve": [*ladder.values()],
        "signed": _at_sizes(ranked.signed),
        "absolute": _at_sizes(ranked.absolute),
        "chance": [mask for other in chance for mask in _at_sizes(other, grown=True)],
    }
    measured = _measured(scale, groups)
    found = {name: scale.drawn(runs, resampled) for name, runs in measured.items()}
    band = found["chance"].unflatten(0, (-1, len(SHARES)))  # random orders, sizes, draws
    return {
        f"{noun}_total": graph.n_parts,
        f"{noun}_kept": edges,
        "faithfulness": own.value,
        "faithfulness_detail": asdict(own),
        "by_metric": _by_metric(scale, values, resampled),
        "worse_than_none": worse_than_none(values),
        "kl": -values["kl"].circuit.mean().item(),
        "ndf": _ndf(scale, values[scale.objective.metric.name].circuit, measured["drawn"], seed),
        "random_circuits": _random_circuits(found["drawn"][:, 0]),
        "curve": [
            {noun: size, **_point("faithfulness", here)}
            for size, here in zip(ladder, found["curve"], strict=True)
        ],
        "random_curve": _band(graph, band[..., 0]),
        "areas": _areas(ranked, found["signed"], found["absolute"], band)
        | {"sizes": _sizes(graph, groups, found)},
    }


def _at_sizes(ranked: Ranking, *, grown: bool = False) -> list[Bool[Tensor, "*E"]]:
    """The circuits at MIB's ten sizes; `grown`: until they are as large without dead ends."""
    take = ranked.grown if grown else ranked.circuit
    return [take(edges) for edges in edges_at(ranked.graph)]


def _measured(
    scale: FaithfulnessScale, groups: dict[str, list[Tensor]]
) -> dict[str, Float[Tensor, "K N"]]:
    """The oriented metric under the masks of each group, all measured at once."""
    runs = scale.measure_each([mask for masks in groups.values() for mask in masks], "evaluate")
    return dict(zip(groups, runs.split([len(masks) for masks in groups.values()]), strict=True))


def _point(name: str, drawn: Float[Tensor, "D"]) -> dict[str, float | None]:
    """A figure of that name with its error, as a point of a curve."""
    here = figure(drawn)
    return {name: here.value, "error": here.error}


def _by_metric(
    scale: FaithfulnessScale, values: dict[str, Measured], resampled: Resampled
) -> dict[str, dict[str, Any]]:
    """Faithfulness under each metric that separates model and ablated model, with its error."""
    told = {}
    for name, result in by_metric(scale, values).items():
        ends = FaithfulnessScale(scale.objective, values[name].full, values[name].empty)
        error = figure(ends.drawn(values[name].circuit, resampled)).error
        told[name] = {**asdict(result), "error": error}
    return told


def ndf_each(scale: FaithfulnessScale, values: Float[Tensor, "*K N"]) -> Float[Tensor, "*K n"]:
    """Returns the NDF of circuits on each prompt that the model and the ablated model tell apart.

    Args:
        values: the oriented metric of each prompt.
    """
    gap = (scale.full_each - scale.empty_each).abs().double()
    apart = gap > 0
    deviation = (scale.full_each - values).abs().double()[..., apart] / gap[apart]
    return 1 - deviation.clamp(max=1)


def _ndf(
    scale: FaithfulnessScale,
    own: Float[Tensor, "N"],
    drawn: Float[Tensor, "K N"],
    seed: int,
) -> dict[str, Any]:
    """NDF with its error, of how many prompts, and the mean of random circuits."""
    each = ndf_each(scale, own)
    one = figure(Resampled.of(len(each), seed).means(each))
    chance = ndf_each(scale, drawn).mean().item() if len(drawn) else None
    return {**asdict(one), "n_prompts": len(each), "random_mean": chance}


def _random_circuits(chance: Float[Tensor, "K"]) -> dict[str, Any]:
    """How faithful random circuits of the circuit's size are."""
    return {
        "count": len(chance),
        "mean": chance.mean().item() if len(chance) else None,
        "percentile_95": chance.quantile(0.95).item() if len(chance) else None,
        "best": chance.max().item() if len(chance) else None,
    }


def _band(graph: Space, chance: Float[Tensor, "K Z"]) -> list[dict[str, float]]:
    """The lowest and highest of random circuits at each size that has edges."""
    if not len(chance):
        return []
    columns = {edges: column for edges, column in zip(edges_at(graph), chance.T) if edges}
    return [
        {graph.noun: edges, "low": column.min().item(), "high": column.max().item()}
        for edges, column in columns.items()
    ]


def _areas(
    ranked: Rankings,
    signed: Float[Tensor, "Z D"],
    absolute: Float[Tensor, "Z D"],
    chance: Float[Tensor, "K Z D"],
) -> dict[str, Any]:
    """CPR and CMD, linear and log, with errors and what random orders reach."""
    own = {name: asdict(figure(drawn)) for name, drawn in areas(signed, absolute).items()}
    at_random = [areas(order[:, 0], order[:, 0]) for order in chance]
    for name, told in own.items():
        known = [order[name].item() for order in at_random]
        told["random_mean"] = sum(known) / len(known) if known else None
    return {
        **own,
        "own_ranking": "absolute" if ranked.own is ranked.absolute else "signed",
        "cpr_ranking": "absolute" if ranked.signed is ranked.absolute else "signed",
        "cmd_ranking": "absolute",
    }


def _sizes(
    graph: Space, masks: dict[str, list[Tensor]], found: dict[str, Float[Tensor, "K D"]]
) -> list[dict[str, Any]]:
    """The points of both areas: edges asked for, and those left without dead ends."""
    return [
        {"share": share, graph.noun: edges}
        | {
            way: {
                graph.noun: int(masks[way][place].sum()),
                **_point("faithfulness", found[way][place]),
            }
            for way in ("signed", "absolute")
        }
        for place, (share, edges) in enumerate(zip(SHARES, edges_at(graph), strict=True))
    ]
