"""Cells of the study: AUROC, intervals, flags, combinations and worst cases are what their
definitions say.
"""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score

from mad.detector import Calibration
from mad.study.cells import (
    MAIN,
    Combination,
    Results,
    Scorer,
    Scores,
    best_baseline,
    cells,
    combine,
    compare,
    controls,
    flags,
    oracle,
    read,
    with_combination,
    worst_cases,
    worst_controls,
    worst_false_alarms,
)

STRATA = {
    "normal_iid": ("all",) * 40,
    "normal_shift": ("keys",) * 50,
    "anomaly": ("agree", "disagree", "disagree") * 20,
}
SIZES = {"calibration": 120} | {group: len(names) for group, names in STRATA.items()}


def leave(
    folder: Path, tensors: dict, task="recall_redirect", seed=3, strata=STRATA, **more
) -> Path:
    """Writes a subject's two files; returns the .json."""
    scores = folder / "scores"
    scores.mkdir(parents=True, exist_ok=True)
    record = {
        "task": task,
        "seed": seed,
        "strata": {name: list(own) for name, own in strata.items()},
    }
    (scores / f"{task}-{seed}.json").write_text(
        json.dumps(record | {"circuits": {}, "seconds": {}} | more)
    )
    save_file(tensors, scores / f"{task}-{seed}.safetensors")
    return scores / f"{task}-{seed}.json"


def drawn(
    salt: int, anomaly: float = 1.0, shift: float = 0.0, step: float = 0.0, groups=SIZES
) -> dict:
    """Normal scores, anomalies and shifted normals moved up; `step` rounds, so that there are ties."""
    generator = torch.Generator().manual_seed(salt)
    moved = {"anomaly": anomaly, "normal_shift": shift}
    parts = {
        part: torch.randn(size, generator=generator) + moved.get(part, 0.0)
        for part, size in groups.items()
    }
    return {
        part: (values / step).round() * step if step else values for part, values in parts.items()
    }


def subject(parts: dict, task="recall_redirect", seed=3, strata=STRATA) -> Scores:
    return Scores(
        task,
        seed,
        strata,
        {},
        {k if isinstance(k, Scorer) else Scorer(k): v for k, v in parts.items()},
    )


def named(parts: dict) -> dict:
    """Tensors as they stand in a file."""
    return {
        f"{s}|{c}|{part}": values for (s, c), own in parts.items() for part, values in own.items()
    }


# --- AUROC and intervals
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0.0, 0.5])
def test_auroc_is_that_of_scikit_learn(step):
    parts = drawn(0, step=step)
    found = {cell.place[2:]: cell for cell in cells(Results((subject({"s": parts}),)), draws=0)}
    assert len(found) == 4
    for (regime, stratum), cell in found.items():
        normal = parts[f"normal_{regime}"]
        anomalous = parts["anomaly"][torch.tensor([name == stratum for name in STRATA["anomaly"]])]
        labels = [0] * len(normal) + [1] * len(anomalous)
        assert cell.auroc == pytest.approx(
            roc_auc_score(labels, torch.cat([normal, anomalous]).numpy()), abs=1e-6
        )
        assert (cell.low, cell.high) == (None, None)
        assert (cell.normals, cell.anomalies) == (len(normal), len(anomalous))


def test_intervals_are_those_of_a_slow_bootstrap():
    parts = drawn(1, step=0.25)
    cell = next(
        c
        for c in cells(Results((subject({"s": parts}),)), draws=4000)
        if c.place[2:] == ("shift", "disagree")
    )
    normal = parts["normal_shift"]
    anomalous = parts["anomaly"][torch.tensor([name == "disagree" for name in STRATA["anomaly"]])]
    generator, slow = torch.Generator().manual_seed(5), []
    for _ in range(4000):
        a, n = (
            own[torch.randint(len(own), (len(own),), generator=generator)]
            for own in (anomalous, normal)
        )
        slow.append(((a[:, None] > n).double() + (a[:, None] == n).double() / 2).mean())
    low, high = torch.quantile(
        torch.stack(slow), torch.tensor([0.025, 0.975], dtype=torch.float64)
    ).tolist()
    assert (cell.low, cell.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))
    assert cell.low < cell.auroc < cell.high


def test_draws_do_not_depend_on_what_else_was_scored():
    alone = cells(Results((subject({"s": drawn(0)}),)), draws=50)
    other = subject({"s": drawn(1)}, seed=4)
    beside = cells(Results((other, subject({"a": drawn(2), "s": drawn(0)}))), draws=50)
    assert set(alone) < set(beside)
    assert alone != cells(Results((subject({"s": drawn(0)}),)), draws=50, seed=1)
    with pytest.raises(ValueError, match="draws=-1"):
        cells(Results((subject({"s": drawn(0)}),)), draws=-1)


def test_a_perfect_score_has_no_interval_beyond_one():
    found = cells(Results((subject({"s": drawn(0, anomaly=100.0)}),)), draws=20)
    assert {(cell.auroc, cell.low, cell.high) for cell in found} == {(1.0, 1.0, 1.0)}


def test_a_task_without_anomalies_has_no_cells_but_flags():
    strata = {"normal_iid": ("all",) * 40, "normal_shift": ("keys", "slot") * 25}
    parts = {part: values for part, values in drawn(0).items() if part != "anomaly"}
    results = Results((subject({"s": parts}, task="shift_only", strata=strata),))
    assert cells(results) == ()
    assert {(flag.group, flag.stratum) for flag in flags(results)} == {
        ("normal_iid", "all"),
        ("normal_shift", "keys"),
        ("normal_shift", "slot"),
    }


# --- flags
# ------------------------------------------------------------------------------------------------------


def test_flags_by_hand():
    strata = {
        "normal_iid": ("all",) * 4,
        "normal_shift": ("keys", "keys", "days", "days"),
        "anomaly": ("agree",) * 2,
    }
    parts = {
        "calibration": torch.arange(1.0, 100.0),  # 99 scores, 1 to 99: p(s) = (1 + #{>= s}) / 100
        "normal_iid": torch.tensor([0.0, 50.0, 99.0, 99.5]),  # p = 1, .51, .02, .01
        "normal_shift": torch.tensor([99.5, 99.5, 96.0, 95.0]),  # p = .01, .01, .05, .06
        "anomaly": torch.tensor([100.0, 3.0]),
    }
    found = flags(Results((subject({"s": parts}, strata=strata),)))
    shares = {(flag.group, flag.stratum, flag.alpha): flag.share for flag in found}
    assert shares == {
        ("normal_iid", "all", 0.01): 0.25,
        ("normal_iid", "all", 0.05): 0.5,
        ("normal_shift", "keys", 0.01): 1.0,
        ("normal_shift", "keys", 0.05): 1.0,
        ("normal_shift", "days", 0.01): 0.0,
        ("normal_shift", "days", 0.05): 0.5,
        ("anomaly", "agree", 0.01): 0.5,
        ("anomaly", "agree", 0.05): 0.5,
    }
    worst = worst_false_alarms(found, 0.01)[Scorer("s")]
    assert (worst.stratum, worst.share, worst.prompts) == ("keys", 1.0, 2)


def test_too_few_to_calibrate_on():
    with pytest.raises(ValueError, match=r"s on recall_redirect-3: alpha=0.01 needs at least 99"):
        flags(Results((subject({"s": drawn(0, groups=SIZES | {"calibration": 98})}),)))


def test_random_controls_are_not_flagged_and_get_no_intervals():
    random = Scorer("s", f"random0 of {MAIN}")
    results = Results((subject({Scorer("s", MAIN): drawn(0), random: drawn(1)}),))
    assert {flag.scorer for flag in flags(results)} == {Scorer("s", MAIN)}
    assert {cell.low is None for cell in cells(results, draws=9) if cell.scorer == random} == {True}


# --- combinations
# -----------------------------------------------------------------------------------------------


def test_combinations_by_hand():
    first = {"calibration": torch.tensor([1.0, 2.0, 3.0]), "anomaly": torch.tensor([2.0, 9.0])}
    second = {"calibration": torch.tensor([3.0, 1.0, 2.0]), "anomaly": torch.tensor([0.0, 9.0])}
    # Both (1 + others >= it) / 4.
    expected = {
        "fisher": {
            "calibration": [
                -math.log(3 / 4 * 1 / 4),
                -math.log(2 / 4 * 3 / 4),
                -math.log(1 / 4 * 2 / 4),
            ],
            "anomaly": [-math.log(3 / 4 * 4 / 4), -math.log(1 / 4 * 1 / 4)],
        },
        "minimum": {
            "calibration": [-math.log(1 / 4), -math.log(2 / 4), -math.log(1 / 4)],
            "anomaly": [-math.log(3 / 4), -math.log(1 / 4)],
        },
    }
    for how, parts in expected.items():
        found = combine([first, second], how)
        assert {part: values.tolist() for part, values in found.items()} == {
            part: pytest.approx(values, abs=1e-6) for part, values in parts.items()
        }


def test_one_score_alone_keeps_its_order_and_its_p_values_to_one_rank():
    parts = drawn(0)
    for how in ("fisher", "minimum"):
        alone = combine([parts], how)
        for part in ("normal_iid", "anomaly"):
            mine = Calibration.of(alone["calibration"]).p_values(alone[part])
            own = Calibration.of(parts["calibration"]).p_values(parts[part])
            assert torch.allclose(mine, (own + 1 / 121).clamp(max=1.0))


@pytest.mark.parametrize("how", ["fisher", "minimum"])
@pytest.mark.parametrize("dependence", [0.0, 0.9])
def test_combined_p_values_are_uniform_where_nothing_is_anomalous(how, dependence):
    values = []
    for salt in range(400):
        generator = torch.Generator().manual_seed(salt)
        common = torch.randn(499, generator=generator)
        rows = [
            dependence * common + (1 - dependence) * torch.randn(499, generator=generator)
            for _ in range(3)
        ]
        combined = combine(
            [{"calibration": row[:399], "normal_iid": row[399:]} for row in rows], how
        )
        values.append(Calibration.of(combined["calibration"]).p_values(combined["normal_iid"]))
    together = torch.cat(values)
    for alpha in (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9):
        spread = 3 * math.sqrt(
            alpha * (1 - alpha) * (1 / 399 + 1 / 100) / 400
        )  # of calibrations and of prompts
        share = (together <= alpha).double().mean().item()
        assert alpha - 4 / 400 - spread <= share <= alpha + spread, (alpha, share)


def test_a_mean_is_of_the_scores_themselves():
    first, second = drawn(0), drawn(1)
    together = combine([first, second], "mean")
    assert all(torch.equal(together[name], (first[name] + second[name]) / 2) for name in first)


def test_combinations_are_refused():
    parts = drawn(0)
    with pytest.raises(ValueError, match="how='sum'.*fisher, minimum or mean"):
        combine([parts], "sum")
    with pytest.raises(ValueError, match="0 scores"):
        combine([], "fisher")
    with pytest.raises(ValueError, match="parts calibration, but the first"):
        combine([parts, {"calibration": parts["calibration"]}], "fisher")


def test_combination_at_every_circuit_that_its_members_have():
    known = {
        Scorer("a", MAIN): drawn(0),
        Scorer("b", MAIN): drawn(1),
        Scorer("c"): drawn(2),
        Scorer("a", "x"): drawn(3),
        Scorer("a", f"random0 of {MAIN}"): drawn(4),
        Scorer("b", f"random0 of {MAIN}"): drawn(5),
    }
    results = Results((subject(known),))

    def made(*members) -> dict:
        own = with_combination(results, Combination("all", members)).subjects[0].parts
        return {scorer.circuit: parts for scorer, parts in own.items() if scorer.score == "all"}

    assert set(made("a", "b", "c")) == {MAIN, f"random0 of {MAIN}"}
    expected = combine(
        [known[Scorer("c")], known[Scorer("a", MAIN)], known[Scorer("b", MAIN)]], "fisher"
    )
    assert all(
        torch.allclose(made("a", "b", "c")[MAIN][part], values) for part, values in expected.items()
    )
    assert set(made("c")) == {"none"}
    assert set(made(Scorer("a", "x"), Scorer("a", MAIN))) == {"several"}
    assert set(made(Scorer("a", "x"), "b")) == {MAIN, f"random0 of {MAIN}"}
    with pytest.raises(ValueError, match="0 subjects with all of a, d"):
        made("a", "d")
    with pytest.raises(ValueError, match="there is a score 'a' already"):
        with_combination(results, Combination("a", ("b",)))


# --- worst cases
# ------------------------------------------------------------------------------------------------


def test_worst_case_best_baseline_oracle_and_controls():
    first = {
        Scorer("good", MAIN): drawn(0, 3.0),
        Scorer("steady"): drawn(1, 1.5),
        Scorer("fickle"): drawn(2, 4.0),
        Scorer("rare"): drawn(3, 5.0),
        Scorer("d_layer_0"): drawn(4, 5.0),
        Scorer("d_layer_1"): drawn(5, 0.0),
        **{Scorer("good", f"random{k} of {MAIN}"): drawn(10 + k, float(k)) for k in range(5)},
    }
    second = {
        Scorer("good", MAIN): drawn(6, 3.0),
        Scorer("steady"): drawn(7, 1.5),
        Scorer("fickle"): drawn(8, 4.0, shift=6.0),
        Scorer("d_layer_0"): drawn(9, 0.0),
        Scorer("d_layer_1"): drawn(10, 5.0),
        **{Scorer("good", f"random{k} of {MAIN}"): drawn(20 + k, float(k)) for k in range(5)},
    }
    results = Results((subject(first), subject(second, seed=4)))
    found = cells(results, draws=0)
    worst = worst_cases(found)
    assert (worst[Scorer("fickle")].seed, worst[Scorer("fickle")].regime) == (4, "shift")
    for scorer in (Scorer("good", MAIN), Scorer("steady"), Scorer("fickle")):
        assert worst[scorer].auroc == min(cell.auroc for cell in found if cell.scorer == scorer)
    # `rare` is missing on one model, and a single layer is no baseline.
    assert best_baseline(found) == Scorer("steady")
    assert best_baseline([cell for cell in found if cell.seed == 3]) == Scorer("rare")
    with pytest.raises(ValueError, match="0 baselines were computed in all 8 places"):
        best_baseline([cell for cell in found if cell.score in ("good", "rare")])

    best = oracle(found)
    assert {(cell.score, cell.circuit) for cell in best} == {("d_best_layer", "oracle")} and len(
        best
    ) == 8
    for cell in best:
        layers = [c.auroc for c in found if c.place == cell.place and c.score.startswith("d_layer")]
        assert cell.auroc == max(layers)
    assert worst_cases(best)[Scorer("d_best_layer", "oracle")].auroc > 0.98
    assert max(worst[Scorer(f"d_layer_{n}")].auroc for n in (0, 1)) < 0.6

    place = ("recall_redirect", 3, "iid", "agree")
    randoms = [c.auroc for c in found if c.place == place and c.scorer.control_of == MAIN]
    control = controls(found)[Scorer("good", MAIN), place]
    assert (control.mean, control.low, control.high, control.circuits) == (
        pytest.approx(sum(randoms) / 5),
        min(randoms),
        max(randoms),
        5,
    )
    own = [worst[Scorer("good", f"random{k} of {MAIN}")].auroc for k in range(5)]
    assert worst_controls(found)[Scorer("good", MAIN)].mean == pytest.approx(sum(own) / 5)
    assert results.select(seeds=[4]).subjects == results.subjects[1:]
    with pytest.raises(
        ValueError, match=r"0 subjects with tasks=None and seeds=\[9\]; there are recall_redirect-3"
    ):
        results.select(seeds=[9])


def test_difference_of_worst_cases():
    def results(ours: float, theirs: float) -> Results:
        known = [
            (seed, {"ours": drawn(seed, ours), "theirs": drawn(seed + 9, theirs)})
            for seed in (3, 4)
        ]
        return Results(tuple(subject(parts, seed=seed) for seed, parts in known))

    better = compare(results(3.0, 0.5), Scorer("ours"), Scorer("theirs"))
    assert better.difference == better.ours.auroc - better.theirs.auroc
    assert 0 < better.low < better.difference < better.high and better.above == 1.0
    worse = compare(results(3.0, 0.5), Scorer("theirs"), Scorer("ours"))
    assert (worse.low, worse.high) == (pytest.approx(-better.high), pytest.approx(-better.low))
    same = compare(results(1.0, 1.0), Scorer("ours"), Scorer("ours"))
    assert (same.difference, same.low, same.high, same.above) == (
        0.0,
        0.0,
        0.0,
        0.0,
    )  # the same prompts for both
    assert compare(results(3.0, 0.5), Scorer("ours"), Scorer("theirs")) == better


def test_difference_is_that_of_a_slow_bootstrap():
    parts = {"ours": drawn(0, 1.2, shift=0.3), "theirs": drawn(1, 0.8)}
    found = compare(Results((subject(parts),)), Scorer("ours"), Scorer("theirs"), draws=3000)
    generator, slow = torch.Generator().manual_seed(3), []
    kind = torch.tensor([name == "agree" for name in STRATA["anomaly"]])
    groups = [torch.arange(40), torch.arange(50), kind.nonzero()[:, 0], (~kind).nonzero()[:, 0]]
    for _ in range(3000):
        iid, shift, *strata = [
            own[torch.randint(len(own), (len(own),), generator=generator)] for own in groups
        ]
        worst = []
        for own in (parts["ours"], parts["theirs"]):
            normals = (own["normal_iid"][iid], own["normal_shift"][shift])
            worst.append(
                min(
                    (own["anomaly"][a][:, None] > n).double().mean()
                    for a in strata
                    for n in normals
                )
            )
        slow.append(worst[0] - worst[1])
    low, high = torch.quantile(
        torch.stack(slow), torch.tensor([0.025, 0.975], dtype=torch.float64)
    ).tolist()
    assert (found.low, found.high) == (
        pytest.approx(low, abs=0.015),
        pytest.approx(high, abs=0.015),
    )


def test_comparisons_are_refused():
    first, second = subject({"a": drawn(0), "b": drawn(1)}), subject({"a": drawn(2)}, seed=4)
    with pytest.raises(ValueError, match="b has no scores on recall_redirect-4"):
        compare(Results((first, second)), Scorer("a"), Scorer("b"))
    with pytest.raises(ValueError, match="draws=1"):
        compare(Results((first,)), Scorer("a"), Scorer("b"), draws=1)
    with pytest.raises(ValueError, match="0 subjects with anomalies"):
        compare(Results(()), Scorer("a"), Scorer("b"))


# --- reading
# ----------------------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_left(tmp_path):
    one, two = drawn(0), drawn(1)
    leave(tmp_path, named({("a", "none"): one, ("b", MAIN): two}))
    leave(tmp_path, named({("a", "none"): two}), seed=4)
    (tmp_path / "scores" / "recall_redirect-5.ready").write_text("of a run that goes on")
    results = read(tmp_path)
    assert [subject.name for subject in results.subjects] == [
        "recall_redirect-3",
        "recall_redirect-4",
    ]
    assert results.scorers == (Scorer("a"), Scorer("b", MAIN))
    assert results.subjects[0].strata == STRATA
    assert all(
        torch.equal(values, two[part])
        for part, values in results.subjects[0].parts[Scorer("b", MAIN)].items()
    )


def test_recipes_that_come_to_the_same_are_read_under_both_names(tmp_path):
    positions, edges = "positions-mean-0.01", "edges-mean-0.01"
    known = {
        ("s", name): drawn(salt)
        for salt, name in enumerate((positions, edges, f"random0 of {edges}"))
    }
    apart = {positions: {"edges": 5, "edges_total": 90}, edges: {"edges": 4, "edges_total": 9}}
    leave(tmp_path, named(known), circuits=apart)
    other = "positions-resample-0.003"
    alike = {edges: {"edges": 3, "edges_total": 7}, other: {"edges": 2, "edges_total": 7}}
    leave(tmp_path, named({("s", edges): drawn(7), ("s", other): drawn(8)}), seed=4, circuits=alike)
    first, second = read(tmp_path).subjects
    assert set(first.parts) == {Scorer(*key) for key in known}
    # edges-resample-0.003 is nobody's, so nothing is named so.
    assert set(second.parts) == {Scorer("s", name) for name in (positions, edges, other)}
    assert second.parts[Scorer("s", positions)] is second.parts[Scorer("s", edges)]
    assert second.about["circuits"][positions] == alike[edges]


def test_nothing_or_half_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="scores holds no scores"):
        read(tmp_path)
    about = leave(tmp_path, named({("a", "none"): drawn(0)}))
    about.rename(tmp_path / "kept")
    with pytest.raises(
        FileNotFoundError, match=r"recall_redirect-3\.json is missing: the subject is unfinished"
    ):
        read(tmp_path)
    (tmp_path / "kept").rename(about)
    about.with_suffix(".safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"recall_redirect-3\.safetensors is missing"):
        read(tmp_path)


def test_pickles_are_refused(tmp_path):
    about = leave(tmp_path, named({("a", "none"): drawn(0)}))
    about.with_suffix(".safetensors").write_bytes(pickle.dumps({"a|none|calibration": [1.0]}))
    with pytest.raises(ValueError, match=r"recall_redirect-3\.safetensors is no safetensors file"):
        read(tmp_path)
    torch.save({}, tmp_path / "scores" / "more.pt")
    with pytest.raises(ValueError, match=r"more\.pt may hold code"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"recall_redirect-3\.json is no record of a subject"),
        ("[]", "is no record of a subject"),
        ('{"task": "recall_redirect", "seed": 3}', "is no record of a subject.*strata"),
        ('{"task": "recall_redirect", "seed": 4, "strata": {}}', "name it recall_redirect-4.json"),
        ('{"task": "recall_redirect", "seed": 3, "strata": {"new": []}}', "has a group 'new'"),
        (
            '{"task": "recall_redirect", "seed": 3, "strata": {"normal_iid": ["all"]}}',
            "0 prompts in normal_shift",
        ),
    ],
)
def test_broken_records_are_refused(tmp_path, text, message):
    leave(tmp_path, named({("a", "none"): drawn(0)})).write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a|none|elsewhere": torch.zeros(3)}, "has a tensor 'a|none|elsewhere'"),
        ({"a|none": torch.zeros(3)}, "names are SCORE"),
        ({"a|none|anomaly": torch.zeros(60, dtype=torch.float64)}, r"is torch\.float64 \(60,\)"),
        ({"a|none|anomaly": torch.zeros(60, 1)}, r"\(60, 1\); it must be a row of float32"),
        ({"a|none|anomaly": torch.zeros(59)}, "has 59 scores for 60 prompts"),
        ({"b|none|calibration": torch.zeros(7)}, "has 7 scores for 120 prompts"),
        (
            {"a|none|anomaly": torch.full((60,), torch.nan)},
            r"60 of 60 scores of 'a\|none\|anomaly' are not finite",
        ),
        ({"b|none|calibration": torch.zeros(120)}, r"has no b\|none\|normal_iid"),
    ],
)
def test_broken_tensors_are_refused(tmp_path, change, message):
    leave(tmp_path, named({("a", "none"): drawn(0)}) | change)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)
