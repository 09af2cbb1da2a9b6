"""ACDC against a sequential sweep through hooks; attribution against gradients of the edge mask;
known circuits.
"""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from circuits.ablation import AblationConfig, fit_ablation
from circuits.discovery import ACDC, EAP, EAPIG, METHODS, acdc, eap, eap_ig
from circuits.engine import Engine
from circuits.engine.masked import Start
from circuits.metrics import METRICS
from circuits.model.load import ModelConfig, load_model
from circuits.objective import Objective, prepare
from circuits.prompts import Prompts, prompts_from_records
from tests import tiny
from tests.budget import memory_for
from tests.hooks import through_hooks

ENGINES = {
    "gpt2": Engine(tiny.gpt2(n_embd=8, n_head=2)),
    "grouped queries": Engine(tiny.native(n_heads=4, n_key_value_heads=2, d_head=3)),
    "split input": Engine(tiny.gpt2(n_embd=8, n_head=2, n_layer=1), split_input=True),
    "attention only": Engine(tiny.native(attn_only=True, n_heads=2)),
    "bidirectional": Engine(tiny.native(attention_dir="bidirectional", n_heads=2)),
}
CAUSAL = [name for name in ENGINES if name != "bidirectional"]
PROMPTS = tiny.prompts(5, seed=1, longest=7)
REFERENCE = tiny.prompts(6, seed=2, longest=7)


def objective(
    engine: Engine, metric: str = "kl", ablation: str = "mean", prompts: Prompts = PROMPTS
) -> Objective:
    fitted = fit_ablation(AblationConfig(ablation), engine, REFERENCE)
    return prepare(
        engine, prompts, METRICS[metric], fitted, memory=memory_for(2, engine, prompts, fitted)
    )


def kept_names(engine: Engine, kept: torch.Tensor) -> set[str]:
    return {engine.graph.edge_name(*edge) for edge in kept.nonzero().tolist()}


def test_methods_are_named_after_their_configurations():
    for name, method in METHODS.items():
        first = dataclasses.fields(method.schema)[0]
        assert (first.name, first.default) == ("name", name)


# ---- ACDC ----------------------------------------------------------------------------------------


def written_at(writer: str) -> tuple[int, int, int]:
    """When a writer writes: its layer (the input before all), heads before the MLP, its head."""
    if writer.startswith("input"):
        return -1, 0, int(writer == "input.position")
    layer, _, head = writer[1:].partition(".h")
    return int(layer), int(writer[0] == "m"), int(head or 0)


def read_at(reader: str) -> tuple[float, int, int]:
    """When a reader's turn comes, from the last to the first: layer; logits > mlp > v > k > q;
    head.
    """
    if reader == "logits":
        return math.inf, 0, 0
    if reader[0] == "m":
        return int(reader[1:]), 3, 0
    layer, head = reader[1:-3].split(".")
    return int(layer), "qkv".index(reader[-2]), int(head.strip("hkv"))


def sweep(names: list[str]) -> list[str]:
    return sorted(
        names,
        key=lambda name: (read_at(name.split("->")[1]), written_at(name.split("->")[0])),
        reverse=True,
    )


def slow_acdc(engine: Engine, prompts: Prompts, ablation: str, tau: float, names: list[str]):
    """One edge at a time through hooks, every one of them evaluated: the kept names and each edge's
    delta.
    """
    graph = engine.graph
    fitted = fit_ablation(AblationConfig(ablation), engine, REFERENCE)
    shape = engine.clean(tiny.from_tokens(prompts.clean)).writers.shape
    ablated = fitted.writers(engine, prompts).expand(shape)
    ones = graph.exists.double()

    def scored(mask) -> list[torch.Tensor]:
        logits = through_hooks(engine, prompts.clean, mask, ablated)
        return [
            logits[row, where[where >= 0]].log_softmax(-1)
            for row, where in enumerate(prompts.positions)
        ]

    model = scored(ones)

    def cost(mask) -> float:
        each = [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(model, scored(mask))]
        return (sum(each) / len(each)).item()

    mask, current, deltas = ones.clone(), 0.0, {}
    for name in names:
        edge = graph.edge_index(name)
        mask[edge] = 0
        without = cost(mask)
        deltas[name] = without - current
        if deltas[name] < tau:
            current = without
        else:
            mask[edge] = 1
    return {name for name in names if mask[graph.edge_index(name)]}, deltas


@pytest.mark.parametrize(("ablation", "tau"), [("mean", 0.01), ("counterfactual", 0.03)])
@pytest.mark.parametrize("name", CAUSAL)
def test_acdc_is_the_sequential_sweep(name, ablation, tau):
    """The slow sweep knows no dead nodes: it runs all edges, so that this also shows that skipping
    is harmless.
    """
    engine = ENGINES[name]
    names = sweep([engine.graph.edge_name(*edge) for edge in engine.graph.edges()])
    kept, deltas = slow_acdc(engine, PROMPTS, ablation, tau, names)
    found = acdc(ACDC(tau=tau), objective(engine, "kl", ablation))
    assert 0 < len(kept) < engine.graph.n_edges
    assert found.details["closest_to_tau"] > 1e-9, "too close to tau to compare"
    assert kept_names(engine, found.kept) == kept
    expected = torch.zeros(engine.graph.exists.shape)
    for edge, delta in deltas.items():
        expected[engine.graph.edge_index(edge)] = delta
    torch.testing.assert_close(found.scores, expected, atol=1e-6, rtol=1e-5)
    assert found.details["closest_to_tau"] == pytest.approx(
        min(abs(d - tau) for d in deltas.values()), abs=tau
    )
    assert found.details["final_cost"] == pytest.approx(
        -objective(engine, "kl", ablation).measure(found.kept).mean()
    )


def test_the_order_of_the_sweep_matters_here():
    """Otherwise the test above would not notice another order."""
    engine = ENGINES["gpt2"]
    names = sweep([engine.graph.edge_name(*edge) for edge in engine.graph.edges()])
    orders = {
        "sweep": names,
        "input to output": names[::-1],
        "writers ascending": sweep_with_writers_ascending(names),
    }
    kept = {
        order: slow_acdc(engine, PROMPTS, "mean", 0.03, chosen)[0]
        for order, chosen in orders.items()
    }
    assert kept["sweep"] != kept["input to output"] and kept["sweep"] != kept["writers ascending"]


def sweep_with_writers_ascending(names: list[str]) -> list[str]:
    turned = sorted(names, key=lambda name: written_at(name.split("->")[0]))
    return sorted(turned, key=lambda name: read_at(name.split("->")[1]), reverse=True)


def test_acdc_with_another_metric_removes_what_does_not_lower_it():
    engine = ENGINES["gpt2"]
    ours = objective(engine, "logit_diff")
    found = acdc(ACDC(tau=0.05), ours)
    kept, current = engine.graph.exists.clone(), ours.full().mean()
    for edge in engine.graph.sweep_order():
        kept[edge] = False
        without = ours.measure(kept).mean()
        if current - without < 0.05:
            current = without
        else:
            kept[edge] = True
    assert torch.equal(found.kept, kept) and 0 < kept.sum() < engine.graph.n_edges


@pytest.mark.parametrize("name", CAUSAL)
def test_a_node_that_nothing_reads_loses_its_edges_unevaluated(name):
    engine = ENGINES[name]
    graph = engine.graph
    found = acdc(ACDC(tau=0.08), objective(engine, "kl", "counterfactual"))
    skipped = 0
    for row, reader in enumerate(graph.readers[:-1]):
        if not any(
            found.kept[:, graph.writer_index[node]].any() for node in graph.reader_nodes(row)
        ):
            assert not found.kept[row].any() and not found.scores[row].any(), reader
            skipped += graph.upstream[row]
    assert skipped > 0
    assert found.details["runs"] == graph.n_edges - skipped


def test_a_shared_key_value_head_lives_as_long_as_one_of_its_query_heads():
    engine = ENGINES["grouped queries"]
    graph, halves = engine.graph, 0
    kept = acdc(ACDC(tau=0.03), objective(engine, "kl", "counterfactual")).kept
    for row, reader in enumerate(graph.readers):
        if ".kv" in reader:
            read = [
                bool(kept[:, graph.writer_index[node]].any()) for node in graph.reader_nodes(row)
            ]
            halves += sum(read) == 1 and bool(kept[row].any())
    assert halves > 0, "no group with one living query head, so nothing was shown"


def test_a_tau_above_every_effect_empties_the_circuit():
    found = acdc(ACDC(tau=1e9), objective(ENGINES["gpt2"]))
    assert not found.kept.any()
    assert found.details["runs"] == ENGINES["gpt2"].graph.upstream[-1], (
        "only the edges into logits are run"
    )


def test_a_shuffled_order_is_repeatable_and_seeds_differ():
    ours = objective(ENGINES["split input"])
    kept = {seed: acdc(ACDC(tau=0.03, order="shuffle", seed=seed), ours).kept for seed in range(3)}
    again = acdc(ACDC(tau=0.03, order="shuffle", seed=2), ours)
    assert torch.equal(again.kept, kept[2])
    assert any(not torch.equal(kept[0], kept[seed]) for seed in (1, 2))
    assert not again.kept[~ours.engine.graph.exists].any()


@pytest.mark.parametrize("tau", [0.0, -0.1, math.nan])
def test_a_tau_that_is_not_above_zero_is_refused(tau):
    with pytest.raises(ValueError, match=f"tau={tau}, but it must be above 0"):
        acdc(ACDC(tau=tau), objective(ENGINES["gpt2"]))


@pytest.mark.parametrize("share", [0.0, -1.0, math.nan])
def test_a_share_that_is_not_above_zero_is_refused(share):
    with pytest.raises(ValueError, match=f"share={share}, but it must be above 0"):
        acdc(ACDC(share=share), objective(ENGINES["gpt2"]))


@pytest.mark.parametrize("metric", ["kl", "logit_diff"])
def test_by_default_tau_is_a_share_of_the_gap_between_model_and_empty_circuit(metric):
    ours = objective(ENGINES["gpt2"], metric, "mean")
    ends = [ours.full().double().mean().item(), ours.empty().double().mean().item()]
    tau = 0.03 * abs(ends[0] - ends[1])
    if ends[0] > ends[1]:
        by_share = acdc(ACDC(share=0.03), ours)
        assert by_share.details["tau"] == pytest.approx(tau)
        assert torch.equal(by_share.kept, acdc(ACDC(tau=tau), ours).kept)
    else:
        with pytest.raises(ValueError, match=f"by {metric} the empty circuit .* is as good"):
            acdc(ACDC(share=0.03), ours)


def test_a_sweep_starts_from_all_edges_and_warns_where_rounding_is_near_tau(caplog):
    rounded = Engine(tiny.gpt2(torch.bfloat16))
    for engine, said in ((rounded, True), (ENGINES["gpt2"], False)):
        caplog.clear()
        ours = objective(engine, "kl", "mean")
        everything = -ours.measure(engine.graph.exists).double().mean().item()
        found = acdc(ACDC(tau=1e-4), ours)
        assert ("beside tau=0.0001" in caplog.text and "dtype=float32" in caplog.text) == said
        assert said == (everything > 1e-5)
        removed = found.scores[~found.kept].double().sum().item()
        assert found.details["final_cost"] - removed == pytest.approx(everything, abs=1e-5)


def test_a_sweep_whose_batches_are_not_all_kept_says_what_would_help(caplog):
    engine, prompts = ENGINES["gpt2"], tiny.prompts(9, seed=1)
    fitted = fit_ablation(AblationConfig("counterfactual"), engine, REFERENCE)
    for memory, said in ((memory_for(1, engine, prompts, fitted), True), ("2GB", False)):
        caplog.clear()
        acdc(ACDC(tau=1e9), prepare(engine, prompts, METRICS["kl"], fitted, memory=memory))
        assert ("of 9 batches prepared" in caplog.text and "raise memory" in caplog.text) == said


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="order='random', but the orders are sweep, shuffle"):
        acdc(ACDC(order="random"), objective(ENGINES["gpt2"]))


# ---- EAP -----------------------------------------------------------------------------------------


def mask_gradient(ours: Objective) -> torch.Tensor:
    """The gradient of the mean metric in the edge mask at all ones."""
    mask = ours.engine.graph.exists.double().requires_grad_()
    values = []
    for batch in ours.batches:
        prompts = batch.prompts
        logits = ours.engine.masked(prompts, mask, batch.ablated)
        values.append(ours.metric.oriented(logits, prompts, batch.clean.logits))
    return torch.autograd.grad(torch.cat(values).mean(), mask)[0]


def assert_equal_scores(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.abs().max() > 1e-3
    assert ours.dtype == torch.float32
    torch.testing.assert_close(
        ours.double() / expected.abs().max(), expected / expected.abs().max(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("ablation", ["counterfactual", "mean", "zero"])
@pytest.mark.parametrize(
    ("name", "metric"),
    [
        *((name, "logit_diff") for name in ENGINES),
        ("gpt2", "cross_entropy"),
        ("bidirectional", "prob_diff"),
    ],
)
def test_eap_is_the_gradient_of_the_mask(name, ablation, metric):
    engine = ENGINES[name]
    ours = objective(engine, metric, ablation)
    found = eap(EAP(), ours)
    assert_equal_scores(found.scores, mask_gradient(ours))
    assert found.kept is None and not found.scores[~engine.graph.exists].any()


@pytest.mark.parametrize("ablation", ["counterfactual", "mean", "zero"])
def test_eap_is_exact_for_edges_into_linear_logits(ablation):
    """Without norms the logit difference is linear in what `logits` reads: score = m(model) -
    m(model without e).
    """
    engine = Engine(tiny.native(normalization_type=None, attn_only=True, n_heads=2))
    ours = objective(engine, "logit_diff", ablation)
    scores = eap(EAP(), ours).scores
    effects = []
    for writer in range(len(engine.graph.writers)):
        mask = engine.graph.exists.clone()
        mask[-1, writer] = False
        effects.append((ours.full() - ours.measure(mask)).mean())
    effects = torch.stack(effects)
    assert (effects > 0).any() and (effects < 0).any(), "both signs, or the sign is not tested"
    torch.testing.assert_close(
        scores[-1].double(), effects, atol=1e-5 * float(effects.abs().max()), rtol=1e-5
    )


# ---- EAP-IG --------------------------------------------------------------------------------------


def writers_from_input(
    engine: Engine, embedded: torch.Tensor, tokens: torch.Tensor
) -> list[torch.Tensor]:
    """What heads and MLPs write when the bridge's embedding is `embedded`, [B, S, D] each, through
    hooks.
    """
    bridge, graph, width = engine.model.bridge, engine.graph, engine.architecture.head_width
    written = []

    def heads(layer):
        def hook(z, hook):
            weight = engine.architecture.blocks[layer].attention.o.weight.T  # [heads * width, D]
            parts = zip(z.flatten(2).split(width, -1), weight.split(width))
            written.extend(values @ rows for values, rows in parts)

        return hook

    hooks = [("embed.hook_out", lambda value, hook: embedded)]
    hooks += [("pos_embed.hook_out", lambda value, hook: torch.zeros_like(value))]
    for layer in range(graph.n_layers):
        hooks.append((f"blocks.{layer}.attn.o.hook_in", heads(layer)))
        if not graph.attention_only:
            hooks.append(
                (f"blocks.{layer}.mlp.hook_out", lambda value, hook: written.append(value))
            )
    with torch.no_grad():
        bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    assert len(written) == len(graph.writers) - graph.n_inputs
    return written


def slow_eap_ig(ours: Objective, steps: int) -> torch.Tensor:
    """The mask's gradient at all ones, in runs from interpolated inputs.

    The gradient of m[r, w] is (a_w - removed_w) . dm/dx_r.  With removed = a_w of that run -
    (clean_w - ablated_w) the first factor is the full difference of the ends, while the run itself
    does not change, since the mask is all ones.
    """
    engine = ours.engine
    n_inputs = engine.graph.n_inputs
    total, count = torch.zeros(engine.graph.exists.shape, dtype=torch.float64), 0
    for batch in ours.batches:
        prompts, clean = batch.prompts, batch.clean.writers
        difference = clean - batch.ablated.writers
        count += len(prompts)
        for k in range(steps):
            inputs = clean[:n_inputs] + (k / steps - 1) * difference[:n_inputs]
            run = torch.stack([*inputs, *writers_from_input(engine, inputs.sum(0), prompts.clean)])
            mask = engine.graph.exists.double().requires_grad_()
            logits = engine.masked(
                prompts, mask, engine.ablated(run - difference), start=Start(0, inputs)
            )
            value = ours.metric.oriented(logits, prompts, batch.clean.logits).sum()
            total += torch.autograd.grad(value, mask)[0] / steps
    return total / count


@pytest.mark.parametrize("ablation", ["counterfactual", "mean"])
@pytest.mark.parametrize(
    ("name", "metric"),
    [*((name, "logit_diff") for name in CAUSAL), ("gpt2", "cross_entropy"), ("gpt2", "kl")],
)
def test_eap_ig_is_the_mean_gradient_along_the_input(name, ablation, metric):
    ours = objective(ENGINES[name], metric, ablation)
    found = eap_ig(EAPIG(steps=3), ours)
    assert_equal_scores(found.scores, slow_eap_ig(ours, 3))
    assert not found.scores[~ours.engine.graph.exists].any()


def test_eap_ig_ends_before_the_clean_input():
    """k = 0 .. steps - 1: one step is the gradient at the ablated end, not at the clean one, which
    would be EAP.
    """
    ours = objective(ENGINES["gpt2"], "logit_diff", "counterfactual")
    one, plain = eap_ig(EAPIG(steps=1), ours).scores, eap(EAP(), ours).scores
    assert (one - plain).abs().max() > 0.1 * plain.abs().max()
    swapped = [
        {
            "clean": r["corrupt"],
            "corrupt": r["clean"],
            "positions": r["positions"],
            "answers": r["answers"],
            "wrong_answers": r["wrong_answers"],
        }
        for r in tiny.records(5, seed=1, longest=7)
    ]
    at_corrupt = eap(
        EAP(),
        objective(ENGINES["gpt2"], "logit_diff", "counterfactual", prompts_from_records(swapped)),
    )
    torch.testing.assert_close(
        one, -at_corrupt.scores, atol=1e-6 * float(one.abs().max()), rtol=1e-5
    )


def test_attribution_does_not_depend_on_the_batches():
    engine = ENGINES["bidirectional"]
    fitted = fit_ablation(AblationConfig("counterfactual"), engine, REFERENCE)
    for method, config in ((eap, EAP()), (eap_ig, EAPIG(steps=2))):
        scores = [
            method(
                config, prepare(engine, PROMPTS, METRICS["logit_diff"], fitted, memory=memory)
            ).scores
            for memory in (*(memory_for(size, engine, PROMPTS, fitted) for size in (1, 2)), "2GB")
        ]
        assert_equal_scores(scores[0], scores[2].double())
        assert_equal_scores(scores[1], scores[2].double())


# ---- real models whose circuits are known --------------------------------------------------------

INDUCTION = {
    "input.token->a0.h0<v>",
    "input.position->a0.h0<q>",
    "input.position->a0.h0<k>",
    "a0.h0->a1.h0<k>",
    "input.token->a1.h0<q>",
    "input.token->a1.h0<v>",
    "a1.h0->logits",
}


@pytest.fixture(scope="module")
def induction(cases) -> tuple[Engine, Prompts]:
    folder = cases / "gbmi_induction_2L1H"
    model = load_model(ModelConfig(str(folder / "indhead_l_2_2.pt")))
    data = np.load(folder / "test.eval.npz", allow_pickle=False)
    rows = zip(*(data[name][:100].tolist() for name in ("tokens", "partner_tokens", "labels")))
    records = [
        {"clean": clean, "corrupt": corrupt, "answers": label} for clean, corrupt, label in rows
    ]
    return Engine(model, split_input=True), prompts_from_records(records)


def on(engine: Engine, prompts: Prompts, ablation: str) -> Objective:
    return prepare(
        engine, prompts, METRICS["kl"], fit_ablation(AblationConfig(ablation), engine, prompts)
    )


@pytest.mark.parametrize("tau", [0.001, 1.0])
def test_acdc_finds_the_induction_circuit(induction, tau):
    """With means all of it; with a partner that differs at one earlier token, the path along which
    that one acts.
    """
    kept = {
        name: kept_names(induction[0], acdc(ACDC(tau=tau), on(*induction, name)).kept)
        for name in ("mean", "counterfactual")
    }
    assert kept["mean"] == INDUCTION
    assert kept["counterfactual"] == {"input.token->a0.h0<v>", "a0.h0->a1.h0<k>", "a1.h0->logits"}


def test_eap_ig_ranks_the_induction_circuit_first(induction):
    graph, scores = induction[0].graph, eap_ig(EAPIG(), on(*induction, "mean")).scores
    ranked = sorted(graph.edges(), key=lambda edge: scores[edge].item(), reverse=True)
    assert {graph.edge_name(*edge) for edge in ranked[: len(INDUCTION)]} == INDUCTION


def compiled_name(edge: str) -> str:
    """`A0.0->MLP1` and `embed->A3.0.V` in our names."""
    writer, reader = edge.split("->")
    names = {"embed": "input.token", "pos_embed": "input.position", "logits": "logits"}
    for layer in range(4):
        names |= {f"MLP{layer}": f"m{layer}", f"A{layer}.0": f"a{layer}.h0"}
        names |= {f"A{layer}.0.{side}": f"a{layer}.h0<{side.lower()}>" for side in "QKV"}
    return f"{names[writer]}->{names[reader]}"


def test_acdc_finds_what_resampling_can_see_of_a_compiled_program(cases):
    folder = cases / "tracr_compiled"
    engine = Engine(load_model(ModelConfig(str(folder / "reverse.pt"))), split_input=True)
    data, known = (
        np.load(folder / "reverse.eval.npz"),
        json.loads((folder / "reverse.circuit.json").read_text()),
    )
    where = data["answer_pos"].tolist()
    records = [{"clean": tokens, "positions": where} for tokens in data["tokens"].tolist()]
    prompts = prompts_from_records(records)
    kept = {
        name: kept_names(engine, acdc(ACDC(tau=0.01), on(engine, prompts, name)).kept)
        for name in ("resample", "zero")
    }
    assert kept["resample"] == {compiled_name(edge) for edge in known["edges_effective"]}
    assert kept["resample"] < kept["zero"] <= {compiled_name(edge) for edge in known["edges_all"]}


# ---- refusals ------------------------------------------------------------------------------------


def test_plain_eap_with_kl_is_refused_and_the_remedy_named():
    with pytest.raises(
        ValueError, match="metric=kl has zero gradient at the clean run.*use method=eap_ig"
    ):
        eap(EAP(), objective(ENGINES["gpt2"], "kl"))


def test_the_reason_for_that_refusal_holds():
    assert mask_gradient(objective(ENGINES["gpt2"], "kl")).abs().max() < 1e-12


@pytest.mark.parametrize(("method", "config"), [(eap, EAP()), (eap_ig, EAPIG())])
def test_metrics_without_gradient_are_refused(method, config):
    with pytest.raises(
        ValueError,
        match="metric=accuracy has no gradient; use logit_diff, prob_diff or cross_entropy",
    ):
        method(config, objective(ENGINES["gpt2"], "accuracy"))


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps={steps}, but at least 1 is needed"):
        eap_ig(EAPIG(steps=steps), objective(ENGINES["gpt2"]))


# ---- edges per position --------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["gpt2", "grouped queries", "bidirectional"])
def templated(request) -> tuple[Engine, Engine, Prompts]:
    """An engine with edges per position, one without, and prompts of one length."""
    plain = ENGINES[request.param]
    prompts = tiny.prompts(6, shortest=5, longest=5)
    return Engine(plain.model, n_positions=5), plain, prompts


def test_eap_per_position_is_the_gradient_of_the_mask_per_position(templated):
    per_position, plain, prompts = templated
    ours = objective(per_position, "logit_diff", "mean", prompts)
    found = eap(EAP(), ours).scores
    assert_equal_scores(found, mask_gradient(ours))
    together = eap(EAP(), objective(plain, "logit_diff", "mean", prompts)).scores
    assert_equal_scores(found.sum(-1), together.double())


@pytest.mark.slow
def test_acdc_per_position_is_the_sequential_sweep(templated):
    per_position, _, prompts = templated
    graph, ours = per_position.graph, objective(per_position, "kl", "mean", prompts)
    kept, current, evaluated = graph.exists.clone(), -ours.full().double().mean().item(), 0
    for edge in graph.sweep_order():
        kept[edge] = False
        without = -ours.measure(kept).double().mean().item()
        evaluated += 1
        if without - current < 0.01:
            current = without
        else:
            kept[edge] = True
    found = acdc(ACDC(tau=0.01), ours)
    assert found.details["runs"] < evaluated
    assert 0 < int(found.kept.sum()) < graph.n_edges and torch.equal(found.kept, kept)
