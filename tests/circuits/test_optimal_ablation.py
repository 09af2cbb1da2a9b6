"""Trained constants: against a slow optimiser over the model's own hooks, against means, and back
from disk.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from circuits.ablation import AblationConfig, fit_ablation, optimal, restore_ablation
from circuits.ablation.optimal import Optimal, circuits_of_any_size
from circuits.discovery import METHODS, UGS
from circuits.discovery.masks import training
from circuits.discovery.masks.state import State
from circuits.discovery.masks.warm_start import first_parameters
from circuits.engine import Engine
from circuits.engine.memory import TooLittleMemory, footprint
from circuits.extraction import extract
from circuits.metrics import METRICS
from circuits.objective import prepare
from circuits.parts import UnitsConfig, divide
from circuits.prompts import InputError, Prompts
from circuits.selection import Selection
from tests import tiny

ENGINE = Engine(tiny.gpt2(n_embd=8, n_head=2))
GRAPH = ENGINE.graph
PROMPTS = tiny.prompts(8, seed=1, longest=6)
OTHERS = tiny.prompts(8, seed=2, longest=6)
BY_POSITION = Engine(ENGINE.model, n_positions=5)
TEMPLATED = tiny.prompts(8, seed=1, shortest=5, longest=5)


def fitted(steps: int = 2, engine: Engine = ENGINE, prompts: Prompts = PROMPTS, **more) -> Optimal:
    config = AblationConfig("optimal", steps=steps)
    ablation = fit_ablation(config, engine, prompts, **more)
    assert isinstance(ablation, Optimal)
    return ablation


def loss(ablation, mask: Tensor, engine: Engine = ENGINE, prompts: Prompts = PROMPTS) -> float:
    """Mean KL of the model from its run under a mask."""
    return -prepare(engine, prompts, METRICS["kl"], ablation).measure(mask).mean().item()


def served(mask: Tensor) -> Callable[[int, torch.Generator], Tensor]:
    """Draws one circuit again and again."""
    return lambda count, generator: mask.float().expand(count, *mask.shape)


def without(writer: str) -> Tensor:
    mask = GRAPH.exists.clone()
    mask[:, GRAPH.writer_index[writer]] = False
    return mask


# ---- the optimum ---------------------------------------------------------------------------------


def least(run: Callable[[Tensor], Tensor], rows: int) -> float:
    """The least mean KL over constants [rows, D], of logits that `run` gives for them: the best of
    some starts, by L-BFGS.
    """
    generator = torch.Generator().manual_seed(0)
    starts = 3 * torch.randn(2, rows, 8, dtype=torch.float64, generator=generator)
    return min(_least(run, start.requires_grad_()) for start in starts.unbind())


def _least(run: Callable[[Tensor], Tensor], constants: Tensor) -> float:
    reference = ENGINE.logits(PROMPTS).log_softmax(-1)
    optimiser = torch.optim.LBFGS([constants], max_iter=80, line_search_fn="strong_wolfe")

    def divergence() -> Tensor:
        values = (reference.exp() * (reference - run(constants).log_softmax(-1))).sum(-1)
        return PROMPTS.mean_over_scored(values).mean()

    def closure() -> Tensor:
        optimiser.zero_grad()
        now = divergence()
        now.backward()
        return now

    optimiser.step(closure)  # pyright: ignore[reportArgumentType]
    return divergence().item()


def one_residual_for_all(constants: Tensor) -> Tensor:
    """What the model says where nothing is kept: the same everywhere, by its norm and head."""
    bridge = ENGINE.model.bridge
    logits = bridge.unembed.original_component(bridge.ln_final.original_component(constants))
    return logits.expand(*PROMPTS.positions.shape, -1)


def an_mlp_that_is_constant(constants: Tensor) -> Tensor:
    """A plain run in which the first MLP writes constants, the first of them at position 0."""

    def replaced(value: Tensor, hook: object) -> Tensor:
        later = constants[1].expand(value.shape[1] - 1, -1)
        return torch.cat([constants[:1], later]).expand_as(value)

    hooks = [("blocks.0.mlp.hook_out", replaced)]
    logits = ENGINE.model.bridge.run_with_hooks(PROMPTS.clean, fwd_hooks=hooks)
    return logits[torch.arange(len(PROMPTS))[:, None], PROMPTS.positions]


@pytest.mark.parametrize(
    ("mask", "run", "rows"),
    [
        (torch.zeros_like(GRAPH.exists), one_residual_for_all, 1),
        pytest.param(without("m0"), an_mlp_that_is_constant, 2, marks=pytest.mark.slow),
    ],
    ids=["nothing is kept", "an MLP is removed"],
)
def test_constants_reach_the_loss_of_a_slow_optimiser(mask, run, rows):
    best = least(run, rows)
    assert best < 0.8 * loss(fit_ablation(AblationConfig("mean"), ENGINE, PROMPTS), mask)
    start = fitted()
    start.config.steps = 200
    own = start.trained(ENGINE, PROMPTS, draw=served(mask))
    assert loss(own, mask) <= 1.03 * best


def test_the_slow_optimiser_meets_the_bound_of_what_nothing_can_know():
    """KL from one distribution for all is least from their mean: the mutual information."""
    log_p = ENGINE.logits(PROMPTS).log_softmax(-1)
    real = PROMPTS.positions >= 0
    weights = real / real.sum(1, keepdim=True) / len(PROMPTS)
    mean = (weights[..., None] * log_p.exp()).sum((0, 1))
    bound = (weights[..., None] * log_p.exp() * (log_p - mean.log())).sum().item()
    assert 0 < bound <= least(one_residual_for_all, 1) <= 1.2 * bound


# ---- beside means --------------------------------------------------------------------------------


def drawn_loss(ablation, engine: Engine, prompts: Prompts, seed: int) -> float:
    """Mean KL with a circuit for each prompt, one run at a time."""
    draw = circuits_of_any_size(engine.graph)
    masks = draw(len(prompts), torch.Generator().manual_seed(seed))
    rows = [prompts.select([row]) for row in range(len(prompts))]
    own = [loss(ablation, m, engine, p) for m, p in zip(masks, rows, strict=True)]
    return sum(own) / len(own)


@pytest.mark.parametrize(
    ("engine", "prompts", "mean"),
    [(ENGINE, PROMPTS, "mean"), (BY_POSITION, TEMPLATED, "positional_mean")],
    ids=["pooled", "by position"],
)
def test_constants_are_better_than_the_means_they_start_from(engine, prompts, mean):
    before, after = (
        drawn_loss(ablation, engine, prompts, seed=1)
        for ablation in (
            fit_ablation(AblationConfig(mean), engine, prompts),
            fitted(40, engine, prompts),
        )
    )
    assert after < 0.9 * before


def test_a_training_that_makes_it_worse_changes_nothing(monkeypatch, caplog):
    monkeypatch.setattr(optimal, "RATE", 1e4)
    kept = fitted()
    mean = fit_ablation(AblationConfig("mean"), ENGINE, PROMPTS)
    torch.testing.assert_close(kept.writers(ENGINE, PROMPTS), mean.writers(ENGINE, PROMPTS))
    assert "so that they stay as they were; raise ablation.steps" in caplog.text


def test_constants_that_know_the_circuit_serve_it_better_and_the_others_as_well():
    generator = torch.Generator().manual_seed(0)
    kept = (torch.rand(GRAPH.exists.shape, generator=generator) < 0.5) & GRAPH.exists
    before = fitted(40)
    after = before.refined(ENGINE, PROMPTS, kept)
    assert loss(after, kept) < 0.95 * loss(before, kept)
    alone = before.trained(ENGINE, PROMPTS, draw=served(kept))
    assert drawn_loss(after, ENGINE, PROMPTS, 1) < drawn_loss(alone, ENGINE, PROMPTS, 1)


def test_units_have_constants_of_their_own():
    divided = divide(ENGINE, UnitsConfig("neurons", nodes=True))
    from circuits.parts.objective import prepare_units

    empty, lost = torch.zeros(divided.units.shape), {}
    for name in ("mean", "optimal"):
        ablation = fit_ablation(AblationConfig(name, steps=40), ENGINE, PROMPTS, source=divided)
        objective = prepare_units(divided, PROMPTS, METRICS["kl"], ablation)
        lost[name] = -objective.measure(empty).mean().item()
    assert lost["optimal"] < 0.9 * lost["mean"]


def test_drawn_circuits_are_of_every_size_by_edge_and_by_writer_and_some_empty():
    draw = circuits_of_any_size(GRAPH)
    masks = draw(400, torch.Generator().manual_seed(0))
    assert not masks[:, ~GRAPH.exists].any() and not masks[7::8].any()
    shares = masks.sum((1, 2)) / GRAPH.n_edges
    assert shares.min() == 0 and shares.max() > 0.9 and 0.35 < shares.mean() < 0.5
    by_writer = [(~GRAPH.exists | (row == row.amax(0))).all() for row in masks]
    assert all(by_writer[1::2]) and not all(by_writer[0::2])


# ---- trained along with a mask -------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["kl", "logit_diff"])
def test_a_mask_s_training_moves_constants_down_the_gradient_of_kl(metric):
    ours = prepare(ENGINE, PROMPTS, METRICS[metric], fitted())
    config = UGS(steps=4)
    if not ours.full().mean() > ours.empty().mean():
        pytest.fail("choose prompts on which the model is better than nothing")
    trainer = training.trainer_of(config, ours, "edges", "window")
    gates = first_parameters(config, ours, "edges")
    state = State.new(gates, config.rate, training.BETAS, trainer.optimal)
    assert state.constants is not None
    training._backward(trainer, state.gates, 0, state.constants)
    gradient = state.constants.moved.grad
    assert gradient is not None and gradient.abs().max() > 0

    drawn = []

    def under(moved: Tensor) -> float:
        state.constants.moved.data.copy_(moved)
        logits = training._under(trainer, state.gates, uniform, own, state.constants)
        return METRICS["kl"](logits, own.prompts, own.logits).mean().item()

    rows = training.rows_of(0, trainer.batch, len(PROMPTS), config.seed)
    own = training.minibatch(ours.batches, rows)
    generator = torch.Generator().manual_seed(
        training._seed(config.seed, training.GATES_OF_A_STEP, 0)
    )
    uniform = {
        name: torch.rand((len(rows), *theta.shape), generator=generator)
        for name, theta in state.gates.items()
    }
    for place in gradient.abs().flatten().argsort(descending=True)[[0, 3, 20]].tolist():
        ends = []
        for sign in (1, -1):
            moved = torch.zeros_like(gradient)
            moved.view(-1)[place] = sign * 1e-6
            ends.append(under(moved))
        drawn.append((ends[0] - ends[1]) / 2e-6)
        assert gradient.view(-1)[place].item() == pytest.approx(drawn[-1], rel=1e-3, abs=1e-7)


def test_constants_of_a_mask_go_on_bit_for_bit_where_training_stopped(tmp_path, monkeypatch):
    ours = prepare(ENGINE, PROMPTS, METRICS["kl"], fitted())
    settings = {"steps": 12, "batch": 5, "initial": 0.5}
    expected = METHODS["ugs"].run(UGS(**settings), ours)
    settings |= {"checkpoint": str(tmp_path / "mask.safetensors"), "checkpoint_every": 5}
    real = training._step

    def stopping(trainer, state, penalty):
        if state.step == 7:
            raise KeyboardInterrupt
        return real(trainer, state, penalty)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            METHODS["ugs"].run(UGS(**settings), ours)
    found = METHODS["ugs"].run(UGS(**settings), ours)
    assert isinstance(found.ablation, Optimal) and isinstance(expected.ablation, Optimal)
    assert torch.equal(found.ablation.constants, expected.ablation.constants)
    assert not torch.equal(found.ablation.constants, ours.batches.ablation.constants)
    assert torch.equal(found.scores, expected.scores)


def test_a_circuit_is_measured_with_the_constants_that_were_trained_with_it():
    config = AblationConfig("optimal", steps=10)
    found = extract(
        ENGINE,
        PROMPTS,
        OTHERS,
        UGS(steps=30),
        ablation=config,
        selection=Selection(edges=20),
        random_draws=0,
        accept_worse=True,
    )
    own = loss(found.ablation, found.circuit.mask, prompts=OTHERS)
    kl = found.metrics["by_metric"]["kl"]["circuit"]
    assert own == pytest.approx(kl, rel=1e-6)
    assert own != pytest.approx(loss(fitted(10), found.circuit.mask, prompts=OTHERS), rel=1e-3)


# ---- memory, seeds, disk, refusals ---------------------------------------------------------------


def test_constants_depend_on_the_seed_and_not_on_the_budget():
    size = footprint(ENGINE, PROMPTS)
    start = fitted()
    tight = 3 * size.explanation + start.training_bytes + 3 * size.shared(False)
    parts = fitted(3, memory=str(tight)).constants
    torch.testing.assert_close(parts, fitted(3).constants, atol=1e-9, rtol=1e-9)
    other = fit_ablation(AblationConfig("optimal", seed=1, steps=3), ENGINE, PROMPTS)
    assert isinstance(other, Optimal) and not torch.allclose(other.constants, parts)
    with pytest.raises(TooLittleMemory, match="raise memory"):
        start.trained(ENGINE, PROMPTS, memory=str(size.explanation))


@pytest.mark.parametrize(("engine", "prompts"), [(ENGINE, PROMPTS), (BY_POSITION, TEMPLATED)])
def test_constants_come_back_from_their_state(engine, prompts):
    saved = fitted(2, engine, prompts)
    again = restore_ablation("optimal", engine, saved.state())
    assert torch.equal(again.writers(engine, prompts), saved.writers(engine, prompts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"constants": torch.zeros(3, 2, 8)}, "but the model has 7 writers of 8 numbers"),
        ({"constants": torch.full((7, 2, 8), torch.nan)}, "must be finite numbers of each writer"),
        ({"scale": torch.ones(7, 8)}, "must be finite numbers of each writer"),
        ({"by_position": torch.tensor(True)}, "but the model has 7 writers"),
    ],
)
def test_constants_of_another_model_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        restore_ablation("optimal", ENGINE, {**fitted().state(), **change})


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="ablation.steps=0, but it must be at least 1"):
        fitted(0)


def test_prompts_that_no_constants_were_trained_for_are_refused():
    short = fitted(1, prompts=tiny.prompts(4, shortest=3, longest=3).cut(1))
    assert not short.able(PROMPTS).any()
    with pytest.raises(InputError, match="but constants were trained for 1; use longer reference"):
        short.writers(ENGINE, PROMPTS)
