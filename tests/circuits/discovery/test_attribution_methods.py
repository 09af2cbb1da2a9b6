"""Attribution methods beside EAP and EAP-IG, each against its definition, edge by edge."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from abstraction.ground_truth.scoreboard import subject
from circuits.ablation import AblationConfig, fit_ablation
from circuits.discovery import (
    EAP,
    EAPIG,
    METHODS,
    AtPStar,
    CleanCorrupt,
    EAPIGActivations,
    Exact,
    InformationFlow,
    atp_star,
    clean_corrupt,
    eap,
    eap_ig,
    eap_ig_activations,
    exact,
    information_flow,
)
from circuits.discovery.attribution import ByGradient
from circuits.engine import Engine
from circuits.engine.rules import RULES
from circuits.metrics import METRICS
from circuits.objective import Objective, prepare
from circuits.prompts import Prompts, prompts_from_records
from tests import tiny
from tests.budget import memory_for
from tests.slow_gradients import slow_gradients

ENGINES = {
    "gpt2": Engine(tiny.gpt2(n_embd=8, n_head=2)),
    "llama": Engine(tiny.huggingface("llama")),
    "split input": Engine(tiny.gpt2(n_embd=8, n_head=2, n_layer=1), split_input=True),
    "parallel": Engine(tiny.huggingface("neox")),
    "attention only": Engine(tiny.native(attn_only=True, n_heads=2)),
    "bidirectional": Engine(tiny.native(attention_dir="bidirectional", n_heads=2)),
}
BY_POSITION = Engine(
    tiny.native(n_layers=1, n_heads=4, n_key_value_heads=2, d_head=3), n_positions=5
)
PROMPTS = tiny.prompts(3, seed=1, longest=6)
TEMPLATED = tiny.prompts(3, seed=3, shortest=5, longest=5)
REFERENCE = tiny.prompts(6, seed=2, longest=7)


def objective(
    engine: Engine, metric: str = "logit_diff", ablation: str = "mean", prompts: Prompts = PROMPTS
) -> Objective:
    fitted = fit_ablation(AblationConfig(ablation), engine, REFERENCE)
    memory = memory_for(2, engine, prompts, fitted)
    return prepare(engine, prompts, METRICS[metric], fitted, memory=memory)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to rounding, which scores in float32 leave."""
    size = float(expected.abs().max())
    assert size > 1e-3
    torch.testing.assert_close(found.double() / size, expected.double() / size, atol=1e-6, rtol=0)


def products(engine: Engine, batch, gradients: torch.Tensor) -> torch.Tensor:
    """Each edge's difference times the gradient at its reader."""
    values = batch.clean.writers - batch.ablated.writers
    by_position = torch.einsum("rbsd,wbsd->rws", gradients, values)
    told = by_position if engine.graph.n_positions is not None else by_position.sum(-1)
    return told * engine.graph.exists


def scalar(ours: Objective, batch):
    return lambda logits: ours.metric.oriented(logits, batch.prompts, batch.clean.logits).sum()


# ---- rules and points ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("engine", [ENGINES["llama"], BY_POSITION])
def test_eap_takes_the_gradients_of_its_rule(engine, rule):
    ours = objective(engine, prompts=TEMPLATED)
    expected = 0.0
    for batch in ours.batches:
        gradients = slow_gradients(engine, batch.prompts, scalar(ours, batch), rule)
        expected = expected + products(engine, batch, gradients)
    close(eap(EAP(rule=rule), ours).scores, expected / len(TEMPLATED))


def test_clean_corrupt_is_the_mean_of_the_two_ends():
    ours = objective(ENGINES["gpt2"], ablation="counterfactual")
    for rule in RULES:
        ends = eap(EAP(rule=rule), ours).scores, eap_ig(EAPIG(rule=rule, steps=1), ours).scores
        close(clean_corrupt(CleanCorrupt(rule=rule), ours).scores, sum(ends) / 2)


# ---- EAP-IG of activations -----------------------------------------------------------------------


def slow_activations(ours: Objective, steps: int, rule: str) -> torch.Tensor:
    engine, graph, total = ours.engine, ours.engine.graph, 0.0
    for batch in ours.batches:
        clean, removed = batch.clean.writers, batch.ablated.writers.expand_as(batch.clean.writers)
        kinds = ["input", *(f"{kind}{layer}" for layer in range(graph.n_layers) for kind in "am")]
        kinds = [kind for kind in kinds if kind[0] != "m" or not graph.attention_only]
        for kind in kinds:
            own = [row for row, name in enumerate(graph.writers) if name.split(".")[0] == kind]
            bias = 0.0
            if kind[0] == "a":
                bias = engine.architecture.blocks[int(kind[1:])].attention.o.bias
            for k in range(steps):
                value = removed[own] + k / steps * (clean[own] - removed[own])
                value = value.sum(0) + (0.0 if bias is None else bias)
                gradients = slow_gradients(
                    engine, batch.prompts, scalar(ours, batch), rule, {kind: value}
                )
                total = total + products(engine, batch, gradients)
    return total / steps / len(kinds) / len(ours.batches.whole)


@pytest.mark.parametrize(
    ("name", "metric", "rule"),
    [*((name, "logit_diff", "plain") for name in ENGINES), ("gpt2", "kl", "relp_qk")],
)
def test_activations_are_interpolated_group_by_group(name, metric, rule):
    ours = objective(ENGINES[name], metric)
    found = eap_ig_activations(EAPIGActivations(steps=2, rule=rule), ours)
    close(found.scores, slow_activations(ours, 2, rule))


# ---- AtP* ----------------------------------------------------------------------------------------


def slow_atp_star(ours: Objective) -> torch.Tensor:
    """For edges to queries and keys the slope of the metric towards what the layer's heads write in
    a run without the edge; for all others the product with the gradient.
    """
    engine, graph, step = ours.engine, ours.engine.graph, 1e-5
    total = torch.zeros(graph.exists.shape, dtype=torch.float64)
    for batch in ours.batches:
        prompts, ask = batch.prompts, scalar(ours, batch)
        total += products(engine, batch, slow_gradients(engine, prompts, ask))
        for edge in graph.edges():
            reader = graph.readers[edge[0]]
            if not reader.endswith(("<q>", "<k>")):
                continue
            layer, mask = int(reader[1:].split(".")[0]), graph.exists.clone()
            mask[edge] = False
            first = graph.first_writer(layer)
            away = torch.zeros_like(batch.clean.writers[0])

            def see(seen, layer=layer, first=first, away=away, batch=batch):
                if seen.layer == layer and seen.queries is not None:
                    away += seen.written[:, 0].sum(0)
                    away -= batch.clean.writers[first : first + graph.n_heads].sum(0)

            engine.masked(prompts, mask, batch.ablated, observe=see)

            def moved(size, layer=layer, away=away, prompts=prompts, ask=ask):
                def edit(place, value, given):
                    return value + size * away if place == f"a{layer}" else value

                return ask(engine.edited(prompts, edit))

            with torch.no_grad():
                total[edge] = -(moved(step) - moved(-step)) / (2 * step)
    return total


@pytest.mark.parametrize("name", [*ENGINES, "by position"])
def test_atp_star_recomputes_what_queries_and_keys_attend_to(name):
    engine = BY_POSITION if name == "by position" else ENGINES[name]
    prompts = TEMPLATED if name == "by position" else PROMPTS
    fitted = fit_ablation(AblationConfig("mean"), engine, REFERENCE)
    ours = prepare(engine, prompts, METRICS["logit_diff"], fitted)
    assert len(ours.batches) == 1
    close(atp_star(AtPStar(), ours).scores, slow_atp_star(ours) / len(prompts))


def test_atp_star_does_not_depend_on_how_many_writers_fit_at_once(monkeypatch):
    whole = atp_star(AtPStar(), objective(ENGINES["llama"])).scores
    memory = sys.modules["circuits.engine.memory"]
    monkeypatch.setattr(memory.Footprint, "recomputed", property(lambda size: 10**12))
    close(atp_star(AtPStar(), objective(ENGINES["llama"])).scores, whole)


def test_atp_star_sees_through_a_saturated_softmax():
    """Hard attention of a compiled program, which has no slope at the clean run."""
    ours, truth = subject("recall", "plain", "resample", 16, 0)
    ours = replace(ours, metric=METRICS["logit_diff"])
    graph = ours.engine.graph
    rows = [row for row, name in enumerate(graph.readers) if name.endswith(("<q>", "<k>"))]
    blind, seeing = (
        found.scores[rows][truth[rows]].abs()
        for found in (eap(EAP(), ours), atp_star(AtPStar(), ours))
    )
    assert len(blind) > 0 and blind.min() < 1e-6 and seeing.min() > 1e-2


# ---- exact effects -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "metric"),
    [("gpt2", "kl"), ("gpt2", "accuracy"), ("llama", "kl"), ("by position", "logit_diff")],
)
def test_exact_effects_are_runs_without_one_edge(name, metric):
    engine = BY_POSITION if name == "by position" else ENGINES[name]
    ours = objective(engine, metric, prompts=TEMPLATED if name == "by position" else PROMPTS)
    found = exact(Exact(), ours).scores
    full = ours.full().double().mean()
    for edge in engine.graph.edges()[::3]:
        mask = engine.graph.exists.clone()
        mask[edge] = False
        effect = full - ours.measure(mask).double().mean()
        assert found[edge].item() == pytest.approx(effect.item(), abs=1e-6)
    assert metric == "accuracy" or found.abs().max() > 1e-3
    assert not found[~engine.graph.exists].any()


def test_more_edges_than_can_be_run_one_by_one_are_refused(monkeypatch):
    monkeypatch.setattr(sys.modules["circuits.discovery.exact"], "MOST_RUNS", 30)
    ours = objective(ENGINES["gpt2"])
    edges = ENGINES["gpt2"].graph.n_edges
    with pytest.raises(ValueError, match=f"{edges} edges take as many runs, more than 30; use"):
        exact(Exact(), ours)


# ---- information flow ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ENGINES, "by position"])
def test_information_flow_is_the_share_of_nearness(name):
    engine = BY_POSITION if name == "by position" else ENGINES[name]
    graph = engine.graph
    prompts = TEMPLATED if name == "by position" else PROMPTS
    ours = objective(engine, prompts=prompts)
    expected = torch.zeros(graph.exists.shape, dtype=torch.float64)
    clean = engine.clean(prompts).writers
    base = engine.ablated(clean).base  # what each group of readers reads in the clean run
    for row, reader in enumerate(graph.readers):
        mlp = reader.startswith("m")
        layer = graph.n_layers if reader == "logits" else int(reader[1:].split(".")[0])
        y = base[2 * layer + (mlp and not graph.parallel)]
        for prompt in range(len(prompts)):
            length = int(prompts.key_mask[prompt].sum())
            scored = [p for p in prompts.positions[prompt].tolist() if p >= 0]
            places = scored if reader == "logits" else range(length)
            for place in places:
                near = [
                    max(float(y[prompt, place].abs().sum() - (y - a)[prompt, place].abs().sum()), 0)
                    for a in clean[: graph.upstream[row]]
                ]
                for writer, one in enumerate(near):
                    share = one / sum(near) if sum(near) else 0.0
                    if graph.n_positions is None:
                        expected[row, writer] += share / len(places) / len(prompts)
                    else:
                        expected[row, writer, place] += share / len(prompts)
    close(information_flow(InformationFlow(), ours).scores, expected)


def test_information_flow_asks_for_no_metric_and_no_corrupt_prompt():
    records = [
        {name: value for name, value in record.items() if name in ("clean", "positions")}
        for record in tiny.records(3, seed=1, longest=6)
    ]
    bare = objective(ENGINES["gpt2"], "kl", "mean", prompts_from_records(records))
    told = objective(ENGINES["gpt2"], "logit_diff", "counterfactual")
    scores = [information_flow(InformationFlow(), ours).scores for ours in (bare, told)]
    assert torch.equal(*scores)


# ---- what all of them share ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.estimates])
def test_scores_do_not_depend_on_the_batches(name):
    engine, method = ENGINES["bidirectional"], METHODS[name]
    fitted = fit_ablation(AblationConfig("counterfactual"), engine, REFERENCE)
    scores = [
        method.run(
            method.schema(),
            prepare(engine, PROMPTS, METRICS["logit_diff"], fitted, memory=memory),
        ).scores
        for memory in (memory_for(1, engine, PROMPTS, fitted), "2GB")
    ]
    close(*scores)


@pytest.mark.parametrize("name", ["eap", "atp_star"])
def test_gradients_at_the_clean_run_alone_refuse_kl(name):
    with pytest.raises(ValueError, match=f"metric=kl has zero gradient.*method={name}.*eap_ig"):
        METHODS[name].run(METHODS[name].schema(), objective(ENGINES["gpt2"], "kl"))


GRADIENTS = [name for name, method in METHODS.items() if issubclass(method.schema, ByGradient)]


@pytest.mark.parametrize("name", GRADIENTS)
def test_what_gradients_cannot_do_is_refused(name):
    run, schema = METHODS[name].run, METHODS[name].schema
    with pytest.raises(ValueError, match="metric=accuracy has no gradient; use .*=exact"):
        run(schema(), objective(ENGINES["gpt2"], "accuracy"))
    with pytest.raises(ValueError, match="rule='lrp', but the rules are"):
        run(schema(rule="lrp"), objective(ENGINES["gpt2"]))
    if hasattr(schema, "steps"):
        with pytest.raises(ValueError, match="steps=0, but at least 1 is needed"):
            run(schema(steps=0), objective(ENGINES["gpt2"]))
