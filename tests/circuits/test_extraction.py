"""From prompts to a circuit with its figures, end to end on tiny models."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch

from circuits.ablation import AblationConfig, fit_ablation
from circuits.ablation.means import writer_means
from circuits.circuit import Circuit
from circuits.discovery import ACDC, EAP, EAPIG, METHODS, Found, Method, eap_ig
from circuits.engine import Engine
from circuits.evaluation.areas import Rankings
from circuits.evaluation.figures import RANDOM_PER_SIZE, figures
from circuits.extraction import Extraction, choose, extract
from circuits.faithfulness import (
    FaithfulnessScale,
    by_metric,
    faithfulness_scale,
    under_each_metric,
)
from circuits.metrics import METRICS
from circuits.model.load import ModelConfig, load_model
from circuits.objective import prepare
from circuits.prompts import Prompts, prompts_from_records
from circuits.selection import (
    Selection,
    _greedily,
    random_circuits,
    ranking,
    select,
    sizes,
)
from circuits.tasks import induction
from tests import tiny
from tests.budget import memory_for

ENGINE = Engine(tiny.gpt2(n_embd=8, n_head=2))
GRAPH = ENGINE.graph
DISCOVERY, EVALUATION = (
    prompts_from_records(tiny.with_own_answers(ENGINE, tiny.records(12, seed, longest=7)))
    for seed in (1, 2)
)
MEMORY = memory_for(
    5, ENGINE, DISCOVERY, fit_ablation(AblationConfig("counterfactual"), ENGINE, DISCOVERY)
)
TIMES = ("seconds", "forwards", "batched_runs", "candidates")  # what memory decides


def run(method=None, selection: Selection | None = None, **changes) -> Extraction:
    arguments = {"metric": "kl", "random_draws": 3, "memory": MEMORY, **changes}
    return extract(
        ENGINE,
        DISCOVERY,
        EVALUATION,
        method or EAPIG(),
        selection=selection or Selection(),
        **arguments,
    )


def scale(
    prompts: Prompts = DISCOVERY, metric: str = "kl", ablation: str = "counterfactual"
) -> FaithfulnessScale:
    fitted = fit_ablation(AblationConfig(ablation), ENGINE, DISCOVERY)
    return faithfulness_scale(prepare(ENGINE, prompts, METRICS[metric], fitted))


def scored() -> Found:
    return eap_ig(EAPIG(), scale().objective)


def in_one_order(found: Found) -> Rankings:
    ranked = ranking(GRAPH, found.scores)
    return Rankings(ranked, ranked, ranked)


# ---- the whole of it -----------------------------------------------------------------------------


def test_an_extraction_is_discovery_selection_and_evaluation(tmp_path):
    about = {
        "model": {"path": "memory", "weight_hash": ENGINE.model.weight_hash},
        "task": {"name": "random"},
    }
    result = run(selection=Selection(edges=20, absolute=True), about=about)
    kept = select(GRAPH, scored().scores, edges=20, absolute=True)
    circuit, metrics = result.circuit, result.metrics
    assert torch.equal(circuit.kept, kept) and 0 < kept.sum() <= 20
    torch.testing.assert_close(circuit.scores, scored().scores)
    assert metrics["edges_total"] == 46 and metrics["edges_kept"] == len(circuit) == int(kept.sum())
    held_out = scale(EVALUATION)
    own = held_out.faithfulness(kept)
    assert (
        metrics["faithfulness"]
        == metrics["faithfulness_detail"]["value"]
        == pytest.approx(own.value)
    )
    assert (
        metrics["kl"]
        == pytest.approx(own.circuit)
        == pytest.approx(metrics["faithfulness_detail"]["circuit"])
    )
    assert metrics["faithfulness_detail"]["n_prompts"] == 12
    assert metrics["seconds"] > 0 and metrics["forwards"] > 0
    assert circuit.about == {
        **about,
        "method": {"name": "eap_ig", "rule": "plain", "steps": 5},
        "metric": "kl",
        "ablation": {"name": "counterfactual", "seed": 0, "steps": 300},
        "selection": {
            "how": "greedy",
            "edges": 20,
            "units": None,
            "share": None,
            "faithfulness": 0.9,
            "threshold": None,
            "absolute": True,
        },
        "splits": {
            "discovery": {"prompts": 12, "hash": DISCOVERY.hash()},
            "evaluation": {"prompts": 12, "hash": EVALUATION.hash()},
        },
    }
    json.dumps(metrics, allow_nan=False)  # metrics.json takes it as it is
    circuit.save(tmp_path)
    again = Circuit.load(tmp_path)
    assert (
        again.about == circuit.about
        and torch.equal(again.kept, kept)
        and torch.equal(again.scores, circuit.scores)
    )


def test_the_curve_and_the_random_circuits_are_measured_on_the_evaluation_prompts():
    selection = Selection(edges=20)
    result, held_out, found = run(selection=selection), scale(EVALUATION), scored()
    curve = {}
    for wanted in sizes(GRAPH):
        mask = select(GRAPH, found.scores, edges=wanted, absolute=True)
        curve[int(mask.sum())] = held_out.faithfulness(mask).value
    points = {point["edges"]: point["faithfulness"] for point in result.metrics["curve"]}
    assert points == pytest.approx(curve, rel=1e-6, abs=1e-9)
    assert points[46] == pytest.approx(1)
    chance = result.metrics["random_circuits"]
    assert chance["count"] == 3
    assert chance["mean"] <= chance["best"] and chance["percentile_95"] <= chance["best"]


@pytest.mark.parametrize(
    ("method", "selection"), [(EAPIG(steps=2), Selection(edges=20)), (ACDC(tau=0.05), Selection())]
)
def test_an_extraction_is_repeatable(method, selection):
    one, other = (run(method, selection) for _ in range(2))
    assert torch.equal(one.circuit.kept, other.circuit.kept) and torch.equal(
        one.circuit.scores, other.circuit.scores
    )
    assert one.circuit.about == other.circuit.about
    without_times = [{k: v for k, v in e.metrics.items() if k not in TIMES} for e in (one, other)]
    assert without_times[0] == without_times[1]
    reseeded = run(method, selection, seed=1)
    assert torch.equal(reseeded.circuit.kept, one.circuit.kept), (
        "the seed is that of the random circuits"
    )
    assert reseeded.metrics["random_circuits"] != one.metrics["random_circuits"]


@pytest.mark.parametrize(
    "ablation", ["counterfactual", pytest.param("mean", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("method", "selection"), [(EAPIG(steps=2), Selection(edges=20)), (ACDC(tau=0.05), Selection())]
)
def test_an_extraction_does_not_depend_on_the_memory(method, selection, ablation):
    config = AblationConfig(ablation)
    little = memory_for(1, ENGINE, DISCOVERY, fit_ablation(config, ENGINE, DISCOVERY))
    few, everything = (
        run(method, selection, ablation=config, memory=memory) for memory in (little, "2GB")
    )
    assert torch.equal(few.circuit.kept, everything.circuit.kept)
    torch.testing.assert_close(few.circuit.scores, everything.circuit.scores, atol=1e-6, rtol=1e-4)
    pairs = zip(numbers(few.metrics), numbers(everything.metrics), strict=True)
    for (name, one), (same, other) in pairs:
        assert name == same and one == pytest.approx(other, rel=1e-6, abs=1e-9), name


def numbers(data, name: str = "") -> list[tuple[str, float]]:
    """All numbers but times in a tree, with their paths."""
    if isinstance(data, dict):
        return [
            found
            for key in data
            if key not in TIMES
            for found in numbers(data[key], f"{name}.{key}")
        ]
    if isinstance(data, list):
        return [
            found for place, value in enumerate(data) for found in numbers(value, f"{name}.{place}")
        ]
    return [(name, data)] if isinstance(data, int | float) else []


def test_the_full_circuit_is_faithful_and_the_empty_one_is_not():
    full = run(selection=Selection(edges=46)).metrics
    assert full["edges_kept"] == 46
    assert full["faithfulness"] == pytest.approx(1, abs=1e-9) and full["kl"] == pytest.approx(
        0, abs=1e-9
    )
    assert all(entry["value"] == pytest.approx(1, abs=1e-9) for entry in full["by_metric"].values())
    empty = run(ACDC(tau=1e9)).metrics
    assert empty["edges_kept"] == 0 and empty["faithfulness"] == pytest.approx(0, abs=1e-9)
    assert empty["kl"] == pytest.approx(empty["faithfulness_detail"]["empty"])
    assert empty["random_circuits"] == {
        "count": 0,
        "mean": None,
        "percentile_95": None,
        "best": None,
    }


def test_means_are_those_of_the_discovery_prompts_on_both_sets():
    result = run(selection=Selection(edges=20), ablation=AblationConfig("mean"))
    expected, others = (writer_means(ENGINE, prompts) for prompts in (DISCOVERY, EVALUATION))
    assert result.ablation.means is not None and not torch.allclose(expected.rest, others.rest)
    torch.testing.assert_close(result.ablation.means.rest, expected.rest)
    own = scale(EVALUATION, ablation="mean").faithfulness(
        result.circuit.kept
    )  # fitted on the discovery prompts
    assert result.metrics["faithfulness"] == pytest.approx(own.value)


def test_a_method_that_decides_itself_needs_no_selection():
    with pytest.raises(ValueError, match="selection.edges=1, but method acdc decides itself"):
        run(ACDC(tau=0.05), Selection(edges=1))
    result = run(ACDC(tau=0.05), Selection())
    assert result.circuit.about["selection"] is None
    assert result.metrics["edges_kept"] > 1
    assert result.metrics["method"]["runs"] <= 46


def test_the_known_circuit_of_the_induction_model(cases):
    model = load_model(ModelConfig(str(cases / "gbmi_induction_2L1H" / "indhead_l_2_2.pt")))
    engine = Engine(model, split_input=True)
    records = induction.generate(induction.Induction(), 120, seed=0)
    parts = prompts_from_records(records).split({"discovery": 60, "evaluation": 60}, seed=0)
    result = extract(
        engine,
        parts["discovery"],
        parts["evaluation"],
        EAPIG(),
        metric="kl",
        ablation=AblationConfig("mean"),
        selection=Selection(edges=7),
        random_draws=5,
    )
    known = {
        "input.token->a0.h0<v>",
        "input.position->a0.h0<q>",
        "input.position->a0.h0<k>",
        "a0.h0->a1.h0<k>",
        "input.token->a1.h0<q>",
        "input.token->a1.h0<v>",
        "a1.h0->logits",
    }
    assert {name for name, _ in result.circuit.edges} == known
    assert result.metrics["faithfulness"] > 0.99 > result.metrics["random_circuits"]["best"]
    assert set(result.metrics["by_metric"]) == set(METRICS)


# ---- how many edges ------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.3, 0.7, 0.95])
def test_the_smallest_circuit_is_found_up_a_ladder_and_by_halving(target):
    """Sizes are tried in order, so a lucky small circuit would win, as it should."""
    ours, found = scale(), scored()

    def reaches(edges: int) -> bool:
        kept = select(GRAPH, found.scores, edges=edges, absolute=True)
        return ours.faithfulness(kept).value >= target

    high = min(size for size in sizes(GRAPH) if reaches(size))
    low = max((size for size in sizes(GRAPH) if size < high), default=0)
    while high - low > 1:
        low, high = (
            (low, (low + high) // 2)
            if reaches((low + high) // 2)
            else (
                (low + high) // 2,
                high,
            )
        )
    kept = choose(ours, found, Selection(faithfulness=target, absolute=True))
    assert torch.equal(kept, select(GRAPH, found.scores, edges=high, absolute=True))


def test_a_target_that_only_the_whole_model_reaches_is_refused():
    ours, found = scale(), scored()
    with pytest.raises(ValueError, match="only all 46 edges reach selection.faithfulness=0.99999"):
        choose(ours, found, Selection(faithfulness=0.99999, absolute=True))


def test_edges_that_score_0_are_in_no_circuit_that_reaches_a_target():
    ours, found = scale(), scored()
    silent = GRAPH.writer_index["m1"]
    scores = found.scores.clone()
    scores[:, silent] = 0
    low = replace(found, scores=-scores)  # every true supporter now ranks below 0
    kept = choose(ours, low, Selection(faithfulness=0.2, absolute=False))
    assert kept.any() and not kept[:, silent].any()


@pytest.mark.parametrize(
    ("method", "metric", "absolute"),
    [(EAPIG(), "kl", True), (EAPIG(), "logit_diff", False), (EAP(), "logit_diff", False)],
)
def test_ranking_goes_by_size_where_the_metric_is_best_at_the_model(method, metric, absolute):
    result = run(method, Selection(edges=20), metric=metric, accept_worse=True)
    assert result.circuit.about["selection"]["absolute"] is absolute
    kept = select(GRAPH, result.circuit.scores, edges=20, absolute=absolute)
    assert torch.equal(result.circuit.kept, kept)


def test_a_circuit_that_is_worse_than_none_by_another_metric_is_refused_unless_it_is_wanted():
    held_out = scale(EVALUATION, "prob_diff").objective

    def t_of_the_gap(higher: torch.Tensor, lower: torch.Tensor) -> float:
        gap = (higher - lower).double()
        return (gap.mean() / (gap.std() / len(gap) ** 0.5)).item()

    def t_of_the_loss(kept: torch.Tensor) -> float:
        return t_of_the_gap(held_out.empty(), held_out.measure(kept))

    worst = max(random_circuits(GRAPH, 3, 20, 0), key=t_of_the_loss)
    assert t_of_the_loss(worst) > 2 and t_of_the_gap(held_out.full(), held_out.empty()) > 2
    found = Found(worst.float(), worst)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "eap_ig", Method(EAPIG, lambda *_: found, decides=True))
        with pytest.raises(ValueError, match=r"by prob_diff the circuit of \d+ edges .* is worse"):
            run()
        result = run(accept_worse=True)
    assert result.metrics["worse_than_none"] == ["prob_diff"]
    assert torch.equal(result.circuit.kept, worst)


def test_a_target_that_no_circuit_reaches_is_refused_with_the_best_one():
    ours, found = scale(), scored()
    reached = {
        n: ours.faithfulness(select(GRAPH, found.scores, edges=n, absolute=False)).value
        for n in sizes(GRAPH)
    }
    best = max(reached.values())
    with pytest.raises(
        ValueError,
        match=rf"no circuit reaches selection.faithfulness={best + 0.1}.*best is {best:.3f}",
    ):
        choose(ours, found, Selection(faithfulness=best + 0.1))


@pytest.mark.parametrize(
    ("selection", "arguments"),
    [
        (Selection(edges=9), {"how": "greedy", "edges": 9, "absolute": False}),
        (
            Selection(how="top_n", edges=9, absolute=True),
            {"how": "top_n", "edges": 9, "absolute": True},
        ),
        (
            Selection(share=0.25),
            {"how": "greedy", "edges": 12, "absolute": False},
        ),  # of 46, to the nearest
        (Selection(share=1e-6), {"how": "greedy", "edges": 1, "absolute": False}),
        (Selection(share=1.0), {"how": "greedy", "edges": 46, "absolute": False}),
        (
            Selection(how="threshold", threshold=0.01),
            {"how": "threshold", "threshold": 0.01, "absolute": False},
        ),
    ],
)
def test_a_selection_by_number_share_or_threshold(selection, arguments):
    found = scored()
    assert torch.equal(choose(scale(), found, selection), select(GRAPH, found.scores, **arguments))


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(edges=3, share=0.5), "selection has edges and share; give one of them"),
        (Selection(edges=3, threshold=0.5), "selection has edges and threshold; give one of them"),
        (Selection(share=0.0), "selection.share=0.0, but it must be above 0 and at most 1"),
        (Selection(share=1.5), "selection.share=1.5, but"),
        (Selection(edges=47), "edges=47, but the graph has 46 edges"),
        (
            Selection(faithfulness=None),
            "selection needs one of edges, units, share, threshold or faithfulness",
        ),
        (Selection(how="threshold"), "how=threshold needs threshold=VALUE"),
        (Selection(how="threshold", edges=3), "how=threshold needs threshold=VALUE"),
        (
            Selection(threshold=0.5),
            "selection.threshold=0.5 is used by how=threshold only, not by how=greedy",
        ),
        (Selection(how="best"), "how='best', but the selections are"),
    ],
)
def test_contradictory_selections_are_refused(selection, message):
    with pytest.raises(ValueError, match=message):
        choose(scale(), scored(), selection)


# ---- by metric -----------------------------------------------------------------------------------


def test_faithfulness_by_metric_is_that_of_each_metric(caplog):
    ours, kept = scale(), select(GRAPH, scored().scores, edges=20)
    with caplog.at_level(logging.INFO, "circuits.faithfulness"):
        results = by_metric(ours, under_each_metric(ours.objective, kept))
    assert {"kl", "logit_diff"} <= set(results)
    for name in METRICS:
        if name in results:
            assert results[name] == scale(metric=name).faithfulness(kept)
        else:
            with pytest.raises(ValueError):
                scale(metric=name)
            assert f"no faithfulness under {name}" in caplog.text


def test_metrics_that_need_answers_are_left_out_without_them():
    bare = prompts_from_records(
        [{k: r[k] for k in ("clean", "corrupt", "positions")} for r in tiny.records(12, 1)]
    )
    metrics = figures(scale(bare), GRAPH.exists, in_one_order(scored()), random_draws=1)
    assert set(metrics["by_metric"]) == {"kl"}


# ---- nothing is computed twice -------------------------------------------------------------------


@pytest.mark.parametrize("draws", [0, 3])
def test_an_order_is_computed_once_and_sliced_for_all_sizes(draws, monkeypatch):
    """One order of the circuit's own, and one for each random circuit and each random curve."""
    found, held_out, orders = scored(), scale(EVALUATION), []

    def counted(graph, rank):
        orders.append(rank)
        return _greedily(graph, rank)

    monkeypatch.setattr("circuits.selection._greedily", counted)
    ranked = in_one_order(found)
    metrics = figures(held_out, ranked.own.circuit(20), ranked, random_draws=draws)
    assert len(metrics["curve"]) > 10
    assert len(orders) == 1 + draws + min(RANDOM_PER_SIZE, draws)


def test_the_circuit_is_run_once_for_all_metrics(monkeypatch):
    held_out, kept = scale(EVALUATION, metric="logit_diff"), GRAPH.exists.clone()
    kept[GRAPH.edge_index("input->m1")] = False  # a circuit that is on no ladder
    runs, masked = [], Engine.masked

    def counted(engine, prompts, mask, *arguments, **options):
        runs.append(mask)
        return masked(engine, prompts, mask, *arguments, **options)

    monkeypatch.setattr(Engine, "masked", counted)
    metrics = figures(held_out, kept, in_one_order(scored()), random_draws=0)
    assert {"kl", "logit_diff"} <= set(metrics["by_metric"])
    own = [mask for mask in runs if torch.equal(mask, kept)]
    assert len(own) == len(held_out.objective.batches) == 1


# ---- refusals ------------------------------------------------------------------------------------


def test_overlapping_splits_are_refused_with_their_number():
    both = prompts_from_records([*tiny.records(12, 1, longest=7)[:2], *tiny.records(5, 3)])
    with pytest.raises(
        ValueError, match="2 prompts are in both the discovery and the evaluation split"
    ):
        extract(ENGINE, DISCOVERY, both, EAPIG())


@pytest.mark.parametrize("metric", ["kl", "logit_diff"])
def test_a_metric_that_does_not_separate_is_refused_before_discovery(metric, monkeypatch):
    """Corrupt prompts equal to the clean ones: removing an edge changes nothing."""
    same = [{**record, "corrupt": record["clean"]} for record in tiny.records(12, 1, longest=7)]

    def expensive(*_):
        raise AssertionError("discovery has run")

    monkeypatch.setattr("circuits.extraction.METHODS", {"eap_ig": Method(EAPIG, expensive)})
    with pytest.raises(
        ValueError, match=f"metric {metric} does not separate the model from the ablated model"
    ):
        extract(ENGINE, prompts_from_records(same), EVALUATION, EAPIG(), metric=metric)


def test_what_metric_and_ablation_need_is_asked_for():
    bare = prompts_from_records([{"clean": [1, 2, number]} for number in range(5)])
    with pytest.raises(ValueError, match="ablation=counterfactual needs a corrupt twin"):
        extract(ENGINE, bare, EVALUATION, EAPIG())
    with pytest.raises(ValueError, match="metric logit_diff needs answers"):
        extract(
            ENGINE, bare, EVALUATION, EAPIG(), metric="logit_diff", ablation=AblationConfig("mean")
        )
    with pytest.raises(ValueError, match="metric='loss', but the metrics are"):
        extract(ENGINE, DISCOVERY, EVALUATION, EAPIG(), metric="loss")
    with pytest.raises(ValueError, match="ablation='noise', but the ablations are"):
        extract(ENGINE, DISCOVERY, EVALUATION, EAPIG(), ablation=AblationConfig("noise"))
    with pytest.raises(ValueError, match="metric=kl has zero gradient"):
        extract(ENGINE, DISCOVERY, EVALUATION, EAP())
