"""A made-up run: two models of one task, one without anomalies, and a natural one."""

from __future__ import annotations

from pathlib import Path

import pytest

from mad.benchmark.report import Summary, summarise
from mad.benchmark.results import Results, Scorer, read
from tests.mad.benchmark.made_up import drawn, found, leave, subject

# How far anomalies lie beyond normals, and shifted normals beyond others.
SCORES = {
    found("routing"): (3.0, 0.0),
    **{Scorer("routing", f"random{number}"): (0.3, 0.0) for number in range(5)},
    found("deviation"): (1.5, 0.5),
    Scorer("steady"): (2.0, 0.5),
    Scorer("distance, mean"): (5.0, 6.0),
    Scorer("distance, layer 0"): (5.0, 6.0),
    Scorer("distance, layer 1"): (5.0, 1.0),
}
TASKS = {
    ("recall_redirect", 3): (("keys",), ("agree", "disagree", "disagree")),
    ("recall_redirect", 4): (("keys",), ("agree", "disagree", "disagree")),
    ("shift_only", 3): (("keys", "slot"), ()),
    ("pronoun_departure", 3): (("names", "both"), ("two_people disagree", "corrected agree")),
}


@pytest.fixture(scope="session")
def made_up_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    for number, ((task, seed), (novelties, kinds)) in enumerate(TASKS.items()):
        names = {"normal_iid": ("all",), "normal_shift": novelties, "anomaly": kinds}
        strata = {group: (own * 60)[:60] for group, own in names.items() if own}
        groups = {"calibration": 150, **dict.fromkeys(strata, 60)}
        parts = {
            scorer: drawn(100 * number + salt, anomaly, shift, groups=groups)
            for salt, (scorer, (anomaly, shift)) in enumerate(SCORES.items())
        }
        about = {
            "circuit": {"edges": 20 + seed, "edges_total": 1000},
            "sizes": {"discovery": 77, "fit": 700, "hosts": 64, "calibration": 150},
        }
        leave(folder, subject(parts, task, seed, strata, about))
    (folder / "models" / "recall_redirect").mkdir(parents=True)
    (folder / "models" / "recall_redirect" / "5.missed").write_text("clean accuracy 0.4\n")
    return folder


@pytest.fixture(scope="session")
def results(made_up_run) -> Results:
    return read(made_up_run)


@pytest.fixture(scope="session")
def summary(results) -> Summary:
    return summarise(results, draws=50)
