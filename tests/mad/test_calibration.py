"""Calibration: conformal p-values against their definition, and the bound on false alarms by
simulation.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mad.calibration import Calibration

scores = st.lists(
    st.floats(-5, 5, allow_nan=False).map(lambda x: round(x, 1)), min_size=1, max_size=40
)


@given(scores, scores)
def test_p_values_are_the_definition(calibration, new):
    ours = Calibration.of(torch.tensor(calibration)).p_values(torch.tensor(new))
    held = torch.tensor(calibration).tolist()
    for value, p in zip(torch.tensor(new).tolist(), ours.tolist(), strict=True):
        assert p == pytest.approx((1 + sum(c >= value for c in held)) / (len(held) + 1))


@given(scores, scores, st.sampled_from([0.05, 0.1, 0.3, 0.5]))
def test_above_the_threshold_is_p_at_most_alpha(calibration, new, alpha):
    fitted = Calibration.of(torch.tensor(calibration))
    if fitted.problem(alpha) is not None:
        return
    values = torch.tensor(new)
    assert ((values.double() > fitted.threshold(alpha)) == (fitted.p_values(values) <= alpha)).all()


def test_false_alarms_are_bounded_on_exchangeable_inputs():
    generator = torch.Generator().manual_seed(0)
    for alpha, n in ((0.01, 99), (0.05, 40), (0.2, 9)):
        flagged = 0
        for _ in range(400):
            calibration = Calibration.of(torch.randn(n, generator=generator))
            flagged += int(
                (calibration.p_values(torch.randn(50, generator=generator)) <= alpha).sum()
            )
        rate, error = (
            flagged / 20_000,
            (alpha * (1 - alpha) / 400) ** 0.5,
        )  # draws share their calibration
        assert rate <= alpha + 3 * error
        assert rate >= alpha - 1 / (n + 1) - 3 * error


def test_alpha_needs_enough_calibration_inputs():
    assert Calibration.of(torch.randn(99)).problem(0.01) is None
    assert "at least 99 calibration inputs, but there are 98" in (
        Calibration.of(torch.randn(98)).problem(0.01) or ""
    )
    for alpha in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="alpha="):
            Calibration.of(torch.randn(9)).problem(alpha)


def test_scores_that_cannot_calibrate_are_refused():
    with pytest.raises(ValueError, match="0 calibration scores"):
        Calibration.of(torch.empty(0))
    with pytest.raises(ValueError, match="not finite"):
        Calibration.of(torch.tensor([1.0, float("nan")]))
