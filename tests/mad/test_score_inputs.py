"""Where scored lines come from: files, gzip, pipes; what is told on the way; their positions."""

from __future__ import annotations

import gzip
import json
import logging
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

import mad.scoring as scoring_module
from circuits.circuit import Circuit
from circuits.discovery import EAP
from circuits.engine import Engine
from circuits.model.load import LoadedModel, ModelConfig
from circuits.selection import Selection, random_circuits
from circuits.tasks.recall import Recall
from mad.calibration import Calibrated, fit
from mad.commands.main import main
from mad.detector import Context
from mad.detectors import Fast, MaxProbability
from mad.pipeline import RunConfig, make_run
from mad.resuming import locked
from mad.scoring import Scoring, read_results, score
from mad.trusted import Splits
from tests import tiny

SCORING = Scoring(alpha=0.2, chunk=4)


def lines(count: int, seed: int) -> str:
    return "".join(
        json.dumps({"clean": record["clean"], "id": record["id"]}) + "\n"
        for record in tiny.records(count, seed)
    )


@pytest.fixture(scope="module")
def fitted() -> tuple[LoadedModel, Calibrated]:
    """`fast`, whose trusted prompts are scored at their last token."""
    engine = Engine(tiny.gpt2())
    (kept,) = random_circuits(engine.graph, engine.graph.n_edges // 3, 1, seed=1)
    context = Context(engine, Circuit(engine.graph, kept, kept.float()))
    trusted = engine.model.prompts({"clean": r["clean"]} for r in tiny.records(14, 8))
    parts = trusted.split({"fit": 4, "calibration": 10}, seed=0)
    return engine.model, fit(Fast(), context, *parts.values(), used={})


def scored(fitted: tuple[LoadedModel, Calibrated], source: Path, out: Path) -> bytes:
    model, calibrated = fitted
    score(source, out, calibrated, model, SCORING)
    return out.read_bytes()


def test_gzip_pipes_and_standard_input_give_the_same_file(fitted, tmp_path, monkeypatch):
    text = lines(9, 1)
    (tmp_path / "in.jsonl").write_text(text)
    expected = scored(fitted, tmp_path / "in.jsonl", tmp_path / "0")
    assert len(expected.splitlines()) == 9 and b"error" not in expected
    (tmp_path / "in.gz").write_bytes(gzip.compress(text.encode()))
    assert scored(fitted, tmp_path / "in.gz", tmp_path / "1") == expected
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(text,))
    writer.start()
    assert scored(fitted, tmp_path / "pipe", tmp_path / "2") == expected
    writer.join()
    with (tmp_path / "in.gz").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert scored(fitted, Path("-"), tmp_path / "3") == expected


def test_what_is_packed_again_is_the_same_job(fitted, tmp_path, monkeypatch):
    model, calibrated = fitted
    text, real, calls = lines(9, 1).encode(), scoring_module.score_lines, []
    (tmp_path / "in.jsonl").write_bytes(text)
    expected = scored(fitted, tmp_path / "in.jsonl", tmp_path / "whole")

    def interrupted(*arguments):
        calls.append(1)
        return real(*arguments) if len(calls) < 2 else 1 / 0

    monkeypatch.setattr(scoring_module, "score_lines", interrupted)
    with pytest.raises(ZeroDivisionError):
        score(tmp_path / "in.jsonl", tmp_path / "out", calibrated, model, SCORING)
    monkeypatch.undo()
    (tmp_path / "in.gz").write_bytes(gzip.compress(text))
    assert score(tmp_path / "in.gz", tmp_path / "out", calibrated, model, SCORING).resumed == 4
    assert (tmp_path / "out").read_bytes() == expected


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (lines(2, 1).encode("utf-16"), "in is UTF-16; save the file as UTF-8"),
        (b"PAR1\x15\x04 rows PAR1", "in is Parquet; write its rows as JSONL"),
        (gzip.compress(lines(40, 1).encode())[:-9], "in is damaged gzip"),
        (gzip.compress(b""), "in is empty; give one JSON object a line"),
    ],
    ids=["UTF-16", "Parquet", "damaged gzip", "empty gzip"],  # gzip writes the time into itself
)
def test_files_of_other_formats_are_refused_before_anything_is_written(
    fitted, tmp_path, contents, message
):
    (tmp_path / "in").write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        scored(fitted, tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_second_run_on_the_same_out_is_refused_and_changes_nothing(fitted, tmp_path, monkeypatch):
    (tmp_path / "in").write_text(lines(9, 1))
    expected = scored(fitted, tmp_path / "in", tmp_path / "whole")
    real, refused = scoring_module.score_lines, []

    def meanwhile(*arguments):
        if not refused:
            with pytest.raises(ValueError, match="another run is writing .*out.partial") as error:
                scored(fitted, tmp_path / "in", tmp_path / "out")
            refused.append(error)
        return real(*arguments)

    monkeypatch.setattr(scoring_module, "score_lines", meanwhile)
    assert scored(fitted, tmp_path / "in", tmp_path / "out") == expected
    assert len(refused) == 1


def test_a_run_that_finished_just_before_is_not_written_over(fitted, tmp_path, monkeypatch):
    (tmp_path / "in").write_text(lines(3, 1))

    def late(partial):
        (tmp_path / "out").write_text("the other's")
        return locked(partial)

    monkeypatch.setattr(scoring_module, "locked", late)
    with pytest.raises(FileExistsError, match="out exists; choose another out="):
        scored(fitted, tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "the other's"
    assert not (tmp_path / "out.partial").exists()


def test_off_a_terminal_progress_is_logged_from_time_to_time(fitted, tmp_path, monkeypatch, caplog):
    (tmp_path / "in").write_text(lines(9, 1))
    caplog.set_level(logging.INFO, "mad.progress")
    scored(fitted, tmp_path / "in", tmp_path / "0")
    assert not caplog.records, "it took no 30 seconds"
    monkeypatch.setattr(scoring_module, "LOG_EVERY", 0.0)
    scored(fitted, tmp_path / "in", tmp_path / "1")
    told = [record.getMessage() for record in caplog.records]
    assert [message.split(" a ")[0].split(",")[0] for message in told] == [
        f"{number} lines scored" for number in (4, 8, 9)
    ]


def test_null_is_no_id_and_ids_may_be_given_twice(fitted, tmp_path):
    (tmp_path / "in").write_text(
        '{"clean": [1, 2], "id": null}\n{"clean": [1, 2], "id": "x"}\n{"clean": [3], "id": "x"}\n'
    )
    scored(fitted, tmp_path / "in", tmp_path / "out")
    results = list(read_results(tmp_path / "out"))
    assert [result["id"] for result in results] == [1, "x", "x"]
    assert results[0]["score"] == results[1]["score"] != results[2]["score"]


def test_positions_of_a_line_count_for_transplants_or_are_an_error_line(fitted, tmp_path):
    rows = [
        {"clean": [5, 7, 9, 2, 4]},
        {"clean": [5, 7, 9, 2, 4], "positions": [2]},
        {"clean": [5, 7, 9]},
        {"clean": [5, 7, 9, 2, 4], "positions": [-1]},
        {"clean": [5, 7, 9, 2, 4], "positions": [1, 2]},
    ]
    (tmp_path / "in").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored(fitted, tmp_path / "in", tmp_path / "out")
    *good, bad = read_results(tmp_path / "out")
    whole, inside, cut, last = torch.tensor([result["score"] for result in good]).tolist()
    assert inside == pytest.approx(cut, rel=1e-4) and whole == pytest.approx(last, rel=1e-4)
    assert inside != pytest.approx(whole, rel=1e-2)
    assert "line 5: positions names several tokens" in bad["error"]


def test_the_command_reads_standard_input(tmp_path, monkeypatch, capsys):
    config = RunConfig(
        ModelConfig("pkg://mad/models/recall_redirect"),
        Recall(),
        EAP(),
        detector=MaxProbability(),
        splits=Splits(8, 8, 8, 16),
        selection=Selection(edges=30),
        random_draws=0,
        out=str(tmp_path / "run"),
    )
    make_run(config)
    (tmp_path / "in").write_text('{"clean": [5, 7, 5]}\n{"clean": [1], "id": NaN}\n')
    words = ["score", f"circuit={tmp_path / 'run'}", f"out={tmp_path / 'out'}", "alpha=0.2"]
    words.append("detector=max_probability")
    with (tmp_path / "in").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main([*words, "inputs=-"]) == 3
    first, second = read_results(tmp_path / "out")
    assert first["id"] == 1 and "score" in first and "line 2: id=nan is neither" in second["error"]
    assert "2 lines, " in capsys.readouterr().err
