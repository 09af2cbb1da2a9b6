"""Distances of residual streams against HuggingFace's hidden states and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import ShrunkCovariance

from circuits.engine import Engine
from circuits.prompts import Prompts, prompts_from_records
from mad.detector import Context
from mad.detectors.mahalanobis import (
    Mahalanobis,
    fit_mahalanobis,
    residual_stream,
    restore_mahalanobis,
)
from tests import tiny

NEW = tiny.prompts(9, seed=1)  # of different lengths, 1 to 3 scored positions


@pytest.fixture(scope="module")
def plain() -> Context:
    return Context(Engine(tiny.gpt2()))


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "gemma2"])
def test_residual_streams_are_the_hidden_states_of_huggingface(name):
    engine = Engine(tiny.huggingface(name))
    ours = residual_stream(engine, NEW)
    module = tiny.HUGGINGFACE[name]().to(torch.float64)
    with torch.no_grad():
        theirs = module(NEW.clean, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 3
    for layer, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        if layer == 2:  # HuggingFace's last one is normed
            x = engine.architecture.final_norm(x)
        # HuggingFace's RMS norms compute in float32
        torch.testing.assert_close(x[NEW.key_mask], y[NEW.key_mask], rtol=1e-5, atol=1e-5)


def stream_of(engine: Engine, prompts: Prompts, tokens: str) -> list[np.ndarray]:
    """Each prompt's rows [L, tokens, D], prompt by prompt."""
    found = []
    for row in range(len(prompts)):
        one = prompts.select([row])
        at = one.positions[0].tolist() if tokens == "scored" else range(int(one.lengths))
        found.append(residual_stream(engine, one)[:, 0, list(at)].double().numpy())
    return found


@pytest.mark.parametrize("over_tokens", ["mean", "largest"])
@pytest.mark.parametrize("tokens", ["scored", "all"])
def test_mahalanobis_against_the_formula(plain, tokens, over_tokens):
    reduce = np.mean if over_tokens == "mean" else np.max
    trusted = tiny.prompts(40)
    fit, new = (stream_of(plain.engine, prompts, tokens) for prompts in (trusted, NEW))

    def scores(layers: str) -> torch.Tensor:
        config = Mahalanobis(layers=layers, tokens=tokens, over_tokens=over_tokens)
        return fit_mahalanobis(config, plain, trusted).score(NEW)

    ratios = np.empty((len(NEW), 3))
    for layer in range(3):
        fitted = ShrunkCovariance(shrinkage=1e-3).fit(np.concatenate([rows[layer] for rows in fit]))
        usual, own = (
            np.array([reduce(fitted.mahalanobis(rows[layer])) for rows in prompts])
            for prompts in (fit, new)
        )
        ratios[:, layer] = own / usual.mean()
        np.testing.assert_allclose(scores(str(layer)), own, rtol=1e-5)
    np.testing.assert_allclose(scores("last"), own, rtol=1e-5)
    np.testing.assert_allclose(scores("mean"), ratios.mean(1), rtol=1e-5)
    np.testing.assert_allclose(scores("max"), ratios.max(1), rtol=1e-5)


def test_the_default_is_the_largest_distance_of_the_bridges_last_residual(plain):
    def residuals(some: Prompts) -> list[torch.Tensor]:
        found = []
        for row in range(len(some)):
            one = some.select([row])
            _, cache = plain.engine.model.bridge.run_with_cache(one.clean)
            found.append(cache["blocks.1.hook_out"][0, one.positions[0]])
        return found

    trusted = tiny.prompts(40)
    fitted = ShrunkCovariance(shrinkage=1e-3).fit(torch.cat(residuals(trusted)).numpy())
    expected = [max(fitted.mahalanobis(rows.numpy())) for rows in residuals(NEW)]
    score = fit_mahalanobis(Mahalanobis(), plain, trusted).score(NEW)
    np.testing.assert_allclose(score, expected, rtol=1e-5)


def test_a_detector_of_version_0_1_scores_the_same(plain):
    trusted = tiny.prompts(40)
    rows = plain.engine.residual(trusted)[trusted.positions >= 0].double()
    fitted = ShrunkCovariance(shrinkage=1e-3).fit(rows.numpy())
    state = {"mean": fitted.location_, "precision": fitted.get_precision()}
    tensors = {name: torch.from_numpy(values) for name, values in state.items()}
    again = restore_mahalanobis(Mahalanobis(), plain, tensors)
    expected = fit_mahalanobis(Mahalanobis(), plain, trusted).score(NEW)
    torch.testing.assert_close(again.score(NEW), expected)


def test_a_layer_without_spread_takes_no_part():
    def same_last_token(count: int, seed: int) -> Prompts:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(29, (count, 6), generator=generator)
        tokens[:, -1] = 7
        return prompts_from_records(
            [{"clean": row, "positions": [-1]} for row in tokens.tolist()], vocabulary=29
        )

    context, trusted = Context(Engine(tiny.gpt2(torch.float32))), same_last_token(50, 0)
    new = same_last_token(5, 1)
    both = fit_mahalanobis(Mahalanobis(layers="mean"), context, trusted)
    zero, one, two = (
        fit_mahalanobis(Mahalanobis(layers=layer), context, trusted) for layer in "012"
    )
    assert (zero.score(new) == 0).all() and (one.score(new) > 0).all()
    shares = [own.score(new) / own.score(trusted).mean() for own in (one, two)]
    torch.testing.assert_close(both.score(new), sum(shares) / 3)
