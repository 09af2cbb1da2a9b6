"""Distances against scikit-learn and plain linear algebra."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.covariance import ShrunkCovariance

from mad.statistics import Moments, from_precision, gaussian, standard, tails


def rows(count: int, columns: int = 30, seed: int = 0) -> torch.Tensor:
    """Correlated rows around a mean far from 0."""
    draw = torch.Generator().manual_seed(7)
    mixing = torch.randn(columns, columns, generator=draw, dtype=torch.float64)
    new = torch.Generator().manual_seed(seed)
    return torch.randn(count, columns, generator=new, dtype=torch.float64) @ mixing + 5


def dense(trusted: torch.Tensor, new: torch.Tensor, shrinkage: float) -> torch.Tensor:
    """The formula, word by word."""
    centred = trusted - trusted.mean(0)
    covariance = centred.T @ centred / len(trusted)
    columns = len(covariance)
    target = covariance.trace() / columns * torch.eye(columns, dtype=torch.float64)
    precision = torch.linalg.inv((1 - shrinkage) * covariance + shrinkage * target)
    gap = new - trusted.mean(0)
    return torch.stack([row @ precision @ row for row in gap])


@pytest.mark.parametrize("shrinkage", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("count", [2, 12, 31, 200])
def test_distances_are_scikit_learns_with_fewer_rows_than_columns_and_with_more(count, shrinkage):
    trusted, new = rows(count), rows(7, seed=1)
    found = gaussian(trusted, shrinkage).squared_distance(new)
    theirs = ShrunkCovariance(shrinkage=shrinkage).fit(trusted.numpy()).mahalanobis(new.numpy())
    np.testing.assert_allclose(found, theirs, rtol=1e-6)
    torch.testing.assert_close(found, dense(trusted, new, shrinkage), rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [12, 60])
def test_columns_without_spread_are_left_out_where_they_are_standardised(count):
    trusted, new = rows(count), rows(7, seed=1)
    trusted[:, 4], trusted[:, 9] = 3.0, 1e-9 * trusted[:, 9]  # none, and no more than rounding
    kept = [column for column in range(30) if column not in (4, 9)]
    mean, deviation = trusted[:, kept].mean(0), trusted[:, kept].std(0, correction=0)
    scaled, scaled_new = ((some[:, kept] - mean) / deviation for some in (trusted, new))
    fitted = ShrunkCovariance(shrinkage=0.1).fit(scaled.numpy())
    found = gaussian(trusted, 0.1, standardised=True).squared_distance(new)
    np.testing.assert_allclose(found, fitted.mahalanobis(scaled_new.numpy()))


def test_without_shrinkage_only_directions_with_spread_count():
    trusted, new = rows(100, 3), rows(5, 3, seed=1)
    found = gaussian(trusted, 0.0).squared_distance(new)
    torch.testing.assert_close(found, dense(trusted, new, 0.0))
    flat = torch.cat([trusted, torch.ones(100, 1, dtype=torch.float64)], 1)
    more = torch.cat([new, torch.full((5, 1), 9.0, dtype=torch.float64)], 1)
    torch.testing.assert_close(gaussian(flat, 0.0).squared_distance(more), found)


def test_moments_of_batches_are_those_of_all_rows():
    trusted, new = rows(90), rows(7, seed=1)
    moments = Moments()
    for part in trusted.split(40):
        moments.add(part)
    found, expected = moments.gaussian(1e-3), gaussian(trusted, 1e-3)
    torch.testing.assert_close(found.squared_distance(new), expected.squared_distance(new))
    same = Moments()
    same.add(torch.full((9, 4), 3.0))
    assert (same.gaussian(1e-3).squared_distance(torch.randn(3, 4)) == 0).all(), "no spread"


def test_a_gaussian_from_its_precision():
    trusted, new = rows(90), rows(7, seed=1)
    fitted = ShrunkCovariance(shrinkage=1e-3).fit(trusted.numpy())
    mean, precision = map(torch.from_numpy, (fitted.location_, fitted.get_precision()))
    np.testing.assert_allclose(
        from_precision(mean, precision).squared_distance(new), fitted.mahalanobis(new.numpy())
    )


def test_the_largest_z():
    trusted, new = rows(20, 4), rows(6, 4, seed=1)
    trusted[:, 2] = 3.0
    varying = [0, 1, 3]
    z = ((new - trusted.mean(0)) / trusted.std(0))[:, varying]
    torch.testing.assert_close(standard(trusted).unusual(new), z.amax(1))
    assert standard(trusted).z(new)[:, 2].eq(0).all()


@pytest.mark.parametrize("columns", [[2], []])
def test_rows_that_never_vary_are_never_unusual(columns):
    trusted, new = rows(20, 4), rows(6, 4, seed=1)
    trusted[:, 2] = 3.0
    for usual in (standard, lambda some: gaussian(some, 0.1, standardised=True)):
        assert usual(trusted[:, columns]).unusual(new[:, columns]).tolist() == [0] * 6


def test_tails_count_what_is_as_large():
    trusted, new = rows(9, 3).round(), rows(6, 3, seed=1).round()
    expected = [
        -sum(
            math.log((1 + int((trusted[:, column] >= row[column]).sum())) / 10)
            for column in range(3)
        )
        for row in new
    ]
    found = tails(trusted).unusual(new).double()
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("usual", [standard, lambda some: gaussian(some, 0.1)])
def test_one_row_has_no_spread(usual):
    with pytest.raises(ValueError, match="1 trusted rows, but a spread needs at least 2"):
        usual(rows(1))
