"""What every registered detector has to do, on a tiny model."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from circuits.circuit import Circuit
from circuits.engine.memory import TooLittleMemory
from mad.calibration import fit
from mad.detector import Context, Detector, DetectorKind, ExplainingDetector
from mad.detectors import (
    DETECTORS,
    AttributionMahalanobis,
    Deviation,
    Effects,
    Fast,
    FineTuned,
    Mahalanobis,
    MaxProbability,
    Nodes,
    Routing,
    Strict,
    TokenCount,
)
from mad.saved_detector import load_detector, save_detector
from tests.mad.detectors.conftest import prompts_of

CONFIGS = {
    "fast": Fast(hosts=2),
    "strict": Strict(hosts=3, circuits=1),
    "deviation": Deviation(),
    "deviation by logits": Deviation(deviation="logit_diff", ablation="positional_mean"),
    "deviation from zero": Deviation(ablation="zero"),
    "nodes": Nodes(),
    "nodes, largest": Nodes(summary="max", ablation="zero"),
    "routing": Routing(),
    "effects": Effects(steps=2),
    "effects, largest": Effects(summary="max", steps=2),
    "effects, tails": Effects(summary="tails", steps=2),
    "mahalanobis": Mahalanobis(),
    "mahalanobis over layers": Mahalanobis(layers="mean", tokens="all", over_tokens="mean"),
    "mahalanobis, largest layer": Mahalanobis(layers="max", tokens="all"),
    "mahalanobis after a block": Mahalanobis(layers="1"),
    "attribution_mahalanobis": AttributionMahalanobis(),
    "fine_tuned_kl": FineTuned(steps=2, batch=8),
    "max_probability": MaxProbability(),
    "token_count": TokenCount(),
}


def kind_of(config: Any) -> DetectorKind:
    return DETECTORS[config.name]


@pytest.fixture(scope="module")
def fitted(contexts) -> dict[str, Detector]:
    """All of them, where edges have no position."""
    context = contexts["edges"]
    trusted = prompts_of(context.engine, 24, 0)
    return {name: kind_of(config).fit(config, context, trusted) for name, config in CONFIGS.items()}


def test_all_are_registered_under_their_own_name_and_have_a_preset():
    assert {config.name for config in CONFIGS.values()} == set(DETECTORS)
    presets = Path(__file__).parents[3] / "configs" / "detector"
    for name, kind in DETECTORS.items():
        assert kind.schema().name == name
        kind.schema().check()
        first = (presets / f"{name}.yaml").read_text().splitlines()[0]
        assert first == f"# {kind.schema.__module__}.{kind.schema.__name__}"
        for function in (kind.fit, kind.restore):
            assert inspect.signature(function).parameters["memory"].default == "2GB"


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_finite_float32_on_the_cpu_and_the_same_again(context, draw, name):
    config, trusted, new = CONFIGS[name], draw(24, 0), draw(5, 1)
    detector = kind_of(config).fit(config, context, trusted)
    assert isinstance(detector, Detector)
    score = detector.score(new)
    assert score.shape == (5,) and score.dtype == torch.float32 and score.device.type == "cpu"
    assert score.isfinite().all()
    assert torch.equal(score, kind_of(config).fit(config, context, trusted).score(new))


@pytest.mark.parametrize("name", CONFIGS)
def test_it_says_which_circuit_it_scores_under_what(fitted, contexts, name):
    detector = fitted[name]
    if detector.circuit is None:
        assert detector.scores_under is None
        return
    assert detector.circuit is contexts["edges"].circuit
    own = vars(detector.config).get("ablation") or "mean"
    assert detector.scores_under == ("resample" if "hosts" in vars(detector.config) else own)


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_do_not_depend_on_the_prompts_beside(fitted, contexts, name):
    new = prompts_of(contexts["edges"].engine, 5, 1)
    several = new.select([row for row in range(5) for _ in range(14)])  # more than one batch
    once = fitted[name].score(new).repeat_interleave(14)
    torch.testing.assert_close(fitted[name].score(several), once, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_detector_scores_and_explains_the_same(context, draw, name, tmp_path):
    config, new = CONFIGS[name], draw(6, 1)
    calibrated = fit(config, context, draw(20, 0), draw(9, 2), used={})
    save_detector(calibrated, tmp_path / "one", weight_hash="abc")
    again = load_detector(tmp_path / "one", context, weight_hash="abc")
    assert again.detector.config == config
    assert torch.equal(calibrated.score(new), again.score(new))
    assert torch.equal(calibrated.p_values(new), again.p_values(new))
    assert torch.equal(
        again.p_values(new), again.calibration.p_values(calibrated.detector.score(new))
    )
    one, other = calibrated.detector, again.detector
    assert isinstance(one, ExplainingDetector) == isinstance(other, ExplainingDetector)
    assert isinstance(one, ExplainingDetector) == (config.name in ("fast", "strict", "deviation"))
    assert {path.suffix for path in (tmp_path / "one").iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "token_count"])
def test_memory_for_nothing_is_refused(fitted, contexts, name):
    new, config = prompts_of(contexts["edges"].engine, 3, 1), CONFIGS[name]
    with pytest.raises(TooLittleMemory, match="one prompt of .* tokens"):
        fitted[name].score(new, memory="1kB")
    if config.name in ("max_probability",):  # nothing is fitted
        return
    with pytest.raises(TooLittleMemory):
        kind_of(config).fit(config, contexts["edges"], new, memory="1kB").score(new, memory="1kB")


@pytest.mark.parametrize("name", CONFIGS)
def test_circuits_that_say_nothing_are_no_ground_to_score_on(fitted, contexts, name):
    engine, config, detector = contexts["edges"].engine, CONFIGS[name], fitted[name]
    graph, exists = engine.graph, engine.graph.exists
    from_input = torch.zeros_like(exists)
    from_input[graph.readers.index("a0.h0<q>"), graph.writers.index("input")] = True
    to_logits = torch.zeros_like(exists)
    to_logits[graph.readers.index("logits"), graph.writers.index("m0")] = True
    remedies = {"0": "more", "1": "more", str(graph.n_edges): "fewer"}
    for kept in (torch.zeros_like(exists), from_input, to_logits, exists):
        context = Context(engine, Circuit(graph, kept, kept.float()))
        fitting = partial(kind_of(config).fit, config, context, prompts_of(engine, 12, 0))
        restoring = partial(kind_of(config).restore, config, context, detector.state())
        for work in (fitting, restoring):
            if detector.circuit is None:
                work()
                continue
            count = str(int(kept.sum()))
            message = f"the circuit keeps {count} of .* with {remedies[count]} edges .*selection"
            with pytest.raises(ValueError, match=message):
                work()


@pytest.mark.parametrize(
    "config",
    [Fast(), Deviation(), Nodes(), Routing(), Effects()],
    ids=lambda config: config.name,
)
def test_no_circuit_is_refused(contexts, config):
    engine = contexts["edges"].engine
    with pytest.raises(ValueError, match=f"detector {config.name} .*run `madcap extract` first"):
        kind_of(config).fit(config, Context(engine), prompts_of(engine, 5, 0))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Deviation(deviation="l2"), "deviation='l2'"),
        (Deviation(ablation="counterfactual"), "no corrupt twin"),
        (Deviation(explain_steps=0), "explain_steps=0"),
        (Deviation(circuits=0), "circuits=0"),
        (Nodes(summary="mean"), "summary='mean', but the choices are distance, max"),
        (Nodes(ablation="resample"), "no corrupt twin"),
        (Routing(shrinkage=1.5), "shrinkage=1.5"),
        (Effects(summary="min"), "mass, max, tails"),
        (Effects(steps=0), "steps=0"),
        (Mahalanobis(layers="first"), "layers='first'"),
        (Mahalanobis(layers="3"), "layers=3, but the model has 2 blocks"),
        (Mahalanobis(tokens="last"), "tokens='last', but the choices are scored, all"),
        (Mahalanobis(over_tokens="min"), "over_tokens='min'"),
        (Mahalanobis(shrinkage=-0.1), "shrinkage=-0.1"),
        (AttributionMahalanobis(ablation="resample"), "no corrupt twin"),
        (FineTuned(batch=0), "batch=0"),
        (FineTuned(learning_rate=-1.0), "learning_rate=-1.0"),
    ],
    ids=str,
)
def test_settings_that_cannot_score_are_refused(contexts, config, message):
    context = contexts["edges"]
    trusted = prompts_of(context.engine, 5, 0)
    with pytest.raises(ValueError, match=message):
        kind_of(config).fit(config, context, trusted)


def test_one_trusted_prompt_has_no_spread(contexts):
    one = prompts_of(contexts["edges"].engine, 1, 3)
    one = replace(one, positions=one.positions[:, :1])
    for config in (Nodes(), Routing(), Mahalanobis(), AttributionMahalanobis()):
        with pytest.raises(ValueError, match="1 trusted rows, but a spread needs at least 2"):
            kind_of(config).fit(config, contexts["edges"], one)
