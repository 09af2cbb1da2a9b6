"""The tables hold the numbers that were measured, and come out the same again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mad.benchmark.report import flag_table, full_table, headline, model_table, summarise, write
from mad.benchmark.results import Results, Scorer
from tests.mad.benchmark.made_up import found

ROUTING = found("routing")


def row(table: str, start: str) -> list[str]:
    """The columns of the first row whose first column starts so."""
    lines = [line for line in table.splitlines() if line.startswith(f"| {start}")]
    return [column.strip() for column in lines[0].strip("|").split(" | ")]


def test_headline_has_worst_cases_controls_and_false_alarms(summary):
    table = headline(summary)
    worst, control = summary.worst[ROUTING], summary.worst_controls[ROUTING]
    alarm, gain = summary.alarms[ROUTING], summary.differences[ROUTING]
    place = worst.place
    assert row(table, "**routing**") == [
        "**routing**",
        f"{worst.auroc:.3f} [{worst.low:.3f}, {worst.high:.3f}]",
        f"{place.task} {place.seed} {place.group.removeprefix('normal_')} {place.stratum}",
        f"{gain.difference:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]",
        f"{control.mean:.3f} ({control.low:.3f} to {control.high:.3f})",
        f"{100 * alarm.share:.1f} %",
        str(alarm.place),
        "12/12",
    ]
    assert "The best baseline is `steady`." in table
    assert row(table, "distance, best layer (oracle)")[3:7] == ["-", "-", "-", "-"]
    assert row(table, "distance, mean (baseline)")[5] == "100.0 %"
    assert "distance, layer 0" not in table
    shown = [line.split(" | ")[1] for line in table.splitlines() if line.startswith("| ")][2:]
    assert shown == sorted(shown, reverse=True)  # the best first


def test_incomplete_scores_stand_last_and_win_nothing(results):
    left = [s for s in results.subjects if s.task != "pronoun_departure"]
    only = {scorer: own for scorer, own in left[0].parts.items() if scorer.detector == "routing"}
    other = replace(left[0], task="recall_conjunction", seed=9, parts=only)
    summary = summarise(Results((*left, other)), draws=5)
    table = headline(summary)
    assert "No baseline was computed everywhere." in table and not summary.differences
    assert row(table, "**routing**")[-1] == "12/12" and row(table, "steady")[-1] == "8/12"
    assert summary.shown[0] == ROUTING


def test_full_table_has_every_seed_with_its_control(summary):
    table = full_table(summary)
    section = table.split("### recall_redirect, shift, agree")[1].split("###")[0]
    assert "20 anomalies, 60 normals" in section
    own = [
        one
        for one in summary.separations
        if (one.place.task, one.place.group) == ("recall_redirect", "normal_shift")
        and one.place.stratum == "agree"
        and one.scorer == ROUTING
    ]
    expected = [
        f"{one.auroc:.3f} [{one.low:.3f}, {one.high:.3f}] / "
        f"{summary.controls[one.scorer, one.place].mean:.3f}"
        for one in sorted(own, key=lambda one: one.place)
    ]
    mean = sum(one.auroc for one in own) / 2
    assert row(section, "**routing**") == ["**routing**", f"{mean:.3f}", *expected]
    assert table.count("\n### ") == 8  # 2 tasks with anomalies, 2 groups of normals, 2 strata


def test_flag_table_has_every_stratum(summary):
    table = flag_table(summary)
    for alpha in (0.01, 0.05):
        section = table.split(f"### recall_redirect, alpha {100 * alpha:g} %")[1].split("###")[0]
        shares = [
            flag.share
            for flag in summary.flags
            if (flag.place.task, flag.place.stratum) == ("recall_redirect", "agree")
            and flag.alpha == alpha
            and flag.scorer == Scorer("steady")
        ]
        mean, low, high = (
            f"{100 * value:.1f} %" for value in (sum(shares) / 2, min(shares), max(shares))
        )
        headers, columns = row(section, "detector"), row(section, "steady (baseline)")
        assert columns[headers.index("anomaly agree")] == f"{mean} ({low} to {high})"
    assert "normal_shift slot" in table.split("### shift_only, alpha 1 %")[1]


def test_models(summary):
    table = model_table(summary)
    assert row(table, "recall_redirect-4") == [
        *("recall_redirect-4", "24", "1000"),
        *("77", "700", "64", "150"),
    ]


def test_written_files(made_up_run):
    files = [made_up_run / f"report.{suffix}" for suffix in ("md", "json")]
    summary = write(made_up_run, draws=20)
    first = [file.read_bytes() for file in files]
    text, data = first[0].decode(), json.loads(first[1])
    assert "Passed over, since they did not learn their task: recall_redirect 5." in text
    assert "recall_redirect-3, recall_redirect-4" in text
    assert data["best_baseline"] == "steady" and data["missed"] == ["recall_redirect 5"]
    worst = {tuple(own["scorer"].values()): own for own in data["worst"]}
    routing = worst["routing", "found"]
    assert routing["auroc"] == summary.worst[ROUTING].auroc
    assert routing["control"]["circuits"] == 5 and routing["places"] == 12
    circuits = {one["scorer"]["circuit"] for one in data["separations"]}
    assert circuits == {"none", "found", "oracle"}
    write(made_up_run, draws=20)
    assert [file.read_bytes() for file in files] == first
    assert write(made_up_run, tasks=["shift_only"], stem="one", draws=2).results.subjects[1:] == ()


def test_no_anomalies_and_no_circuits(results):
    (shift_only,) = results.of([Scorer("steady")]).select(["shift_only"]).subjects
    alone = Results((replace(shift_only, about={}),))
    summary = summarise(alone, draws=2)
    assert headline(summary) == "No task with anomalies was scored."
    assert row(model_table(summary), "shift_only-3") == ["shift_only-3", *"------"]
    assert "steady (baseline)" in flag_table(summary)
    with pytest.raises(ValueError, match="draws=1"):
        summarise(alone, draws=1)
