"""Tables and pictures of the study hold the numbers that were measured, and come out the same
again.
"""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import save_file

from mad.study.cells import MAIN, Combination, Results, Scorer, read
from mad.study.pictures import draw_agree, draw_false_alarms, draw_grid, draw_worst
from mad.study.report import (
    FILES,
    Summary,
    circuit_tables,
    flag_table,
    full_table,
    grid,
    headline,
    parse_recipe,
    summarise,
    trusted_inputs,
    write,
)

OTHER, FEW = "edges-mean-0.01", f"{MAIN}-n10"
# How far anomalies lie beyond normals, and shifted normals beyond others.
SCORES = {
    ("routing", MAIN): (3.0, 0.0),
    ("routing", OTHER): (2.0, 0.0),
    ("routing", FEW): (1.0, 0.0),
    **{("routing", f"random{k} of {MAIN}"): (0.3, 0.0) for k in range(5)},
    ("output_kl", MAIN): (1.5, 0.5),
    ("steady", "none"): (2.0, 0.5),
    ("distance_mean", "none"): (5.0, 6.0),
    ("distance_layer_0", "none"): (5.0, 6.0),
    ("distance_layer_1", "none"): (5.0, 1.0),
}
TASKS = {
    ("recall_redirect", 3): (("keys",), ("agree", "disagree", "disagree")),
    ("recall_redirect", 4): (("keys",), ("agree", "disagree", "disagree")),
    ("shift_only", 3): (("keys", "slot"), None),
    ("pronoun_departure", 3): (("names", "both"), ("two_people disagree", "corrected agree")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A made-up study: two models of one task, one without anomalies, and a natural one."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "scores").mkdir()
    generator = torch.Generator().manual_seed(0)
    for (task, seed), (novelties, kinds) in TASKS.items():
        strata = {
            "normal_iid": ["all"] * 60,
            "normal_shift": [novelties[i % len(novelties)] for i in range(60)],
        }
        if kinds is not None:
            strata["anomaly"] = [kinds[i % len(kinds)] for i in range(60)]
        tensors = {}
        for (score, circuit), (anomaly, shift) in SCORES.items():
            for part, size in {
                "calibration": 150,
                **{group: len(own) for group, own in strata.items()},
            }.items():
                moved = {"anomaly": anomaly, "normal_shift": shift}.get(part, 0.0)
                tensors[f"{score}|{circuit}|{part}"] = (
                    torch.randn(size, generator=generator) + moved
                )
        circuits = {
            name: {"edges": edges + seed, "edges_total": total}
            for name, edges, total in ((MAIN, 20, 1000), (OTHER, 10, 100), (FEW, 30, 1000))
        }
        record = {"task": task, "seed": seed, "strata": strata, "circuits": circuits, "seconds": {}}
        record["sizes"] = {"discovery": 77, "fit": 700, "hosts": 64, "calibration": 1000}
        (folder / "scores" / f"{task}-{seed}.json").write_text(json.dumps(record))
        save_file(tensors, folder / "scores" / f"{task}-{seed}.safetensors")
    (folder / "models" / "recall_redirect").mkdir(parents=True)
    (folder / "models" / "recall_redirect" / "5.missed").write_text("clean accuracy 0.4\n")
    return folder


@pytest.fixture(scope="module")
def results(folder) -> Results:
    return read(folder)


@pytest.fixture(scope="module")
def summary(results) -> Summary:
    return summarise(results, draws=50)


def row(table: str, start: str) -> list[str]:
    """The columns of the first row whose first column starts so."""
    lines = [line for line in table.splitlines() if line.startswith(f"| {start}")]
    return [column.strip() for column in lines[0].strip("|").split(" | ")]


def test_headline_has_worst_cases_controls_and_false_alarms(summary):
    table = headline(summary)
    scorer = Scorer("routing", MAIN)
    worst, control, alarm = (
        summary.worst[scorer],
        summary.worst_controls[scorer],
        summary.alarms[scorer],
    )
    difference = summary.differences[scorer]
    assert row(table, "**routing**") == [
        "**routing**",
        f"{worst.auroc:.3f} [{worst.low:.3f}, {worst.high:.3f}]",
        f"{worst.task} {worst.seed} {worst.regime} {worst.stratum}",
        f"{difference.difference:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]",
        f"{control.mean:.3f} ({control.low:.3f} to {control.high:.3f})",
        f"{100 * alarm.share:.1f} %",
        f"{alarm.task} {alarm.seed} {alarm.group} {alarm.stratum}",
        "12/12",
    ]
    assert "The best baseline is `steady`." in table
    assert row(table, "distance_best_layer (oracle)")[3:7] == ["-", "-", "-", "-"]
    assert row(table, "distance_mean (baseline)")[5] == "100.0 %"
    assert "distance_layer_0" not in table
    shown = [line.split(" | ")[1] for line in table.splitlines() if line.startswith("| ")][2:]
    assert shown == sorted(shown, reverse=True)  # the best first


def test_incomplete_scores_stand_last_and_win_nothing(results):
    left = [s for s in results.subjects if s.task != "pronoun_departure"]
    only = {scorer: own for scorer, own in left[0].parts.items() if scorer.score == "routing"}
    fewer = Results((*left, type(left[0])("recall_conjunction", 9, left[0].strata, {}, only)))
    summary = summarise(fewer, draws=5)
    table = headline(summary)
    assert "No baseline was computed everywhere." in table and not summary.differences
    assert row(table, "**routing**")[-1] == "12/12" and row(table, "steady")[-1] == "8/12"
    assert summary.shown[0] == Scorer("routing", MAIN)


def test_full_table_has_every_seed_with_its_control(summary):
    table = full_table(summary)
    section = table.split("### recall_redirect, shift, agree")[1].split("###")[0]
    assert "20 anomalies, 60 normals" in section
    own = {
        c.seed: c
        for c in summary.cells
        if c.place[::2] == ("recall_redirect", "shift")
        and c.stratum == "agree"
        and c.scorer == Scorer("routing", MAIN)
    }
    expected = [
        f"{c.auroc:.3f} [{c.low:.3f}, {c.high:.3f}] / "
        f"{summary.controls[c.scorer, c.place].mean:.3f}"
        for _, c in sorted(own.items())
    ]
    mean = sum(c.auroc for c in own.values()) / 2
    assert row(section, "**routing**") == ["**routing**", f"{mean:.3f}", *expected]
    assert table.count("\n### ") == 8  # 2 tasks with anomalies, 2 regimes, 2 strata


def test_flag_table_has_every_stratum(summary):
    table = flag_table(summary)
    for alpha in (0.01, 0.05):
        section = table.split(f"### recall_redirect, alpha {100 * alpha:g} %")[1].split("###")[0]
        shares = [
            f.share
            for f in summary.flags
            if (f.task, f.stratum, f.alpha) == ("recall_redirect", "agree", alpha)
            and f.scorer == Scorer("steady")
        ]
        mean, low, high = (
            f"{100 * value:.1f} %" for value in (sum(shares) / 2, min(shares), max(shares))
        )
        headers, found = row(section, "score"), row(section, "steady (baseline)")
        assert found[headers.index("anomaly agree")] == f"{mean} ({low} to {high})"
    assert "normal_shift slot" in table.split("### shift_only, alpha 1 %")[1]


def test_grids_and_circuits(summary):
    table = grid(summary, "routing")
    worst, alarm = (own[Scorer("routing", OTHER)] for own in (summary.worst, summary.alarms))
    assert row(table, "circuit") == ["circuit", "tau 0.003", "tau 0.01"]
    assert row(table, "edges, mean") == [
        "edges, mean",
        "-",
        f"{worst.auroc:.3f} / {100 * alarm.share:.1f} %",
    ]
    tables = circuit_tables(summary)
    assert row(tables, "edges, mean") == ["edges, mean", "-", "13 to 14"]  # edges kept
    assert row(tables, FEW)[2] == "33 to 34"


def test_trusted_inputs(summary):
    table = trusted_inputs(summary)
    assert row(table, "recall_redirect-3") == ["recall_redirect-3", "77", "700", "64", "150"]
    few = summary.worst[Scorer("routing", FEW)].auroc
    assert f"| routing | {MAIN} | 10 | {few:.3f} / " in table
    assert (
        f"| routing | {MAIN} | all | {summary.worst[Scorer('routing', MAIN)].auroc:.3f} / " in table
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (MAIN, ("positions", "resample", "0.003", "")),
        ("edges-positional_mean-1e-05-order2", ("edges", "positional_mean", "1e-05", "order2")),
        (f"{MAIN}-boot1-n30", ("positions", "resample", "0.003", "boot1-n30")),
        ("several", None),
        (f"random0 of {MAIN}", None),
    ],
)
def test_recipes_are_taken_apart(name, expected):
    parsed = parse_recipe(name)
    assert (parsed and (parsed.granularity, parsed.ablation, parsed.tau, parsed.rest)) == expected


def test_written_files(folder):
    summary = write(folder, combinations=[Combination("both", ("routing", "output_kl"))], draws=20)
    first = [(folder / name).read_bytes() for name in FILES]
    text, data = first[0].decode(), json.loads(first[1])
    assert "Passed over, since they did not learn their task: recall_redirect 5." in text
    assert "recall_redirect (seeds 3, 4)" in text and "**both**" in text
    assert data["best_baseline"] == "steady" and data["missed"] == ["recall_redirect 5"]
    worst = {(own["score"], own["circuit"]): own for own in data["worst"]}
    assert worst["routing", MAIN]["worst"]["auroc"] == summary.worst[Scorer("routing", MAIN)].auroc
    assert worst["routing", MAIN]["control"]["circuits"] == 5 and worst["routing", MAIN][
        "edges"
    ] == [23, 23, 24, 23]
    assert not [cell for cell in data["cells"] if cell["circuit"].startswith("random")]
    write(folder, combinations=[Combination("both", ("routing", "output_kl"))], draws=20)
    assert [(folder / name).read_bytes() for name in FILES] == first


def test_a_study_without_anomalies_or_circuits(results):
    parts = {Scorer("steady"): results.subjects[-1].parts[Scorer("steady")]}
    subject = results.select(tasks=["shift_only"]).subjects[0]
    alone = type(subject)(subject.task, subject.seed, subject.strata, {}, parts)
    summary = summarise(Results((alone,)), draws=2)
    assert headline(summary) == "No task with anomalies was scored."
    assert circuit_tables(summary) == "No score looks through a circuit."
    assert "steady (baseline)" in flag_table(summary)
    with pytest.raises(ValueError, match="draws=1"):
        summarise(Results((alone,)), draws=1)


# --- pictures
# ---------------------------------------------------------------------------------------------------

PICTURES = {
    "worst": lambda results, path: draw_worst(
        results, path, title="Worst cases", caption="made up"
    ),
    "grid": lambda results, path: draw_grid(results, "routing", path, title="routing"),
    "false_alarms": lambda results, path: draw_false_alarms(
        results, ["routing", "steady"], path, caption="made up"
    ),
    "agree": lambda results, path: draw_agree(results, ["routing", "output_kl", "steady"], path),
}


@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_drawn_and_are_the_same_again(tmp_path, results, name, suffix):
    one, two = (PICTURES[name](results, tmp_path / f"{which}.{suffix}") for which in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    if suffix == "png":
        assert one.stat().st_size > 10_000
    else:
        ElementTree.parse(one)


def test_pictures_say_the_numbers(tmp_path, results, summary):
    text = draw_worst(results, tmp_path / "worst.svg").read_text()
    for scorer in summary.shown:
        assert f"<!-- {summary.worst[scorer].auroc:.3f} -->" in text
    assert "<!-- distance best layer (oracle) -->" in text and "distance layer" not in text
    text = draw_grid(results, "routing", tmp_path / "grid.svg").read_text()
    assert f"<!-- {summary.worst[Scorer('routing', OTHER)].auroc:.3f} -->" in text
    text = draw_false_alarms(results, ["routing"], tmp_path / "false.svg").read_text()
    assert "<!-- shift only, new: slot -->" in text
    text = draw_agree(
        results, ["routing"], tmp_path / "agree.svg", task="pronoun_departure"
    ).read_text()
    assert "<!-- anomaly, two people disagree -->" in text


def test_pictures_are_refused(tmp_path, results):
    with pytest.raises(ValueError, match="0 tasks with anomalies"):
        draw_worst(results.select(tasks=["shift_only"]), tmp_path / "x.png")
    with pytest.raises(ValueError, match="0 circuits by recipe for score='steady'"):
        draw_grid(results, "steady", tmp_path / "x.png")
    with pytest.raises(ValueError, match="0 scores to draw"):
        draw_false_alarms(results, [], tmp_path / "x.png")
    with pytest.raises(ValueError, match="score='nobody'.*distance_layer_0"):
        draw_agree(results, ["nobody"], tmp_path / "x.png")
    with pytest.raises(ValueError, match="shift_only-3 has no anomalies"):
        draw_agree(results, ["routing"], tmp_path / "x.png", task="shift_only")
    with pytest.raises(ValueError, match="0 subjects"):
        draw_agree(results, ["routing"], tmp_path / "x.png", seed=9)
