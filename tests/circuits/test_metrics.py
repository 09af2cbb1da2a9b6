"""Each metric against a loop over prompts, positions and tokens in plain Python."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuits.metrics import METRICS, metric_named
from circuits.prompts import prompts_from_records
from tests import tiny

RECORDS = tiny.records(6, seed=4, vocabulary=13)
PROMPTS = prompts_from_records(RECORDS)
SCORED = PROMPTS.positions.shape[1]


def test_the_prompts_are_ragged_in_every_way():
    """Otherwise what follows would prove little."""
    assert len({len(record["positions"]) for record in RECORDS}) > 1
    for field in ("answers", "wrong_answers"):
        assert len({len(here) for record in RECORDS for here in record[field]}) > 1


def random_logits(*leading: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*leading, len(PROMPTS), SCORED, 13, generator=generator, dtype=dtype)


# ---- the metrics of one position, from lists of floats ------------------------------------------


def softmax(logits: list[float]) -> list[float]:
    total = math.fsum(math.exp(logit) for logit in logits)
    return [math.exp(logit) / total for logit in logits]


def mean(values) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def kl(logits, reference, right, wrong):
    return math.fsum(
        p * (math.log(p) - math.log(q)) for p, q in zip(softmax(reference), softmax(logits))
    )


def logit_diff(logits, reference, right, wrong):
    return mean(logits[token] for token in right) - mean(logits[token] for token in wrong)


def prob_diff(logits, reference, right, wrong):
    p = softmax(logits)
    return math.fsum(p[token] for token in right) - math.fsum(p[token] for token in wrong)


def cross_entropy(logits, reference, right, wrong):
    p = softmax(logits)
    return -math.log(math.fsum(p[token] for token in right))


def accuracy(logits, reference, right, wrong):
    return float(max(range(len(logits)), key=logits.__getitem__) in right)


SLOW = {f.__name__: f for f in (kl, logit_diff, prob_diff, cross_entropy, accuracy)}
LOWER_IS_BETTER = {"kl", "cross_entropy"}


def loop(name: str, logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """[B, P, V] -> [B]"""
    return torch.tensor(
        [
            mean(
                SLOW[name](logits[b, p].tolist(), reference[b, p].tolist(), right, wrong)
                for p, (right, wrong) in enumerate(zip(record["answers"], record["wrong_answers"]))
            )
            for b, record in enumerate(RECORDS)
        ],
        dtype=torch.float64,
    )


def test_every_metric_is_tested():
    assert set(SLOW) == set(METRICS)


@pytest.mark.parametrize("name", SLOW)
@given(seed=st.integers(0, 1000))
def test_a_metric_is_its_loop(name, seed):
    logits, reference = random_logits(seed=seed), random_logits(seed=seed + 1)
    ours = METRICS[name](logits, PROMPTS, reference)
    torch.testing.assert_close(ours, loop(name, logits, reference), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("leading", [(3,), (2, 2)])
def test_leading_axes_are_so_many_runs_on_the_same_prompts(name, leading):
    logits, reference = random_logits(*leading), random_logits(seed=9)
    ours = METRICS[name](logits, PROMPTS, reference)
    assert ours.shape == (*leading, len(PROMPTS))
    one_by_one = [loop(name, run, reference) for run in logits.flatten(0, -4)]
    torch.testing.assert_close(ours.flatten(0, -2), torch.stack(one_by_one), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name", SLOW)
def test_oriented_is_higher_where_it_is_better(name):
    """Logits that rise at the answers, or towards the model's own, are better."""
    logits, reference = random_logits(), random_logits(seed=9)
    values = METRICS[name](logits, PROMPTS, reference)
    sign = -1 if name in LOWER_IS_BETTER else 1
    assert torch.equal(METRICS[name].oriented(logits, PROMPTS, reference), sign * values)
    better = logits.clone()
    for b, record in enumerate(RECORDS):
        for p, right in enumerate(record["answers"]):
            better[b, p, right] += 20
    better = reference if name == "kl" else better
    worse, best = (METRICS[name].oriented(x, PROMPTS, reference) for x in (logits, better))
    assert (worse <= best).all() and worse.mean() < best.mean()


@pytest.mark.parametrize("name", SLOW)
def test_what_is_not_scored_does_not_count(name):
    """Neither its value nor, in training, its gradient: absent positions carry exactly 0."""
    logits, reference = random_logits(), random_logits(seed=9)
    absent = PROMPTS.positions < 0
    assert absent.any()
    changed = logits.masked_scatter(
        absent[..., None], 1e4 * torch.randn(int(absent.sum()) * 13, dtype=torch.float64)
    )
    assert torch.equal(
        METRICS[name](changed, PROMPTS, reference), METRICS[name](logits, PROMPTS, reference)
    )
    if METRICS[name].differentiable:
        (gradient,) = torch.autograd.grad(
            METRICS[name](changed.requires_grad_(), PROMPTS, reference).sum(), changed
        )
        assert (
            torch.isfinite(gradient).all()
            and not gradient[absent].any()
            and gradient[~absent].any()
        )


@pytest.mark.parametrize("name", SLOW)
def test_low_precision_is_measured_in_float32(name):
    logits, reference = (random_logits(seed=seed, dtype=torch.bfloat16) for seed in (0, 9))
    ours = METRICS[name](logits, PROMPTS, reference)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), loop(name, logits, reference), atol=1e-4, rtol=1e-4)


def test_the_kl_of_a_run_with_itself_is_nothing_and_flat():
    logits = random_logits().requires_grad_()
    value = METRICS["kl"](logits, PROMPTS, logits.detach())
    assert value.abs().max() < 1e-14
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert gradient.abs().max() < 1e-14
    assert [name for name, metric in METRICS.items() if metric.flat_at_model] == ["kl"]


def test_kl_keeps_far_tails():
    """A softmax followed by a logarithm would give infinity here."""
    reference = torch.zeros(len(PROMPTS), SCORED, 13, dtype=torch.float64)
    logits = reference.clone()
    logits[..., 0] = 1e4
    expected = math.log(1 / 13) + 1e4 * 12 / 13
    torch.testing.assert_close(
        METRICS["kl"](logits, PROMPTS, reference), torch.full((6,), expected).double()
    )


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "lacks", "message"),
    [
        (
            "logit_diff",
            ("answers", "wrong_answers"),
            "metric logit_diff needs answers and wrong_answers in the prompts",
        ),
        ("logit_diff", ("wrong_answers",), "metric logit_diff needs wrong_answers in"),
        ("prob_diff", ("wrong_answers",), "metric prob_diff needs wrong_answers in"),
        ("cross_entropy", ("answers",), "metric cross_entropy needs answers in"),
        ("accuracy", ("answers",), "metric accuracy needs answers in"),
    ],
)
def test_prompts_without_answers_are_refused(name, lacks, message):
    prompts = dataclasses.replace(PROMPTS, **{field: None for field in lacks})
    with pytest.raises(ValueError, match=message):
        METRICS[name].require(prompts)
    with pytest.raises(ValueError, match=message):
        METRICS[name](random_logits(), prompts)


def test_kl_needs_no_answers_but_the_model():
    bare = dataclasses.replace(PROMPTS, answers=None, wrong_answers=None)
    logits, reference = random_logits(), random_logits(seed=9)
    assert torch.equal(
        METRICS["kl"](logits, bare, reference), METRICS["kl"](logits, PROMPTS, reference)
    )
    with pytest.raises(
        ValueError, match="metric kl compares with the full model, whose logits were not given"
    ):
        METRICS["kl"](logits, bare)


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(name, value):
    logits = random_logits()
    logits[0, 0, 0] = value
    with pytest.raises(ValueError, match="the logits are not finite"):
        METRICS[name](logits, PROMPTS, random_logits())


def test_metrics_by_name():
    for name, metric in METRICS.items():
        assert metric_named(name) is metric and metric.name == name
    with pytest.raises(
        ValueError,
        match="metric='loss', but the metrics are kl, logit_diff, prob_diff, cross_entropy",
    ):
        metric_named("loss")
