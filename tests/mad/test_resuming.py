"""Partial files: one run at a time writes one, and what a killed run left is gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from mad import resuming
from mad.resuming import append, finish, locked, results_so_far, resume

JOB = {"inputs": "x"}


def test_a_file_that_is_being_written_is_refused_by_name(tmp_path):
    partial = tmp_path / "out.jsonl.partial"
    with locked(partial) as file:
        resume(file, JOB, 2, overwrite=False)
        append(file, [{"id": 1}, {"id": 2}])
        with pytest.raises(
            ValueError, match="another run is writing .*out.jsonl.partial; wait unt"
        ):
            with locked(partial):
                pass
        finish(file, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == '{"id": 1}\n{"id": 2}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_the_lock_of_a_killed_run_is_gone_and_its_chunks_are_not(tmp_path):
    partial = tmp_path / "out.jsonl.partial"
    script = f"""
import sys, time
from pathlib import Path
from mad.resuming import append, locked, resume
with locked(Path({str(partial)!r})) as file:
    resume(file, {JOB!r}, 2, overwrite=False)
    append(file, [{{"id": 1}}, {{"id": 2}}, {{"id": 3}}])
    print("written", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"written\n"
        with pytest.raises(ValueError, match="another run is writing"):
            with locked(partial):
                pass
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    with locked(partial) as file:
        assert resume(file, JOB, 2, overwrite=False) == 2
        assert list(results_so_far(file)) == [{"id": 1}, {"id": 2}]
        append(file, [{"id": 3}])
        finish(file, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == '{"id": 1}\n{"id": 2}\n{"id": 3}\n'


def test_a_file_that_was_finished_while_it_was_waited_for_is_made_anew(tmp_path, monkeypatch):
    partial, real, calls = tmp_path / "p.partial", resuming._lock, []

    def slowly(file, path):
        real(file, path)
        if not calls:  # the other run has taken it away between opening and locking
            path.unlink()
        calls.append(1)

    monkeypatch.setattr(resuming, "_lock", slowly)
    with locked(partial) as file:
        resume(file, JOB, 2, overwrite=False)
        assert len(calls) == 2 and partial.read_bytes() == b'{"job": {"inputs": "x"}}\n'


@pytest.mark.parametrize(
    ("contents", "refused"),
    [(b"", False), (b'{"job": {"in', False), (b"mine", True), (b'{"job": {}}\n', True)],
)
def test_only_what_another_job_or_somebody_wrote_is_in_the_way(tmp_path, contents, refused):
    partial = tmp_path / "p.partial"
    partial.write_bytes(contents)
    for overwrite in (False, True):
        with locked(partial) as file:
            if refused and not overwrite:
                with pytest.raises(ValueError, match="p.partial is the beginning of another job"):
                    resume(file, JOB, 2, overwrite=False)
                continue
            assert resume(file, JOB, 2, overwrite=overwrite) == 0
        assert partial.read_bytes() == b'{"job": {"inputs": "x"}}\n'


def test_a_run_that_is_refused_before_it_begins_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="no"):
        with locked(tmp_path / "p.partial"):
            raise ValueError("no")
    assert not list(tmp_path.iterdir())


def test_where_there_are_no_locks_it_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(resuming, "fcntl", None)
    with locked(tmp_path / "p.partial") as file:
        resume(file, JOB, 2, overwrite=False)
        append(file, [{"id": 1}])
        finish(file, tmp_path / "out")
    assert "no file locks; let no other run write" in caplog.text
    assert (tmp_path / "out").read_text() == '{"id": 1}\n'
