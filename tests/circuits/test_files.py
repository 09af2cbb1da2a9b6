"""Files of a run folder: links, fields and types are checked; what is written is whole."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from circuits.discovery import EAPIG
from circuits.files import (
    own_file,
    read_json,
    read_tensors,
    restored,
    write_json,
    write_tensors,
    write_text,
)


@dataclass
class Inner:
    share: float = 0.5


@dataclass
class Outer:
    name: str = "outer"
    count: int | None = None
    inner: Inner = field(default_factory=Inner)
    parts: list[str] = field(default_factory=list)


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["absolute", "relative", "folder"])
def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path, link):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "a.json").write_text("{}")
    if link == "folder":
        (folder / "detector").symlink_to(outside)
        name = "detector/a.json"
    else:
        (folder / "a.json").symlink_to(
            outside / "a.json" if link == "absolute" else Path("..") / "outside" / "a.json"
        )
        name = "a.json"
    with pytest.raises(ValueError, match="is a link to .*, which is not in the folder"):
        own_file(folder, name)


def test_links_within_the_folder_and_to_the_folder_are_followed(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "b.json").write_text("[1]")
    (folder / "a.json").symlink_to("b.json")
    (tmp_path / "latest").symlink_to(folder)
    for place in (folder, tmp_path / "latest"):
        assert read_json(own_file(place, "a.json")) == [1]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_is_a_value_error(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"\xff" * 64])
def test_what_are_no_tensors_is_a_value_error_that_names_the_file(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.safetensors cannot be read"):
        read_tensors(tmp_path / "a.safetensors")


def test_a_dataclass_comes_back():
    data = {"name": "x", "count": 3, "inner": {"share": 1}, "parts": ["a"]}
    assert restored(Outer, data, "file") == Outer("x", 3, Inner(1), ["a"])
    assert restored(EAPIG, {"name": "eap_ig", "steps": 7}, "file") == EAPIG(steps=7)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"file is \[\], but it must be a mapping"),
        ({"nam": 1}, r"file\.nam is unknown; the fields are name, count, inner, parts"),
        ({"_target_": "os.system"}, r"file\._target_ is unknown"),
        ({"name": None}, r"file\.name is None, but it must be str"),
        ({"count": 1.5}, r"file\.count is 1\.5, but it must be int \| None"),
        ({"inner": {"share": "much"}}, r"file\.inner\.share is 'much', but it must be float"),
        ({"inner": 3}, r"file\.inner is 3, but it must be a mapping"),
        ({"parts": "abc"}, r"file\.parts is 'abc'"),
        ({"name": ["x" * 99]}, r"file\.name is .{60}, but"),
    ],
)
def test_other_fields_and_types_are_refused_by_name(data, message):
    with pytest.raises(ValueError, match=message):
        restored(Outer, data, "file")


# ---- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2, 3).T})
        write_json(tmp_path / "a.json", [1])
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == mode, path
    assert torch.equal(read_tensors(tmp_path / "a.safetensors")["a"], torch.zeros(3, 2))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.zeros(2)})
    write_text(tmp_path / "a.json", "old")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    for write in (
        lambda: write_tensors(path, {"a": torch.ones(2)}),
        lambda: write_text(tmp_path / "a.json", "new"),
    ):
        with pytest.raises(OSError, match="No space left"):
            write()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
