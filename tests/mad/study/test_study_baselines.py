"""Scores without a circuit, against HuggingFace's own numbers and slow versions of their formulas,
on tiny models.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.covariance import ShrunkCovariance

from circuits.ablation import AblationConfig, fit_ablation
from circuits.engine import Engine
from circuits.model.load import ModelConfig, load_model
from circuits.prompts import Prompts, prompts_from_records
from mad.detectors.baselines import Mahalanobis
from mad.study import baselines
from mad.study.baselines import (
    BASELINES,
    FineTuning,
    attribution_mahalanobis,
    attributions,
    fine_tune,
    fine_tuned_kl,
    fit_baselines,
    layer_baselines,
    residual_stream,
    standardise,
)
from mad.study.subject import Subject
from tests import tiny

NEW = tiny.prompts(9, seed=1)  # of different lengths, 1 to 3 scored positions


def subject(model, fit: Prompts | None = None) -> Subject:
    return Subject("tiny", 3, model, {"fit": fit or tiny.prompts(40)}, {}, {})


@pytest.fixture(scope="module")
def plain() -> Subject:
    return subject(tiny.gpt2())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Subject:
    """A subject whose model lies in a folder."""
    folder = tmp_path_factory.mktemp("model")
    tiny.gpt2_module().to(torch.float64).save_pretrained(folder)
    return subject(load_model(ModelConfig(path=str(folder), dtype="float64")))


# ---- residual streams
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "gemma2"])
def test_residual_streams_are_the_hidden_states_of_huggingface(name):
    engine = Engine(tiny.huggingface(name))
    ours = residual_stream(engine, NEW)
    module = tiny.HUGGINGFACE[name]().to(torch.float64)
    with torch.no_grad():
        theirs = module(NEW.clean, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 3
    for layer, (x, y) in enumerate(zip(ours, theirs)):
        x = (
            engine.architecture.final_norm(x) if layer == 2 else x
        )  # HuggingFace's last one is normed
        # HuggingFace's RMS norms compute in float32
        torch.testing.assert_close(x[NEW.key_mask], y[NEW.key_mask], rtol=1e-5, atol=1e-5)


def stream_of(engine: Engine, prompts: Prompts, place: str) -> list[np.ndarray]:
    """Each prompt's rows [L, tokens, D], prompt by prompt."""
    found = []
    for row in range(len(prompts)):
        one = prompts.select([row])
        at = one.positions[0].tolist() if place == "last" else range(int(one.lengths))
        found.append(residual_stream(engine, one)[:, 0, list(at)].double().numpy())
    return found


@pytest.mark.parametrize("place", ["last", "all"])
def test_mahalanobis_against_the_formula(plain, place):
    scores = layer_baselines(plain)
    fit, new = (stream_of(plain.engine, prompts, place) for prompts in (plain.trusted["fit"], NEW))
    ratios = np.empty((len(NEW), 3))
    for layer in range(3):
        fitted = ShrunkCovariance(shrinkage=1e-3).fit(np.concatenate([rows[layer] for rows in fit]))
        trusted, own = (
            np.array([fitted.mahalanobis(rows[layer]).mean() for rows in prompts])
            for prompts in (fit, new)
        )
        ratios[:, layer] = own / trusted.mean()
        np.testing.assert_allclose(
            scores[f"mahalanobis_{place}_layer_{layer}"](NEW), ratios[:, layer], rtol=1e-5
        )
    np.testing.assert_allclose(scores[f"mahalanobis_{place}_mean"](NEW), ratios.mean(1), rtol=1e-5)
    np.testing.assert_allclose(scores[f"mahalanobis_{place}_max"](NEW), ratios.max(1), rtol=1e-5)
    assert Mahalanobis().shrinkage == 1e-3


def test_a_layer_without_spread_takes_no_part():
    def same_last_token(count: int, seed: int) -> Prompts:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(29, (count, 6), generator=generator)
        tokens[:, -1] = 7
        return prompts_from_records(
            [{"clean": row, "positions": [-1]} for row in tokens.tolist()], vocabulary=29
        )

    scores = layer_baselines(subject(tiny.gpt2(torch.float32), same_last_token(50, 0)), ("last",))
    new = same_last_token(5, 1)
    one, two = (scores[f"mahalanobis_last_layer_{layer}"](new) for layer in (1, 2))
    assert (scores["mahalanobis_last_layer_0"](new) == 0).all() and (one > 0).all()
    torch.testing.assert_close(scores["mahalanobis_last_mean"](new), (one + two) / 3)


def test_scores_that_share_distances_run_the_model_once(plain, monkeypatch):
    scores, runs = layer_baselines(plain), []
    stream = residual_stream
    monkeypatch.setattr(
        baselines, "residual_stream", lambda *inputs: runs.append(1) or stream(*inputs)
    )
    once = [score(NEW) for score in scores.values()]
    assert len(once) == 2 * 5 and len(runs) == 1


# ---- attributions
# -------------------------------------------------------------------------------------


def lead(engine: Engine, means, prompts: Prompts, mask: torch.Tensor) -> torch.Tensor:
    """The lead of the model's first choice over its second, under a mask, for one prompt."""
    logits = engine.masked(prompts.clean, mask, means.values(engine, prompts))[0]
    clean = engine.logits(prompts.clean)[0]
    leads = []
    for position in prompts.positions[0].tolist():
        first, second = clean[position].topk(2).indices.tolist()
        leads.append(logits[position, first] - logits[position, second])
    return torch.stack(leads).mean()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_attributions_are_gradients_of_the_edge_mask(name):
    engine = Engine(tiny.huggingface(name))
    means = fit_ablation(AblationConfig("mean"), engine, tiny.prompts(40))
    new = NEW.select(range(4))
    found = attributions(engine, means, new)
    assert found.shape == (4, engine.graph.n_edges)
    rows = list(engine.graph.edges())
    for row in range(4):
        one, mask = new.select([row]), engine.graph.exists.double().requires_grad_()
        (gradient,) = torch.autograd.grad(lead(engine, means, one, mask), mask)
        torch.testing.assert_close(
            found[row].double(), gradient[engine.graph.exists], rtol=1e-5, atol=1e-6
        )
        for edge in rows[5 :: len(rows) // 4]:
            step = torch.zeros_like(mask)
            step[edge] = 1e-5
            with torch.no_grad():
                up, down = (lead(engine, means, one, mask + sign * step) for sign in (1, -1))
            slope = float((up - down) / 2e-5)
            assert float(found[row, rows.index(edge)]) == pytest.approx(slope, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("count", [12, 60])
def test_distances_of_standardised_columns_against_scikit_learn(count):
    """With fewer rows than columns, and with more."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(30, 30, generator=generator, dtype=torch.float64)
    fit, new = (
        torch.randn(size, 30, generator=generator, dtype=torch.float64) @ mixing
        for size in (count, 7)
    )
    fit[:, 4], fit[:, 9] = 3.0, 1e-9 * fit[:, 9]  # no spread, and no more than rounding
    found = standardise(fit, 0.1).squared_distance(new)
    kept = [column for column in range(30) if column not in (4, 9)]
    mean, deviation = fit[:, kept].mean(0), fit[:, kept].std(0, correction=0)
    fitted = ShrunkCovariance(shrinkage=0.1).fit(((fit[:, kept] - mean) / deviation).numpy())
    np.testing.assert_allclose(
        found, fitted.mahalanobis(((new[:, kept] - mean) / deviation).numpy())
    )


def test_attribution_mahalanobis_is_the_distance_of_attributions(plain):
    fit = plain.trusted["fit"]
    means = fit_ablation(AblationConfig("mean"), plain.engine, fit)
    fitted = standardise(attributions(plain.engine, means, fit).double(), 0.1)
    expected = fitted.squared_distance(attributions(plain.engine, means, NEW).double())
    torch.testing.assert_close(attribution_mahalanobis(plain)(NEW), expected.float())


# ---- the fine-tuned copy
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_an_untrained_copy_is_the_model(name, tmp_path):
    tiny.HUGGINGFACE[name]().to(torch.float64).save_pretrained(tmp_path)
    own = subject(load_model(ModelConfig(path=str(tmp_path), dtype="float64")))
    assert fine_tuned_kl(own, FineTuning(steps=0))(NEW).abs().max() < 1e-9


def test_fine_tuned_kl_against_the_formula_and_again(saved):
    config = FineTuning(steps=4, batch=16, learning_rate=1e-2)
    state = torch.get_rng_state()
    score = fine_tuned_kl(saved, config)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state is left as it was"
    torch.manual_seed(17)
    again, tuned = fine_tuned_kl(saved, config), fine_tune(saved, config)
    torch.set_rng_state(state)
    assert torch.equal(score(NEW), again(NEW))
    assert not torch.equal(score(NEW), fine_tuned_kl(replace(saved, seed=4), config)(NEW))
    for row, found in enumerate(score(NEW).tolist()):
        one, parts = NEW.select([row]), []
        model = saved.engine.logits(one.clean)[0].log_softmax(-1)
        copy = tuned(one.clean).logits[0].log_softmax(-1)
        for position in one.positions[0].tolist():
            parts.append(float((model[position].exp() * (model[position] - copy[position])).sum()))
        assert found == pytest.approx(sum(parts) / len(parts), rel=1e-5) and found > 1e-4


def test_the_copy_learns_the_models_own_first_choice(saved):
    fit = saved.trusted["fit"]
    rows, positions = (fit.positions >= 0).nonzero(as_tuple=True)
    at = rows, fit.positions[rows, positions]
    choice = saved.engine.logits(fit.clean, fit.key_mask)[at].argmax(-1)

    def loss(steps: int) -> float:
        copy = fine_tune(saved, FineTuning(steps=steps, learning_rate=1e-2))
        logits = copy(fit.clean).logits[at]
        return float(torch.nn.functional.cross_entropy(logits, choice))

    assert loss(20) < 0.5 * loss(0)


def test_a_model_that_is_in_no_folder_is_refused(plain):
    with pytest.raises(ValueError, match="memory.*no HuggingFace folder"):
        fine_tuned_kl(plain)
    with pytest.raises(ValueError, match="leave fine_tuned_kl out"):
        fine_tuned_kl(subject(tiny.native()))


# ---- all of them
# --------------------------------------------------------------------------------------


def test_all_are_finite_float32_and_equal_alone_and_shared(saved):
    names = [name for name in BASELINES if name != "fine_tuned_kl"]
    scores = fit_baselines(saved, names) | {
        "fine_tuned_kl": fine_tuned_kl(saved, FineTuning(steps=1))
    }
    assert set(scores) == set(BASELINES)
    for name, score in scores.items():
        values = score(NEW)
        assert values.shape == (9,) and values.dtype == torch.float32 and values.isfinite().all(), (
            name
        )
        alone = torch.cat([score(NEW.select([row])) for row in range(9)])
        torch.testing.assert_close(values, alone, msg=name)
        if name in names:
            assert torch.equal(BASELINES[name](saved)(NEW), values), name
    assert scores["length"](NEW).tolist() == NEW.lengths.tolist()
    assert scores["max_probability"](NEW).min() > 0


def test_refusals(plain):
    with pytest.raises(ValueError, match="baseline='nothing'.*max_probability"):
        fit_baselines(plain, ["nothing"])
    one = subject(plain.model, plain.trusted["fit"].select([0]))
    with pytest.raises(ValueError, match="fit=1 prompts.*at least 2"):
        layer_baselines(one)
