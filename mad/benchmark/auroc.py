"""How well scores separate anomalies from normals: AUROC, its intervals, and ROC curves.

AUROC is the share of (normal, anomalous) pairs in which the anomalous prompt scores higher, ties
counted half.  It is taken of one stratum of anomalies against one group of normals.

Intervals are 95 % percentile bootstraps over prompts (Efron 1979), of the models at hand: normals
are redrawn within their group, anomalies within their stratum.  Every detector meets the same
redrawn prompts, so that two can be compared draw by draw.  With counts w of normals and v of
anomalies in a draw,

    AUROC = sum_j v_j (W(<a_j) + W(<=a_j)) / 2 / (sum w * sum v),

W the cumulative sum of w in the order of scores, which is exact and linear in the number of
prompts; so no variance formula (DeLong et al. 1988) is needed, whose symmetric intervals pass 1
where scores separate well.

Shapes: normals N, anomalies A, bootstrap draws D.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mad.benchmark.results import ANOMALY, NORMALS, Place, Results, Scorer, Scores
from mad.benchmark.roc import RocCurve

DRAWS = 500
BOUNDS = (0.025, 0.975)  # quantiles of the draws


def wins(normal: Float[Tensor, "N"], anomalous: Float[Tensor, "A"]) -> Float[Tensor, "A"]:
    """Returns the share of normals that each anomaly scores above, ties counted half; float64."""
    below, up_to = ranks(normal.sort().values, anomalous)
    return (below + up_to).double() / (2 * len(normal))


def auroc(normal: Float[Tensor, "N"], anomalous: Float[Tensor, "A"]) -> float:
    """Returns the AUROC of anomalies against normals."""
    return wins(normal, anomalous).mean().item()


def roc_curve(
    name: str, group: str, normal: Float[Tensor, "N"], anomalous: Float[Tensor, "A"]
) -> RocCurve:
    """Returns the ROC curve of a detector, under the title of the group of normals."""
    from sklearn import metrics

    labels = [0] * len(normal) + [1] * len(anomalous)
    false, true, _ = metrics.roc_curve(labels, torch.cat([normal, anomalous]).numpy())
    return RocCurve(name, false.tolist(), true.tolist(), auroc(normal, anomalous), group)


@dataclass(frozen=True)
class Separation:
    """A detector's AUROC in one place, with its interval; None where nothing was redrawn."""

    scorer: Scorer
    place: Place
    auroc: float
    low: float | None
    high: float | None
    normals: int
    anomalies: int


def separations(results: Results, *, draws: int = DRAWS, seed: int = 0) -> tuple[Separation, ...]:
    """Every score in every place.  Random circuits get no intervals, and with draws=0 nothing does.

    Raises:
        ValueError: draws is negative.
    """
    if draws < 0:
        raise ValueError(f"draws={draws}, but it must be 0 (no intervals) or more")
    found = []
    for subject in results.subjects:
        if not subject.anomalous:
            continue
        counts = redraw(subject, draws, seed)
        for scorer, parts in sorted(subject.parts.items()):
            bounded = None if scorer.random or not draws else counts
            for group in NORMALS:
                found += _separations(subject, scorer, parts, group, bounded)
    return tuple(found)


def _separations(
    subject: Scores,
    scorer: Scorer,
    parts: Mapping[str, Tensor],
    group: str,
    counts: Mapping[str, Tensor] | None,
) -> list[Separation]:
    """One score in all strata, against one group of normals."""
    rows = subject.rows(ANOMALY)
    won = wins(parts[group], parts[ANOMALY])
    bounds: list[tuple[float | None, float | None]] = [(None, None)] * len(rows)
    if counts is not None:
        samples = auroc_draws(parts, group, rows, counts)
        bounds = list(zip(*torch.quantile(samples, torch.tensor(BOUNDS), dim=1).tolist()))
    return [
        Separation(
            scorer,
            Place(subject.task, subject.seed, group, stratum),
            won[own].mean().item(),
            *bounds[index],
            normals=len(parts[group]),
            anomalies=len(own),
        )
        for index, (stratum, own) in enumerate(rows.items())
    ]


def auroc_draws(
    parts: Mapping[str, Tensor],
    group: str,
    rows: Mapping[str, Tensor],
    counts: Mapping[str, Tensor],
) -> Float[Tensor, "strata D"]:
    """Returns the AUROC of each stratum against a group of normals in each draw of `redraw`.

    Float32 is exact here: counts are whole and under 2^23.
    """
    ordered, order = parts[group].sort()
    drawn = counts[group][order].cumsum(0)
    sums = torch.cat([torch.zeros(1, drawn.shape[1]), drawn])
    below, up_to = ranks(ordered, parts[ANOMALY])
    won = (sums[below] + sums[up_to]) * counts[ANOMALY]
    pairs = 2 * len(ordered)
    return torch.stack([won[own].sum(0) / (pairs * len(own)) for own in rows.values()])


def ranks(ordered: Float[Tensor, "N"], values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns how many of some sorted scores are below each value, and how many not above it."""
    return torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, side="right")


def redraw(subject: Scores, draws: int, seed: int) -> dict[str, Float[Tensor, "_ D"]]:
    """Returns how often each prompt of each group is drawn: normals within their group, anomalies
    within their stratum.
    """
    counts = {}
    for group, names in subject.strata.items():
        everyone = {"": torch.arange(len(names))}
        counts[group] = torch.zeros(len(names), draws)
        for stratum, rows in (subject.rows(group) if group == ANOMALY else everyone).items():
            # Of its own name alone, so that draws do not depend on what else was scored.
            salt = zlib.crc32(f"{subject.name} {group} {stratum} {seed}".encode())
            drawn = torch.randint(
                len(rows), (len(rows), draws), generator=torch.Generator().manual_seed(salt)
            )
            own = torch.zeros(len(rows), draws)
            counts[group][rows] = own.scatter_add_(0, drawn, torch.ones(len(rows), draws))
    return counts
