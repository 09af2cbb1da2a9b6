"""The metric under a mask, prompt by prompt without padding, and the faithfulness scale."""

from __future__ import annotations

import math

import pytest
import torch

from circuits.ablation import AblationConfig, fit_ablation
from circuits.discovery import EAPIG
from circuits.engine import Engine
from circuits.extraction import extract
from circuits.faithfulness import faithfulness_scale
from circuits.metrics import METRICS
from circuits.objective import Objective, prepare
from circuits.prompts import Prompts, prompts_from_records
from circuits.selection import Selection
from tests import tiny
from tests.budget import memory_for

ENGINES = {
    "gpt2": Engine(tiny.gpt2()),
    "bidirectional": Engine(tiny.native(attention_dir="bidirectional")),
}
ENGINE = ENGINES["gpt2"]
RECORDS = tiny.records(7, seed=5)
PROMPTS = prompts_from_records(RECORDS)
REFERENCE = tiny.prompts(6, seed=6)


@pytest.fixture(params=ENGINES)
def engine(request) -> Engine:
    return ENGINES[request.param]


def objective(engine: Engine, metric: str, ablation: str = "mean") -> Objective:
    fitted = fit_ablation(AblationConfig(ablation), engine, REFERENCE)
    return prepare(
        engine, PROMPTS, METRICS[metric], fitted, memory=memory_for(3, engine, PROMPTS, fitted)
    )


def random_masks(engine: Engine, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.rand(
        count, *engine.graph.exists.shape, generator=generator, dtype=torch.float64
    ).round(decimals=1)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("ablation", ["mean", "counterfactual"])
def test_measure_is_the_metric_of_each_prompt_by_itself(engine, metric, ablation):
    chosen = METRICS[metric]
    ours = objective(engine, metric, ablation)
    assert len(ours.batches) == 3
    masks = random_masks(engine, 2)
    fitted = fit_ablation(AblationConfig(ablation), engine, REFERENCE)
    expected = torch.empty(2, len(RECORDS), dtype=torch.float64)
    full = torch.empty(len(RECORDS), dtype=torch.float64)
    for row, record in enumerate(RECORDS):
        alone = prompts_from_records([record])
        clean = engine.model.bridge(alone.clean)[:, alone.positions[0]]
        full[row] = chosen(clean, alone, clean)[0]
        for number, mask in enumerate(masks):
            logits = engine.masked(
                tiny.from_tokens(alone.clean), mask, fitted.values(engine, alone)
            )[:, alone.positions[0]]
            expected[number, row] = chosen(logits, alone, clean)[0]
    sign = 1 if chosen.higher_is_better else -1
    torch.testing.assert_close(ours.measure(masks), sign * expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(ours.measure(masks[1]), sign * expected[1], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(ours.full(), sign * full, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_full_and_empty_are_the_ends_of_the_mask(engine, metric):
    ours = objective(engine, metric)
    ones = engine.graph.exists
    torch.testing.assert_close(ours.full(), ours.measure(ones), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(
        ours.empty(), ours.measure(torch.zeros_like(ones)), atol=1e-9, rtol=1e-9
    )
    if metric != "accuracy":
        assert not torch.allclose(ours.full(), ours.empty())


def test_with_counterfactual_ablation_the_empty_circuit_is_the_corrupt_prompt(engine):
    swapped = [{**record, "clean": record["corrupt"]} for record in RECORDS]
    ours = objective(engine, "logit_diff", "counterfactual")
    fitted = fit_ablation(AblationConfig("zero"), engine, REFERENCE)
    corrupt = prepare(engine, prompts_from_records(swapped), METRICS["logit_diff"], fitted)
    torch.testing.assert_close(ours.empty(), corrupt.full(), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("metric", ["kl", "logit_diff"])
def test_faithfulness_is_the_quotient_of_means(engine, metric):
    prompts = prompts_from_records(tiny.with_own_answers(engine, RECORDS))
    fitted = fit_ablation(AblationConfig("mean"), engine, REFERENCE)
    ours = prepare(
        engine, prompts, METRICS[metric], fitted, memory=memory_for(3, engine, prompts, fitted)
    )
    scale = faithfulness_scale(ours)
    mask = random_masks(engine, 1)[0]
    sign = 1 if METRICS[metric].higher_is_better else -1
    full, empty, circuit = (
        sign * sum(values.tolist()) / len(RECORDS)
        for values in (ours.full(), ours.empty(), ours.measure(mask))
    )
    result = scale.faithfulness(mask)
    assert (result.metric, result.ablation, result.n_prompts) == (metric, "mean", len(RECORDS))
    assert (result.model, result.circuit, result.empty) == pytest.approx(
        (full, circuit, empty), rel=1e-9, abs=1e-12
    )
    assert result.value == pytest.approx((circuit - empty) / (full - empty), rel=1e-9)
    assert scale.faithfulness(engine.graph.exists).value == pytest.approx(1, abs=1e-9)
    assert scale.faithfulness(torch.zeros_like(engine.graph.exists)).value == pytest.approx(
        0, abs=1e-9
    )
    if metric == "kl":
        assert result.circuit > 0 and result.model == pytest.approx(0, abs=1e-12)


def fixed(full: list[float], empty: list[float]) -> Objective:
    """A behaviour whose two ends are given numbers."""

    class Given(Objective):
        def full(self):
            return torch.tensor(full)

        def empty(self):
            return torch.tensor(empty)

    ours = objective(ENGINES["gpt2"], "logit_diff")
    return Given(ours.engine, ours.metric, ours.batches)


def test_the_scale_is_refused_under_two_standard_errors():
    """Gaps 1, 2, 3 and 6: mean 3, standard error sqrt(14 / 3) / 2 = 1.080; moved down until the
    mean is 2.16.
    """
    gaps, error = [1.0, 2.0, 3.0, 6.0], math.sqrt(14 / 3) / 2
    for sign in (1, -1):
        for excess, refused in ((1e-3, False), (-1e-3, True)):
            empty = [sign * (3 - 2 * error - excess)] * 4
            given = fixed([sign * gap for gap in gaps], empty)
            if not refused:
                scale = faithfulness_scale(given)
                assert scale.full - scale.empty == pytest.approx(
                    sign * (2 * error + excess), abs=1e-6
                )
                continue
            with pytest.raises(
                ValueError, match="metric logit_diff does not separate the model .* over 4 prompts"
            ):
                faithfulness_scale(given)


@pytest.mark.parametrize(
    "ends", [([1.0], [1.0]), ([1.0, 2.0], [1.0, 2.0]), ([1.0, 3.0], [3.0, 1.0])]
)
def test_no_gap_at_all_is_refused(ends):
    with pytest.raises(ValueError, match="does not separate"):
        faithfulness_scale(fixed(*ends))


def test_prompts_that_lack_what_is_needed_are_refused(engine):
    bare = prompts_from_records([{"clean": [1, 2, 3]}])
    mean, counterfactual = (
        fit_ablation(AblationConfig(name), engine, REFERENCE) for name in ("mean", "counterfactual")
    )
    with pytest.raises(ValueError, match="metric logit_diff needs answers and wrong_answers"):
        prepare(engine, bare, METRICS["logit_diff"], mean)
    with pytest.raises(ValueError, match="ablation=counterfactual needs a corrupt twin"):
        prepare(engine, bare, METRICS["kl"], counterfactual)
    with pytest.raises(ValueError, match="prompts of 17 tokens, but the model's context is 16"):
        prepare(engine, prompts_from_records([{"clean": [1] * 17}]), METRICS["kl"], mean)
    with pytest.raises(
        ValueError, match=r"one prompt of 9 tokens takes up to \d+.* but memory=1kB; raise memory"
    ):
        prepare(engine, PROMPTS, METRICS["kl"], mean, memory="1kB")


# ---- prompts without values ----------------------------------------------------------------------


def with_long_ones(count: int) -> Prompts:
    """A dozen short prompts, and so many longer ones, the longest last."""
    long = [
        record
        for n in range(count)
        for record in tiny.records(1, n, shortest=10 + n, longest=10 + n)
    ]
    return prompts_from_records([*tiny.records(12, 5, longest=7), *long])


@pytest.mark.parametrize("ablation", ["resample", "positional_mean"])
def test_prompts_without_values_are_left_out_with_one_warning(ablation, caplog):
    prompts = with_long_ones(2)
    reference = prompts if ablation == "resample" else prompts.select(slice(12))
    fitted = fit_ablation(AblationConfig(ablation), ENGINE, reference)
    objective = prepare(ENGINE, prompts, METRICS["kl"], fitted)
    kept = len(prompts) - (1 if ablation == "resample" else 2)
    assert objective.batches.whole.sequences() == prompts.sequences()[:kept]
    (message,) = (record.getMessage() for record in caplog.records)
    assert f"ablation={ablation}: {len(prompts) - kept} of 14 prompts" in message
    assert "'1.0' (11 tokens)" in message and "use ablation=mean" in message
    assert ("'0.0' (10 tokens)" in message) == (ablation == "positional_mean")
    caplog.clear()
    alone = prepare(ENGINE, prompts.select(slice(kept)), METRICS["kl"], fitted)
    assert torch.equal(objective.empty(), alone.empty()) and not caplog.records


def test_where_no_prompt_has_values_the_ablation_says_why():
    long = with_long_ones(1).select([12])
    for ablation, reason in (
        ("resample", "no reference prompt but itself"),
        ("positional_mean", ""),
    ):
        reference = long if ablation == "resample" else with_long_ones(0)
        fitted = fit_ablation(AblationConfig(ablation), ENGINE, reference)
        with pytest.raises(ValueError, match=f"ablation={ablation}: .*{reason}.*use ablation=mean"):
            prepare(ENGINE, long, METRICS["kl"], fitted)


def test_one_long_prompt_does_not_stop_an_extraction(caplog):
    long, short = with_long_ones(1), prompts_from_records(tiny.records(8, 6, longest=7))
    options = {"metric": "kl", "ablation": "resample", "random_draws": 0}
    found = extract(ENGINE, long, short, EAPIG(), selection=Selection(edges=20), **options)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    splits = found.circuit.about["splits"]
    assert splits["discovery"] == {"prompts": 12, "hash": long.select(slice(12)).hash()}
    assert splits["evaluation"] == {"prompts": 8, "hash": short.hash()}
    assert len(found.used["discovery"]) == 13, "what was given may not calibrate"
