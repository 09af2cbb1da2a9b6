"""A folder beside its place: what was there stays until the new one is whole."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mad.staging import staged

OURS = ("circuit.json", "metrics.json", "detector")


def place(target, **changes):
    return staged(target, **{"ours": OURS, "keep": "circuit.json", **changes})


def write(folder, text: str) -> None:
    (folder / "circuit.json").write_text(text)
    (folder / "detector").mkdir()
    (folder / "detector" / "d.json").write_text(text)


def files(folder) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_it_takes_its_place_when_published(tmp_path):
    target = tmp_path / "runs" / "one"
    with place(target) as new:
        write(new.folder, "new")
        assert not target.exists() and not new.replaces
        assert new.publish() == target
    assert files(tmp_path) == {
        "runs/one/circuit.json": "new",
        "runs/one/detector/d.json": "new",
    }


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a link"])
def test_the_place_may_be_free_in_several_ways(tmp_path, there):
    target = tmp_path / "one"
    if there == "an empty folder":
        target.mkdir()
    if there == "a link":
        (tmp_path / "disk").mkdir()
        target.symlink_to(tmp_path / "disk")
    with place(target) as new:
        write(new.folder, "new")
        new.publish()
    assert (target / "circuit.json").read_text() == "new"
    assert target.is_symlink() == (there == "a link")


def test_what_is_not_ours_stays(tmp_path):
    target = tmp_path / "one"
    target.mkdir()
    write(target, "old")
    (target / "metrics.json").write_text("old")
    (target / "notes.txt").write_text("mine")
    (target / "more").mkdir()
    (target / "more" / "scored.jsonl").write_text("mine")
    with place(target) as new:
        write(new.folder, "new")
        assert new.replaces
        new.publish()
    assert files(tmp_path) == {
        "one/circuit.json": "new",
        "one/detector/d.json": "new",
        "one/notes.txt": "mine",
        "one/more/scored.jsonl": "mine",
    }


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_failure_leaves_what_was_there_and_what_was_found(tmp_path, error, caplog):
    target = tmp_path / "one"
    target.mkdir()
    write(target, "old")
    with pytest.raises(error), place(target) as new:
        (new.folder / "metrics.json").write_text("new")
        raise error
    assert files(tmp_path) == {"one/circuit.json": "old", "one/detector/d.json": "old"}
    assert not caplog.text
    with pytest.raises(error), place(target) as new:
        write(new.folder, "new")
        raise error
    assert files(target)["circuit.json"] == "old"
    assert files(tmp_path / "one.partial")["circuit.json"] == "new"
    assert f"what was found is in {tmp_path / 'one.partial'}" in caplog.text


def test_what_was_found_is_not_written_over_unless_asked_for(tmp_path):
    target = tmp_path / "one"
    with place(target) as new:
        write(new.folder, "found")
    message = "one.partial holds what an interrupted run had found; move it away, or overwrite=true"
    with pytest.raises(FileExistsError, match=message), place(target):
        pass
    assert files(tmp_path / "one.partial")["circuit.json"] == "found"
    with place(target, overwrite=True) as new:
        assert not files(new.folder)
        write(new.folder, "new")
        new.publish()
    assert files(tmp_path) == {"one/circuit.json": "new", "one/detector/d.json": "new"}


def test_what_a_killed_run_left_without_a_circuit_is_cleared(tmp_path):
    partial = tmp_path / "one.partial"
    (partial / "detector").mkdir(parents=True)
    (partial / "metrics.json").touch()
    (partial / ".circuit.json.123").touch()
    with place(tmp_path / "one") as new:
        assert not list(new.folder.iterdir())
    assert not partial.exists()


def test_a_folder_of_that_name_that_is_no_run_is_left_alone(tmp_path):
    partial = tmp_path / "one.partial"
    partial.mkdir()
    (partial / "letters.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"one\.partial .* holds letters\.txt"):
            with place(tmp_path / "one", overwrite=overwrite):
                pass
    assert files(tmp_path) == {"one.partial/letters.txt": "mine"}


def test_two_at_once_are_refused(tmp_path):
    with place(tmp_path / "one"):
        with pytest.raises(FileExistsError, match=r"another run is writing .*one\.partial"):
            with place(tmp_path / "one", overwrite=True):
                pass
        with place(tmp_path / "two"):
            pass
    with place(tmp_path / "one"):
        pass


def test_one_that_was_killed_holds_no_lock(tmp_path):
    code = (
        "import os; from pathlib import Path; from mad.staging import staged\n"
        "with staged(Path('one'), ours=['circuit.json'], keep='circuit.json') as new:\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert done.returncode == -9 and (tmp_path / "one.partial").is_dir()
    with place(tmp_path / "one"):
        pass


def test_a_place_that_cannot_be_written_is_told_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        with place(tmp_path / "file" / "one"):
            pass


def test_a_move_that_fails_puts_the_old_one_back(tmp_path, monkeypatch):
    from pathlib import Path

    target = tmp_path / "one"
    target.mkdir()
    write(target, "old")
    rename = Path.rename

    def refuse(self, to):
        if self.name == "one.partial":
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output"), place(target) as new:
        write(new.folder, "new")
        new.publish()
    assert files(target)["circuit.json"] == "old"
    assert files(tmp_path / "one.partial")["circuit.json"] == "new"


def test_one_that_was_being_replaced_when_it_was_killed_is_not_lost(tmp_path):
    (tmp_path / ".one.replaced").mkdir()
    write(tmp_path / ".one.replaced", "old")
    with pytest.raises(FileExistsError, match=r"\.one\.replaced is a run that was being replaced"):
        with place(tmp_path / "one", overwrite=True):
            pass
    assert not (tmp_path / "one.partial").exists()
