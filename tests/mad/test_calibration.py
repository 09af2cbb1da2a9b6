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


# ---- groups and rounding -------------------------------------------------------------------------

by_group = st.dictionaries(st.sampled_from(["trusted", "hard", "odd"]), scores, min_size=1)


@given(by_group, scores, st.sampled_from([None, -1.0, 0.5]))
def test_p_values_are_the_largest_over_groups_of_scores_above_rounding(groups, new, noise):
    fitted = Calibration.of({name: torch.tensor(own) for name, own in groups.items()}, noise)

    def level(value: float) -> float:
        return value if noise is None else max(value, noise)

    def slow(value: float, held: list[float]) -> float:
        above = [c for c in held if level(c) >= level(value)]
        return (1 + len(above)) / (len(held) + 1)

    exact = {name: torch.tensor(own).tolist() for name, own in groups.items()}
    values = torch.tensor(new)
    for value, p in zip(values.tolist(), fitted.p_values(values).tolist(), strict=True):
        assert p == pytest.approx(max(slow(value, held) for held in exact.values()))
    for alpha in (0.1, 0.5):
        if fitted.problem(alpha) is None:
            flagged = values.double() > fitted.threshold(alpha)
            assert (flagged == (fitted.p_values(values) <= alpha)).all()


def test_false_alarms_are_bounded_in_every_group():
    generator = torch.Generator().manual_seed(0)
    shifts, draws = {"trusted": 0.0, "hard": 2.0, "odd": 4.0}, 300
    flagged, pooled = dict.fromkeys(shifts, 0.0), dict.fromkeys(shifts, 0.0)
    for _ in range(draws):
        held = {
            name: shift + torch.randn(99, generator=generator) for name, shift in shifts.items()
        }
        grouped, together = Calibration.of(held), Calibration.of(torch.cat([*held.values()]))
        for name, shift in shifts.items():
            new = shift + torch.randn(50, generator=generator)
            flagged[name] += (grouped.p_values(new) <= 0.05).double().mean().item() / draws
            pooled[name] += (together.p_values(new) <= 0.05).double().mean().item() / draws
    error = 3 * (0.05 * 0.95 / draws) ** 0.5
    assert all(rate <= 0.05 + error for rate in flagged.values())
    assert flagged["odd"] > 0.02 and pooled["odd"] > 0.1, "one calibration for all bounds none"


def test_the_smallest_group_decides_which_alpha_can_be_used():
    fitted = Calibration.of({"trusted": torch.randn(99), "hard": torch.randn(40)})
    assert "99 calibration inputs, but there are 40 of group hard" in (fitted.problem(0.01) or "")
    assert fitted.problem(0.03) is None
    with pytest.raises(ValueError, match="0 calibration scores of hard inputs"):
        Calibration.of({"trusted": torch.randn(9), "hard": torch.empty(0)})


def test_rounding_is_not_flagged_and_is_told():
    noisy = Calibration.of(1e-17 * torch.rand(199), noise=1e-9)
    doubt = noisy.doubt() or ""
    assert "all calibration scores are rounding" in doubt and "rounding 1e-09" in doubt
    assert noisy.p_values(torch.tensor([5e-10, 2e-9])).tolist() == [1.0, 1 / 200]
    assert noisy.threshold(0.01) == 1e-9
    assert Calibration.of(torch.rand(199), noise=1e-9).doubt() is None
    assert Calibration.of(torch.zeros(199)).doubt() is None, "not known"


def test_a_saved_calibration_is_the_same_again():
    fitted = Calibration.of({"trusted": torch.randn(9), "hard": torch.randn(4)}, noise=0.1)
    about = {"calibration": {"prompts": 9}, "harmless": {"hard": {"prompts": 4}}, "noise": 0.1}
    again = Calibration.restored(fitted.scores, about)
    assert again.noise == fitted.noise and list(again.groups) == ["trusted", "hard"]
    assert all(torch.equal(again.groups[name], own) for name, own in fitted.groups.items())
    before = Calibration.restored(torch.arange(9.0), {"calibration": {"prompts": 9}})
    assert before.noise is None and list(before.groups) == ["trusted"]
    with pytest.raises(ValueError, match="13 calibration scores, but 12 inputs"):
        Calibration.restored(fitted.scores, {**about, "harmless": {"hard": {"prompts": 3}}})
