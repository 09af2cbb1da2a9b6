"""Learned masks: gradients against finite differences, training that goes on where it stopped,
sizes on the way, and what is refused.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from abstraction.ground_truth.scoreboard import put_to_the_test
from circuits.ablation import AblationConfig, fit_ablation
from circuits.circuit import Circuit
from circuits.discovery import METHODS, UGS, EdgePruning, Found, SubnetworkProbing, eap_ig
from circuits.discovery.attribution import EAPIG
from circuits.discovery.masks import training
from circuits.discovery.masks.penalty import Fixed, Steered
from circuits.discovery.masks.settings import MaskTraining
from circuits.discovery.masks.snapshots import Snapshot, ladder, most_probable, nested_scores
from circuits.discovery.masks.warm_start import first_parameters
from circuits.engine import Engine
from circuits.engine.memory import TooLittleMemory
from circuits.extraction import extract, rediscover
from circuits.files import read_tensors, write_tensors
from circuits.gates import OVER, gate_shapes, part_shares
from circuits.mask_distribution import KINDS, MaskDistribution
from circuits.metrics import METRICS
from circuits.objective import Objective, prepare
from circuits.prompts import Prompts, prompts_from_records
from circuits.selection import Selection, ranking
from tests import tiny

ENGINE = Engine(tiny.gpt2(n_embd=8, n_head=2))
GRAPH = ENGINE.graph
PROMPTS = tiny.prompts(12, seed=1, longest=7)
OTHERS = tiny.prompts(12, seed=2, longest=7)
LEARNED = {
    name: method for name, method in METHODS.items() if issubclass(method.schema, MaskTraining)
}
FAMILIES = {
    "gpt2": ENGINE,
    "grouped queries": Engine(tiny.native(n_heads=4, n_key_value_heads=2, d_head=3)),
    "gemma2": Engine(tiny.huggingface("gemma2")),
    "attention only": Engine(tiny.native(attn_only=True, n_heads=2)),
}


def objective(
    engine: Engine = ENGINE,
    metric: str = "kl",
    ablation: str = "counterfactual",
    prompts: Prompts = PROMPTS,
    memory: str = "2GB",
) -> Objective:
    fitted = fit_ablation(AblationConfig(ablation), engine, PROMPTS)
    return prepare(engine, prompts, METRICS[metric], fitted, memory=memory)


def learn(name: str, ours: Objective | None = None, **settings) -> Found:
    config = LEARNED[name].schema(**{"steps": 12, **settings})
    return LEARNED[name].run(config, ours or objective())


# ---- the gradient --------------------------------------------------------------------------------


def loss_of(trainer, gates, step=3) -> tuple[float, dict[str, torch.Tensor]]:
    """What `_backward` says of a step, and the gradient that it leaves."""
    own = {name: theta.detach().clone().requires_grad_() for name, theta in gates.items()}
    lost = training._backward(trainer, own, step)
    return lost, {name: theta.grad for name, theta in own.items()}


@pytest.mark.parametrize("each", [0, 1, 3])
@pytest.mark.parametrize(
    ("over", "metric"), [("edges", "kl"), ("nodes", "logit_diff"), ("edges_and_nodes", "kl")]
)
def test_the_gradient_of_a_mask_is_the_finite_difference(over, metric, each):
    config = SubnetworkProbing(masks_per_prompt=each, batch=6)
    ours = objective(metric=metric)
    ours = replace(ours, metric=replace(ours.metric))
    if not ours.full().mean() > ours.empty().mean():
        ours = replace(ours, metric=replace(ours.metric, higher_is_better=False))
    trainer = training.trainer_of(config, ours, over, "hard_concrete")
    generator = torch.Generator().manual_seed(2)
    gates = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in gate_shapes(GRAPH, over).items()
    }
    _, gradients = loss_of(trainer, gates)
    step, checked = 1e-5, 0
    for name in gates:
        order = gradients[name].abs().flatten().argsort(descending=True)
        for place in [*order[:6].tolist(), *order[6:40:9].tolist()]:
            ends = []
            for sign in (1, -1):
                moved = {other: own.clone() for other, own in gates.items()}
                moved[name].view(-1)[place] += sign * step
                ends.append(loss_of(trainer, moved)[0])
            expected = (ends[0] - ends[1]) / (2 * step)
            got = gradients[name].view(-1)[place].item()
            assert got == pytest.approx(expected, rel=1e-3, abs=1e-7)
            checked += abs(expected) > 1e-5
    assert checked > 5


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_dropping_what_closed_gates_leave_changes_no_gradient(name, kind, each, monkeypatch):
    """A gate that is clamped to 0 has no gradient, so that what only it would reach is not run."""
    engine = FAMILIES[name]
    ours, graph = objective(engine), engine.graph
    (batch,) = ours.batches
    generator = torch.Generator().manual_seed(4)
    lead = (len(PROMPTS),) if each else ()
    uniform = 0.3 + 0.4 * torch.rand((*lead, *graph.exists.shape), generator=generator)
    theta = 0.3 * torch.randn(graph.exists.shape, generator=generator)
    theta[:, graph.n_inputs + 1 :: 2] = -50.0  # nothing reads every other node

    def run(closed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        own = theta.clone().requires_grad_()
        mask = part_shares({"edge": KINDS[kind](own, uniform)}, graph)
        logits = engine.masked(batch.prompts, mask, batch.ablated, per_example=each, closed=closed)
        loss = ours.metric(logits, batch.prompts, batch.clean.logits).sum()
        return logits.detach(), torch.autograd.grad(loss, own)[0]

    sizes = []
    real = torch.bmm

    def counting(first, second, **named):
        sizes.append(first.numel() * second.shape[-1])
        return real(first, second, **named)

    monkeypatch.setattr(torch, "bmm", counting)
    (full, expected), whole = run(False), sum(sizes)
    sizes.clear()
    (logits, gradient), less = run(True), sum(sizes)
    torch.testing.assert_close(logits, full, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)
    assert gradient.any() and less < 0.8 * whole


def test_a_mask_that_is_closed_altogether_has_no_gradient_and_the_ablated_logits():
    (batch,) = objective().batches
    theta = torch.full(GRAPH.exists.shape, -50.0, requires_grad=True)
    mask = part_shares({"edge": KINDS["hard_concrete"](theta, torch.full_like(theta, 0.5))}, GRAPH)
    logits = ENGINE.masked(batch.prompts, mask, batch.ablated, closed=True)
    expected = ENGINE.masked(batch.prompts, torch.zeros(GRAPH.exists.shape), batch.ablated)
    torch.testing.assert_close(logits, expected)
    assert not torch.autograd.grad(logits.sum(), theta)[0].any()


@pytest.mark.parametrize("each", [0, 1, 2])
def test_a_step_in_parts_is_the_step_as_a_whole(each):
    config = UGS(batch=10, masks_per_prompt=each)
    whole = training.trainer_of(config, objective(), "edges", "window")
    gates = first_parameters(config, whole.objective, "edges")
    lost, gradient = loss_of(whole, gates)
    for parts in (1, 3):
        in_parts, other = loss_of(replace(whole, parts=parts), gates)
        assert in_parts == pytest.approx(lost, rel=1e-5)
        torch.testing.assert_close(other["edge"], gradient["edge"], atol=1e-6, rtol=1e-4)


def test_a_budget_decides_how_many_prompts_are_run_at_once():
    size = objective().batches.footprint
    least = 2 * (size.training(True) + size.shared(True) + size.parameters)
    for prompts in (1, 4):
        ours = objective(memory=str(least + 2 * (prompts - 1) * size.training(True)))
        assert training.trainer_of(UGS(), ours, "edges", "window").parts == prompts
    tight = replace(objective().batches, work=least // 2 - 1)
    with pytest.raises(
        TooLittleMemory, match="to train a mask on one prompt takes up to .*; raise"
    ):
        training.trainer_of(UGS(), replace(objective(), batches=tight), "edges", "window")


def test_each_pass_over_the_prompts_is_shuffled_and_leaves_none_out():
    steps = [training.rows_of(step, 3, 12, seed=0).tolist() for step in range(12)]
    passes = [sorted(sum(steps[start : start + 4], [])) for start in (0, 4, 8)]
    assert passes == [list(range(12))] * 3 and len({str(step) for step in steps}) == 12
    assert steps == [training.rows_of(step, 3, 12, seed=0).tolist() for step in range(12)]
    assert steps != [training.rows_of(step, 3, 12, seed=1).tolist() for step in range(12)]


# ---- the penalty ---------------------------------------------------------------------------------


def test_the_expected_share_counts_the_edges_of_drawn_circuits():
    config = EdgePruning()
    trainer = training.trainer_of(config, objective(), "edges_and_nodes", "hard_concrete")
    gates = first_parameters(replace(config, initial=0.3), objective(), "edges_and_nodes")
    expected = sum(
        torch.sigmoid(gates["edge"][edge]).item()
        * torch.sigmoid(gates["writer"][0, edge[1]]).item()
        for edge in GRAPH.edges()
    )
    assert trainer.share(gates).item() == pytest.approx(expected / GRAPH.n_edges, rel=1e-5)
    drawn = trainer.mask(gates)
    assert drawn.size() == pytest.approx(expected, rel=1e-5)


def test_a_steered_mask_aims_evenly_by_the_logarithm_and_then_stays():
    penalty = Steered(start=0.8, end=0.02, steps=60)
    targets = [penalty.target(step) for step in range(60)]
    falling = [math.log(b / a) for a, b in zip([0.8, *targets], targets[:50])]
    assert falling == pytest.approx([math.log(0.02 / 0.8) / 50] * 50)
    assert targets[49:] == pytest.approx([0.02] * 11)


def test_multipliers_go_up_the_gradient():
    penalty, multipliers = Steered(0.5, 0.1, 40), torch.zeros(2)
    share = torch.tensor(0.9, requires_grad=True)
    off = math.log(0.9) - math.log(penalty.target(0))
    value = penalty(share, multipliers, 0)
    assert multipliers.tolist() == pytest.approx([off, off**2])  # 40 / steps = 1
    assert value.item() == pytest.approx(off**2 + off**4)
    (slope,) = torch.autograd.grad(value, share)
    assert slope.item() == pytest.approx((off + 2 * off**2 * off) / 0.9, rel=1e-5)


def test_a_fixed_price_is_paid_for_the_share():
    assert Fixed(0.7)(torch.tensor(0.25), torch.zeros(2), 0).item() == pytest.approx(0.175)
    sizes = [
        learn("subnetwork_probing", penalty=p, steps=40).details["expected_edges"]
        for p in (0.3, 5.0)
    ]
    assert sizes[1] < 0.8 * sizes[0]


# ---- sizes on the way ----------------------------------------------------------------------------


def masks(count: int, graph=GRAPH) -> list[MaskDistribution]:
    generator = torch.Generator().manual_seed(5)
    return [
        MaskDistribution(
            graph, "window", "edges", {"edge": torch.randn(graph.exists.shape, generator=generator)}
        )
        for _ in range(count)
    ]


def test_an_edge_scores_by_the_smallest_circuit_that_it_is_part_of():
    snapshots = [Snapshot(size, mask) for size, mask in zip((40, 20, 9, 3), masks(4))]
    scores = nested_scores(GRAPH, snapshots)
    order = []
    for snapshot in snapshots[::-1]:
        chances = snapshot.mask.probabilities()
        kept = sorted(GRAPH.edges(), key=lambda edge: -chances[edge].item())[: snapshot.edges]
        order += [edge for edge in kept if edge not in order]
    assert 40 < len(order) < GRAPH.n_edges
    for place, edge in enumerate(order):
        assert scores[edge].item() == pytest.approx(1 - place / GRAPH.n_edges)
    assert sum(scores[edge].item() == 0 for edge in GRAPH.edges()) == GRAPH.n_edges - len(order)


def test_as_many_edges_are_kept_as_a_snapshot_has_and_ties_go_by_edge_order():
    even = MaskDistribution(GRAPH, "window", "edges", {"edge": torch.zeros(GRAPH.exists.shape)})
    kept = most_probable(even.probabilities(), GRAPH, 5)
    assert [tuple(edge) for edge in kept.nonzero().tolist()] == GRAPH.edges()[:5]


@pytest.mark.parametrize("name", LEARNED)
def test_training_passes_all_sizes_and_keeps_the_mask_of_each(name):
    found = learn(name, steps=60)
    curve = found.details["training"]
    assert [point["step"] for point in curve] == list(range(60)) and found.kept is None
    assert curve[-1]["edges"] < 0.3 * curve[0]["edges"]
    assert (
        found.scores.min() >= 0
        and found.scores.max() == 1
        and not found.scores[~GRAPH.exists].any()
    )
    for size in (30, 15, 8):
        trained = found.trained(size)
        assert trained.size() <= next(rung for rung in ladder(GRAPH)[::-1] if rung >= size) + 1e-3
        top = ranking(GRAPH, found.scores).circuit(size)
        assert 0 < top.sum() <= size


@pytest.mark.parametrize("settings", [{"edges": 9}, {"share": 9 / 46}])
@pytest.mark.parametrize("name", LEARNED)
def test_a_size_that_is_asked_for_is_kept(name, settings):
    found = learn(name, steps=150, **settings)
    assert found.trained(9).size() == pytest.approx(9, rel=0.06)
    chances = found.trained(9).probabilities()
    assert torch.equal(found.kept, GRAPH.without_dead_ends(most_probable(chances, GRAPH, 9)))
    assert 0 < found.kept.sum() <= 9


def test_a_mask_over_nodes_keeps_all_edges_of_a_writer_alike():
    found = learn("subnetwork_probing", over="nodes", steps=60)
    chances = found.trained(20).probabilities()
    for writer in range(len(GRAPH.writers)):
        own = chances[:, writer][GRAPH.exists[:, writer]]
        assert len(own.unique()) == 1
    assert len(chances.unique()) > 3


@pytest.mark.parametrize("over", OVER)
def test_masks_by_position_are_trained_on_templated_prompts_and_no_others(over):
    engine = Engine(ENGINE.model, n_positions=5)
    ours = objective(engine, ablation="mean", prompts=tiny.prompts(6, shortest=5, longest=5))
    found = training.train(EdgePruning(steps=30), ours, over, "hard_concrete")
    assert found.scores.shape == engine.graph.exists.shape and found.scores.any()
    with pytest.raises(
        ValueError, match="edges are told apart by position for prompts of exactly 5"
    ):
        learn("edge_pruning", objective(engine, ablation="mean"))


# ---- where it starts -----------------------------------------------------------------------------


def test_a_mask_starts_open_or_by_the_rank_of_scores(tmp_path):
    ours = objective()
    cold = first_parameters(UGS(initial=2.0, seed=4), ours, "edges")["edge"]
    assert (cold - 2.0).abs().max() < 0.06 and cold.std() > 0.005
    scores = eap_ig(EAPIG(), ours).scores.abs()
    Circuit(GRAPH, GRAPH.exists, scores).save(tmp_path)
    for source in ("eap_ig", str(tmp_path)):
        start = first_parameters(UGS(warm_start=source), ours, "edges_and_nodes")
        order = scores[GRAPH.exists].argsort(descending=True)
        edge = start["edge"][GRAPH.exists][order]
        for rank in (1, 5, 20, 46):
            expected = 1 / (1 + (rank / 4.6) ** 2)
            assert edge[rank - 1].sigmoid().item() == pytest.approx(expected, abs=0.02)
        assert (start["writer"] - UGS().initial).abs().max() < 0.06
    nodes = first_parameters(UGS(warm_start="eap_ig"), ours, "nodes")["writer"][0]
    assert nodes.argmax() == scores.amax(0).argmax()


@pytest.mark.parametrize("source", ["eap_gi", "ugs", "runs/nowhere"])
def test_a_start_from_nothing_known_is_refused(source):
    with pytest.raises(
        ValueError, match=f"warm_start='{source}' is no method that scores .acdc, eap"
    ):
        learn("ugs", warm_start=source)


def test_scores_of_another_graph_are_refused(tmp_path):
    other = FAMILIES["grouped queries"].graph
    Circuit(other, other.exists, other.exists.float()).save(tmp_path)
    with pytest.raises(
        ValueError, match="has scores of .* edges, of another model than this with 46 edges"
    ):
        learn("ugs", warm_start=str(tmp_path))


# ---- checkpoints ---------------------------------------------------------------------------------


def stop_at(step: int, monkeypatch) -> None:
    real = training._step

    def stopping(trainer, state, penalty):
        if state.step == step:
            raise KeyboardInterrupt
        return real(trainer, state, penalty)

    monkeypatch.setattr(training, "_step", stopping)


@pytest.mark.parametrize("name", LEARNED)
def test_training_goes_on_bit_for_bit_where_it_stopped(name, tmp_path, monkeypatch):
    settings = {"steps": 24, "batch": 5, "initial": 0.5}
    expected = learn(name, **settings)
    settings |= {"checkpoint": str(tmp_path / "mask.safetensors"), "checkpoint_every": 5}
    with monkeypatch.context() as patch:
        stop_at(13, patch)
        with pytest.raises(KeyboardInterrupt):
            learn(name, **settings)
    taken, real = [], training._step
    monkeypatch.setattr(training, "_step", lambda *rest: taken.append(rest[1].step) or real(*rest))
    found = learn(name, **settings)
    assert taken == list(range(10, 24))
    assert torch.equal(found.scores, expected.scores) and found.details == expected.details
    for size in (3, 10, 30):
        ours, theirs = (one.trained(size).gates for one in (found, expected))
        assert all(torch.equal(ours[kind], theirs[kind]) for kind in theirs)
    taken.clear()
    again = learn(name, **settings)
    assert not taken and torch.equal(again.scores, expected.scores)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"steps": 13},
        {"batch": 4},
        {"ours": objective(metric="kl", ablation="zero")},
        {"ours": objective(prompts=OTHERS)},
        {"ours": objective(ablation="mean")},
    ],
)
def test_the_checkpoint_of_another_training_is_refused(change, tmp_path):
    path = str(tmp_path / "mask.safetensors")
    learn("ugs", checkpoint=path)
    with pytest.raises(ValueError, match="is the checkpoint of another training: .* delete it"):
        learn("ugs", **{"ours": objective(), **change}, checkpoint=path)


def test_how_often_a_checkpoint_is_written_and_where_may_change(tmp_path):
    path = tmp_path / "mask.safetensors"
    learn("ugs", checkpoint=str(path))
    moved = path.rename(tmp_path / "moved.safetensors")
    learn("ugs", checkpoint=str(moved), checkpoint_every=3)


@pytest.mark.parametrize(
    "spoil",
    [
        {"theta.edge": torch.zeros(3)},
        {"mean.edge": None},
        {"curve": torch.zeros(2, 3)},
        {"theta.edge": torch.full((13, 7), math.nan)},
        {"multipliers": torch.zeros(5)},
    ],
)
def test_a_spoilt_checkpoint_is_refused(spoil, tmp_path):
    path = tmp_path / "mask.safetensors"
    learn("ugs", checkpoint=str(path))
    tensors = {**read_tensors(path), **spoil}
    write_tensors(path, {name: own for name, own in tensors.items() if own is not None})
    with pytest.raises(ValueError, match="is no checkpoint that can be read .*; delete it"):
        learn("ugs", checkpoint=str(path))


def test_a_checkpoint_that_could_not_be_written_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="but there is no folder .*nowhere; make it"):
        learn("ugs", checkpoint=str(tmp_path / "nowhere" / "mask.safetensors"))
    (tmp_path / "file").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ValueError, match="file cannot be read"):
        learn("ugs", checkpoint=str(tmp_path / "file"))


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNED)
def test_metrics_without_gradient_are_refused(name):
    with pytest.raises(ValueError, match=f"metric=accuracy has no gradient, so that {name} cannot"):
        learn(name, objective(metric="accuracy"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.0}, "method.share=0.0, but a share of the edges is above 0 and below 1"),
        ({"share": 1.2}, "method.share=1.2, but a share"),
        ({"share": math.nan}, "method.share=nan, but a share"),
        ({"down_to": 1.0}, "method.down_to=1.0, but a share"),
        ({"edges": 0}, "method.edges=0, but it must be 1 to 45: the graph has 46 edges"),
        ({"edges": 46}, "method.edges=46, but it must be 1 to 45"),
        ({"edges": 9, "share": 0.2}, "method.edges=9 and method.share=0.2 contradict each other"),
        ({"edges": 9, "penalty": 1.0}, "method.edges=9 and method.penalty=1.0 contradict"),
        ({"penalty": 0.0}, "method.penalty=0.0, but it must be a number above 0"),
        ({"learning_rate": math.inf}, "method.learning_rate=inf, but it must be a number above 0"),
        ({"initial": math.nan}, "method.initial=nan, but it must be a number"),
        ({"steps": 0}, "method.steps=0, but it must be at least 1"),
        ({"batch": 0}, "method.batch=0, but it must be at least 1"),
        (
            {"batch": 13},
            "method.batch=13, but there are 12 discovery prompts; lower it, or give more",
        ),
        ({"masks_per_prompt": -1}, "method.masks_per_prompt=-1, but it must be at least 0"),
        ({"checkpoint_every": 0}, "method.checkpoint_every=0, but it must be at least 1"),
        ({"seed": -1}, "method.seed=-1, but it must be at least 0"),
    ],
)
@pytest.mark.parametrize("name", LEARNED)
def test_settings_out_of_range_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        learn(name, **settings)
    assert "\n" not in str(error.value)


def test_other_units_are_refused():
    with pytest.raises(ValueError, match="method.over='heads', but it must be edges or nodes"):
        learn("subnetwork_probing", over="heads")


def test_a_metric_by_which_the_empty_circuit_is_as_good_is_refused():
    ours = objective(metric="logit_diff")
    if ours.full().mean() > ours.empty().mean():
        ours = replace(ours, metric=replace(ours.metric, higher_is_better=False))
    with pytest.raises(ValueError, match="by logit_diff the empty circuit .* has nothing to keep"):
        learn("ugs", ours)


@pytest.mark.parametrize("name", LEARNED)
def test_a_mask_that_removes_nothing_is_refused(name):
    with pytest.raises(
        ValueError, match=r"still keeps 4\d of 46 edges .expected.; raise method.steps"
    ):
        learn(name, steps=2, learning_rate=1e-3, initial=6.0)


def test_a_mask_that_keeps_nothing_is_refused():
    """One edge that is not the one from the input to the logits makes no path."""
    with pytest.raises(
        ValueError, match="keeps no path from .* at 1 edges after 60 steps; ask for"
    ):
        learn("subnetwork_probing", steps=60, edges=1)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_training_and_the_last_good_mask_is_kept(
    broken, caplog, monkeypatch
):
    real = training._backward

    def breaking(trainer, gates, step, constants):
        lost = real(trainer, gates, step, constants)
        if step < 30:
            return lost
        if broken == "gradient":
            next(iter(gates.values())).grad[0, 0] = math.inf
        return lost if broken == "gradient" else math.nan

    monkeypatch.setattr(training, "_backward", breaking)
    found = learn("ugs", steps=40)
    assert "the loss of step 31 is nan, so that training stops" in caplog.text
    assert "learning_rate" in caplog.text
    assert found.details["steps"] == 30 and len(found.details["training"]) == 30
    assert all(theta.isfinite().all() for theta in found.trained(5).gates.values())
    monkeypatch.setattr(training, "_backward", lambda *_: math.nan)
    with pytest.raises(ValueError, match="the loss of the first step is nan; check the weights"):
        learn("ugs")


def test_logits_that_are_not_finite_are_a_loss_that_is_not(caplog, monkeypatch):
    ours, real, runs = objective(), ENGINE.masked, []

    def broken(*arguments, **named):
        runs.append(1)
        return real(*arguments, **named) * (math.nan if len(runs) > 31 else 1)

    monkeypatch.setattr(ENGINE, "masked", broken)
    assert learn("ugs", ours, steps=40).details["steps"] == 30  # one run is the empty circuit's
    assert "training stops" in caplog.text


# ---- within an extraction ------------------------------------------------------------------------


def records(seed: int) -> Prompts:
    return prompts_from_records(tiny.with_own_answers(ENGINE, tiny.records(12, seed, longest=7)))


def extracted(config, selection=None, **changes):
    return extract(
        ENGINE,
        records(1),
        records(2),
        config,
        selection=selection,
        random_draws=0,
        accept_worse=True,
        **changes,
    )


def test_a_selection_takes_a_size_of_the_ladder_and_the_mask_of_it(tmp_path):
    made = extracted(EdgePruning(steps=60), Selection(edges=14))
    circuit = made.circuit
    assert 0 < len(circuit) <= 14 and circuit.about["selection"]["edges"] == 14
    assert circuit.trained.size() <= 16
    json.dumps(made.metrics)
    assert len(made.metrics["method"]["training"]) == 60
    circuit.save(tmp_path)
    again = Circuit.load(tmp_path)
    assert again.trained.kind == "hard_concrete" and again.trained.over == "edges_and_nodes"
    drawn = again.sample(3, seed=1)
    assert all(torch.equal(a.kept, b.kept) for a, b in zip(drawn, circuit.sample(3, seed=1)))
    assert drawn[2].about["sample"] == {"seed": 1, "draw": 2}


def test_with_a_size_of_its_own_a_mask_decides_and_a_selection_contradicts_it():
    assert extracted(UGS(steps=60, edges=14)).circuit.about["selection"] is None
    with pytest.raises(ValueError, match="selection.edges=3, but method ugs decides itself"):
        extracted(UGS(edges=14), Selection(edges=3))


def test_a_circuit_is_found_again_on_other_prompts_without_its_files(tmp_path):
    path = tmp_path / "mask.safetensors"
    config = UGS(steps=30, edges=14, checkpoint=str(path), warm_start="eap_ig")
    circuit = extracted(config).circuit
    path.unlink()
    kept = rediscover(circuit, ENGINE, records(3))
    assert 0 < kept.sum() <= 14 and not path.exists()
    run = replace(config, warm_start=str(tmp_path), checkpoint=None)
    circuit.save(tmp_path)
    about = {**circuit.about, "method": asdict(run)}
    assert torch.equal(rediscover(replace(circuit, about=about), ENGINE, records(3)), kept)


@pytest.mark.slow
def test_few_steps_recover_trained_and_compiled_circuits_exactly():
    methods = {name: method.schema(steps=120) for name, method in LEARNED.items()}
    compiled = list(put_to_the_test(methods, ("greater_than",), ("plain",), prompts=32))
    results = [*compiled, *put_to_the_test(methods, ("recall",), ("trained",), prompts=32)]
    assert [result.method for result in results] == list(LEARNED) * 2
    assert all(result.exact for result in results), [r for r in results if not r.exact]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["plain", "rotated, distractors", "trained"])
def test_edge_pruning_recovers_every_circuit_exactly(variant):
    methods = {"edge_pruning": EdgePruning()}
    results = list(put_to_the_test(methods, variants=(variant,)))
    assert len(results) > 2 and all(result.exact for result in results)
