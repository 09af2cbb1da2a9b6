"""How unusual rows of numbers are among trusted rows.

    Standard    z = (x - mean) / deviation, column by column; a row is as unusual as its largest z
    Gaussian    squared Mahalanobis distance from the mean, z' C^-1 z, with the shrunk covariance
                C = (1 - s) cov + s (trace cov / c) I   of scikit-learn's ShrunkCovariance
                (as a detector: Lee et al. 2018, arXiv 1807.03888, without classes)
    Tails       - sum over columns of log p,   p = (1 + #{trusted >= x}) / (n + 1)
    Total       the sum of the row

Columns without spread on the trusted rows are left out where columns are standardised.  All of it
is in float64 on the CPU.

Shapes: trusted rows n, new rows B, columns c, directions k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

ROUNDING = 1e-6  # a deviation below this share of the largest is no more than float32's rounding


@runtime_checkable
class Usual(Protocol):
    """What trusted rows are like; its fields are tensors."""

    @property
    def columns(self) -> int | None:
        """How many numbers a row has; None: any."""
        ...

    def unusual(self, rows: Float[Tensor, "B c"]) -> Float[Tensor, "B"]:
        """How unusual each row is."""
        ...


@dataclass(frozen=True)
class Summary:
    """A way to compare rows with trusted ones."""

    fit: Callable[[Float[Tensor, "n c"]], Usual] | None  # None: trusted rows are not looked at
    kind: type  # of what it makes, a dataclass of tensors


@dataclass(frozen=True)
class Standard:
    """Mean and scale of each column; the scale of a column without spread is 0."""

    mean: Float64[Tensor, "c"]
    scale: Float64[Tensor, "c"]  # one over the standard deviation

    @property
    def columns(self) -> int:
        """How many there are."""
        return len(self.mean)

    def z(self, rows: Float[Tensor, "B c"]) -> Float[Tensor, "B c"]:
        """Standardised rows; 0 in columns without spread."""
        return (rows.double() - self.mean) * self.scale

    def unusual(self, rows: Float[Tensor, "B c"]) -> Float[Tensor, "B"]:
        """The largest z of each row; 0 where no column varies."""
        values = self.z(rows)[:, self.scale > 0]
        return values.amax(1) if values.shape[1] else values.new_zeros(len(rows))


def standard(rows: Float[Tensor, "n c"]) -> Standard:
    """Returns mean and scale of the columns of trusted rows.

    Raises:
        ValueError: fewer than two rows.
    """
    _check_enough(len(rows))
    rows = rows.double()
    mean = rows.mean(0)
    deviation = ((rows - mean).square().sum(0) / (len(rows) - 1)).sqrt()
    largest = deviation.max() if rows.shape[1] else 0.0
    varies = deviation > ROUNDING * largest
    return Standard(mean, torch.where(varies, 1 / deviation, 0.0))


@dataclass(frozen=True)
class Gaussian:
    """A mean and an inverse covariance.

    The inverse is kept by its values along directions and that along all others: columns may be
    thousands, and trusted rows span few of their directions.
    """

    mean: Float64[Tensor, "c"]
    scale: Float64[Tensor, "c"]  # what columns are multiplied by first
    directions: Float64[Tensor, "c k"]
    inverse: Float64[Tensor, "k"]
    elsewhere: Float64[Tensor, ""]  # 0 where the directions are all there are

    @property
    def columns(self) -> int:
        """How many there are."""
        return len(self.mean)

    def squared_distance(self, rows: Float[Tensor, "B c"]) -> Float[Tensor, "B"]:
        """Squared Mahalanobis distances from the mean."""
        scaled = (rows.double() - self.mean) * self.scale
        along = (scaled @ self.directions).square()
        return scaled.square().sum(1) * self.elsewhere + along @ (self.inverse - self.elsewhere)

    unusual = squared_distance


def gaussian(
    rows: Float[Tensor, "n c"], shrinkage: float, *, standardised: bool = False
) -> Gaussian:
    """Returns the Gaussian of trusted rows, whose columns may be standardised first.

    Raises:
        ValueError: fewer than two rows.
    """
    _check_enough(len(rows))
    rows = rows.double()
    if standardised:
        columns = standard(rows)
        mean, scale = columns.mean, columns.scale
    else:
        mean, scale = rows.mean(0), rows.new_ones(rows.shape[1])
    _, singular, directions = torch.linalg.svd((rows - mean) * scale, full_matrices=False)
    variances = singular.square() / len(rows)
    return _shrunk(mean, scale, directions.T, variances, shrinkage)


@dataclass
class Moments:
    """Sums over rows that come batch by batch; less a shift near the mean, against cancellation."""

    count: int = 0
    shift: Tensor | float = 0.0
    first: Tensor | float = 0.0
    second: Tensor | float = 0.0

    def add(self, rows: Float[Tensor, "n c"]) -> None:
        """Takes more rows."""
        rows = rows.double()
        if not self.count:
            self.shift = rows.mean(0)
        centred = rows - self.shift
        self.count += len(rows)
        self.first = self.first + centred.sum(0)
        self.second = self.second + centred.T @ centred

    def gaussian(self, shrinkage: float) -> Gaussian:
        """Returns the Gaussian of all rows; without spread every distance is 0.

        Raises:
            ValueError: fewer than two rows.
        """
        _check_enough(self.count)
        assert isinstance(self.first, Tensor) and isinstance(self.second, Tensor)
        offset = self.first / self.count
        mean = self.shift + offset
        covariance = self.second / self.count - torch.outer(offset, offset)
        spread = covariance.trace() > ROUNDING**2 * mean.square().sum()
        variances, directions = torch.linalg.eigh(covariance)
        return _shrunk(mean, spread.expand_as(mean).double(), directions, variances, shrinkage)


def from_precision(mean: Float[Tensor, "c"], precision: Float[Tensor, "c c"]) -> Gaussian:
    """Returns the Gaussian with a mean and an inverse covariance."""
    inverse, directions = torch.linalg.eigh(precision)
    return Gaussian(mean, torch.ones_like(mean), directions, inverse, mean.new_zeros(()))


def _shrunk(
    mean: Tensor,
    scale: Tensor,
    directions: Float[Tensor, "c k"],
    variances: Float[Tensor, "k"],
    shrinkage: float,
) -> Gaussian:
    """The Gaussian whose variances are shrunk towards their mean over the columns that count."""
    columns = int((scale > 0).sum())
    target = shrinkage * variances.clamp(min=0).sum() / max(columns, 1)
    values = (1 - shrinkage) * variances.clamp(min=0) + target
    largest = values.max() if len(values) else 0.0
    inverse = torch.where(values > 1e-14 * largest, 1 / values, 0.0)
    other_directions = len(variances) < columns and bool(target > 0)
    elsewhere = 1 / target if other_directions else torch.zeros_like(target)
    return Gaussian(mean, scale, directions.contiguous(), inverse, elsewhere)


@dataclass(frozen=True)
class Tails:
    """Trusted values of each column, in order."""

    ordered: Float[Tensor, "c n"]

    @property
    def columns(self) -> int:
        """How many there are."""
        return len(self.ordered)

    def unusual(self, rows: Float[Tensor, "B c"]) -> Float[Tensor, "B"]:
        """How many columns are larger than they usually are, and how rarely they are as large."""
        n = self.ordered.shape[1]
        columns = rows.T.to(self.ordered.dtype).contiguous()
        smaller = torch.searchsorted(self.ordered, columns)  # [c, B]
        return -((1 + n - smaller) / (n + 1)).log().sum(0)


def tails(rows: Float[Tensor, "n c"]) -> Tails:
    """Returns the tails of trusted rows."""
    return Tails(rows.T.sort(1).values.contiguous())


@dataclass(frozen=True)
class Total:
    """Nothing needs to be known of trusted rows."""

    columns = None

    def unusual(self, rows: Float[Tensor, "B c"]) -> Float[Tensor, "B"]:
        """The sum of each row."""
        return rows.sum(1)


def distance(shrinkage: float) -> Summary:
    """By the distance of standardised rows, with a shrunk covariance."""
    return Summary(lambda rows: gaussian(rows, shrinkage, standardised=True), Gaussian)


LARGEST, TAILS, TOTAL = Summary(standard, Standard), Summary(tails, Tails), Summary(None, Total)


def _check_enough(count: int) -> None:
    if count < 2:
        raise ValueError(
            f"{count} trusted rows, but a spread needs at least 2; give more trusted prompts"
        )
