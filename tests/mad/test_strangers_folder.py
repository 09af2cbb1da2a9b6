"""The folder of a stranger: loading it imports nothing, fetches nothing, runs nothing, and reads
nothing outside of it without the user's own word.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from circuits.model.load import local_path
from mad.commands.main import main
from mad.folder import open_run
from mad.known_models import is_known, known_models, recorded, remember
from tests import modules, tiny
from tests.mad.test_scoring import records, run  # noqa: F401


class Watch:
    """What Python is asked to open, import and connect to while it is on."""

    def __init__(self) -> None:
        self.on, self.seen = False, []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if self.on and event in ("open", "import", "socket.connect", "os.listdir", "os.scandir"):
            self.seen.append((event, str(arguments[0])))

    def __enter__(self) -> Watch:
        self.seen, self.on = [], True
        return self

    def __exit__(self, *_) -> None:
        self.on = False

    def under(self, *places) -> list[tuple[str, str]]:
        return [(event, what) for event, what in self.seen if any(str(p) in what for p in places)]


WATCH = Watch()  # a hook cannot be taken off again


@pytest.fixture(autouse=True)
def newcomer(tmp_path, monkeypatch):
    """A user who has named no model yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def stranger(run, tmp_path):  # noqa: F811
    """A copy of a run folder, and a way to change what its files say."""
    folder = tmp_path / "stranger"
    shutil.copytree(run[0] / "run", folder)

    def change(name: str, **changes) -> Path:
        path = folder / name
        data = json.loads(path.read_text())
        for key, value in changes.items():
            *parents, last = key.split("__")
            inner = data
            for parent in parents:
                inner = inner[parent]
            inner[last] = value
        path.write_text(json.dumps(data))
        return folder

    return change


def refused(capsys, *words: str) -> str:
    """The one line with which a command is refused."""
    assert main(list(words)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


# ---- names of models -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "someone/backdoor",
        "gpt2",
        "/etc",
        "../model",
        "./model",
        "~/model",
        "file:///etc/passwd",
        "https://example.com/model",
        "\\\\server\\share",
        "OUTSIDE",
        "",
    ],
)
def test_a_model_that_the_user_has_not_named_is_neither_read_nor_fetched(
    stranger,
    run,  # noqa: F811
    tmp_path,
    capsys,
    path,
):
    outside = tmp_path / "outside"
    shutil.copytree(run[0] / "model", outside)  # with the very weights of the circuit
    folder = stranger("circuit.json", model__path=str(outside) if path == "OUTSIDE" else path)
    shutil.copytree(run[0] / "model", folder / "model")
    with WATCH:
        error = refused(capsys, "score", f"circuit={folder}", "inputs=a", f"out={tmp_path / 'b'}")
    assert "which has not been given to madcap on this machine" in error and "model=PATH" in error
    assert not WATCH.under(outside, run[0], folder / "model", "/etc/passwd", "huggingface.co")
    assert not [event for event, _ in WATCH.seen if event == "socket.connect"]


def test_the_users_own_word_is_enough_and_is_remembered(stranger, run, tmp_path, capsys):  # noqa: F811
    outside = tmp_path / "outside"
    shutil.copytree(run[0] / "model", outside)
    folder = stranger("circuit.json", model__path=str(outside))
    with pytest.raises(ValueError, match="has not been given to madcap"):
        open_run(folder)
    assert open_run(folder, model=str(outside)).model.path == str(outside)
    assert open_run(folder).circuit
    assert known_models().read_text() == json.dumps(str(outside)) + "\n"


def test_another_path_is_no_word_for_the_one_that_the_folder_names(stranger, run, tmp_path):  # noqa: F811
    folder = stranger("circuit.json", model__path="someone/backdoor")
    assert open_run(folder, model=str(run[0] / "model")).circuit
    with pytest.raises(ValueError, match="'someone/backdoor', which has not been given"):
        open_run(folder)


def test_a_head_needs_the_users_word_as_well(stranger, run, tmp_path):  # noqa: F811
    head = tmp_path / "head.safetensors"
    save_file({"weight": torch.zeros(3, 12)}, head)
    folder = stranger("circuit.json", model__head=str(head))
    with pytest.raises(ValueError, match=r"head\.safetensors', which has not been given"):
        open_run(folder, model=str(run[0] / "model"))
    with pytest.raises(ValueError, match="outputs 29, but this one has outputs 3"):
        open_run(folder, model=str(run[0] / "model"), head=str(head))


def test_a_run_of_ones_own_needs_no_word(run, tmp_path):  # noqa: F811
    import dataclasses

    from mad.pipeline import make_run

    make_run(dataclasses.replace(run[1], out=str(tmp_path / "mine")))
    assert is_known(str(run[0] / "model"))
    assert open_run(tmp_path / "mine").detector()


def test_fit_takes_the_users_word(stranger, run, tmp_path, capsys):  # noqa: F811
    folder = stranger("circuit.json", model__path="someone/backdoor")
    trusted = tmp_path / "trusted.jsonl"
    trusted.write_text("".join(json.dumps(r) + "\n" for r in records(40, 77)))
    words = ["fit", f"circuit={folder}", f"trusted={trusted}", "detector=mahalanobis"]
    assert "has not been given" in refused(capsys, *words)
    assert main([*words, f"model={run[0] / 'model'}"]) == 0


def test_what_cannot_be_remembered_is_said(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    remember("a/b", None)
    assert "will ask for model=a/b" in caplog.text and not is_known("a/b")


def test_a_path_is_remembered_as_it_is_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a\nb").mkdir()
    remember("a\nb", "org/name", "pkg://mad/models/recall_redirect", None)
    remember("a\nb")
    assert len(known_models().read_text().splitlines()) == 2
    assert recorded("a\nb") == str(tmp_path / "a\nb") and is_known(str(tmp_path / "a\nb"))
    assert is_known("org/name") and not is_known("a") and not is_known("b")


# ---- packages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "pkg://evil/model",
        "pkg://evil",
        "pkg://evil.inner/model",
        "pkg://mad.evil/model",
        "pkg://os/model",
        "pkg:///etc",
        "pkg://",
    ],
)
def test_no_package_but_madcaps_own_is_looked_into(stranger, tmp_path, monkeypatch, capsys, path):
    for package in ("evil", "evil/inner"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = stranger("circuit.json", model__path=path)
    with WATCH:
        error = refused(capsys, "score", f"circuit={folder}", "inputs=a", f"out={tmp_path / 'b'}")
    assert "pkg:// is for what comes with madcap, in circuits, abstraction, mad" in error
    assert not (tmp_path / "ran").exists() and "evil" not in sys.modules
    assert not WATCH.under(tmp_path / "evil") and ("import", "evil") not in WATCH.seen


@pytest.mark.parametrize("inside", ["../../etc", "/etc/passwd", "models/../../x", "../mad_other"])
def test_no_path_leads_out_of_a_package(stranger, tmp_path, capsys, inside):
    folder = stranger("circuit.json", model__path=f"pkg://mad/{inside}")
    error = refused(capsys, "score", f"circuit={folder}", "inputs=a", f"out={tmp_path / 'b'}")
    assert "leads out of the package mad" in error


def test_what_comes_with_madcap_is_found_without_an_import():
    assert (local_path("pkg://mad/models/recall_redirect") / "config.json").is_file()


# ---- code ----------------------------------------------------------------------------------------


class Evil:
    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["scores.safetensors", "detector/fast/detector.safetensors"])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_no_pickle_is_ever_read(stranger, run, tmp_path, name, form):  # noqa: F811
    folder, ran = stranger("metrics.json"), tmp_path / "ran"
    content = {"scores": Evil(ran), "calibration": Evil(ran)}
    if form == "pickle":
        (folder / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, folder / name)
    with pytest.raises(ValueError, match=r"\.safetensors"):
        open_run(folder, model=str(run[0] / "model")).detector("fast")
    assert not ran.exists()


def test_neither_yaml_tags_nor_targets_are_followed(stranger, run, tmp_path, capsys):  # noqa: F811
    ran = tmp_path / "ran"
    folder = stranger("metrics.json")
    tag = f"!!python/object/apply:os.system ['touch {ran}']"
    (folder / "config.yaml").write_text(f"model: {tag}\nhydra:\n  searchpath: [pkg://evil]\n")
    model = str(run[0] / "model")
    assert open_run(folder, model=model).detector("fast"), "config.yaml is never read back"
    target = {"_target_": "os.system", "command": f"touch {ran}"}
    for changes in ({"model": target}, {"model__dtype": target}, {"method": target}):
        changed = stranger("circuit.json", **changes)
        try:
            open_run(changed, model=model)
        except ValueError as error:
            assert "model" in str(error)
        shutil.copy(run[0] / "run" / "circuit.json", folder)
    stranger("detector/fast/detector.json", config__hosts=target)
    with pytest.raises(ValueError, match=r"config\.hosts is .*, but it must be int"):
        open_run(folder, model=model).detector("fast")
    stranger("detector/fast/detector.json", config={"name": "os.system"})
    with pytest.raises(ValueError, match="detector 'os.system', but the detectors are"):
        open_run(folder, model=model).detector("fast")
    assert not ran.exists()


@pytest.mark.parametrize(
    "name",
    [
        "detector",
        "detector/fast",
        "detector/fast/detector.json",
        "detector/fast/detector.safetensors",
        "splits.json",
        "metrics.json",
    ],
)
def test_links_out_of_the_folder_are_not_followed(stranger, run, tmp_path, capsys, name):  # noqa: F811
    folder, outside = stranger("metrics.json"), tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    if name == "metrics.json":
        assert "which is not in the folder" in refused(capsys, "plot", f"circuit={folder}")
        return
    opened = open_run(folder, model=str(run[0] / "model"))
    with pytest.raises(ValueError, match="which is not in the folder"):
        opened.used() if name == "splits.json" else opened.detector("fast")


@pytest.mark.parametrize("name", ["../../other/fast", "/etc", "..", ""])
def test_a_detector_is_one_of_the_folder(stranger, run, name):  # noqa: F811
    opened = open_run(stranger("metrics.json"), model=str(run[0] / "model"))
    with pytest.raises((ValueError, FileNotFoundError)):
        opened.detector(name)


# ---- tampering -----------------------------------------------------------------------------------


def leaves(data, path=()):
    """The path of everything in JSON data, but for more than two of a list."""
    if path:
        yield path
    if isinstance(data, dict | list):
        items = data.items() if isinstance(data, dict) else enumerate(data[:2])
        for key, value in items:
            yield from leaves(value, (*path, key))


WRONG = (None, "x", -1, 1e300, [], {}, [[1]], True, {"name": "x"}, 10**400)


@pytest.mark.parametrize(
    "name", ["circuit.json", "metrics.json", "splits.json", "detector/fast/detector.json"]
)
def test_whatever_a_file_says_it_is_a_refusal_and_no_defect(stranger, run, name, monkeypatch):  # noqa: F811
    import mad.commands.plot as plot

    folder, model = stranger("metrics.json"), str(run[0] / "model")
    opened = open_run(folder, model=model)
    monkeypatch.setattr("mad.folder.load_model", lambda config: opened.model)
    monkeypatch.setattr("mad.folder.Engine", lambda *_, **__: opened.engine)
    original = json.loads((folder / name).read_text())
    wrong, refusals = itertools.cycle(WRONG), 0

    def read() -> None:
        if name == "metrics.json":
            return plot._caption(opened.circuit, plot._figures(folder))
        again = open_run(folder, model=model, allow_other_weights=True)
        again.used()
        again.detector(allow_other_weights=True)
        plot._title(again.circuit)

    paths = list(leaves(original))
    for path, value in zip((*paths, *paths), wrong):
        data = json.loads(json.dumps(original))
        *parents, last = path
        inner = data
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
        (folder / name).write_text(json.dumps(data))
        try:
            read()
        except (ValueError, OSError) as error:
            assert str(error), path
            refusals += 1
    assert refusals > len(paths) / 6


def test_changed_tensors_of_a_detector_are_refused(stranger, run):  # noqa: F811
    folder = stranger("metrics.json")
    path = folder / "detector" / "fast" / "detector.safetensors"
    state = load_file(path)
    save_file({**state, "calibration": state["calibration"] + 1}, path)
    with pytest.raises(ValueError, match="was changed after detector.json was written"):
        open_run(folder, model=str(run[0] / "model")).detector("fast")


@pytest.mark.parametrize("left_out", ["clean", "positions", "calibration"])
def test_tensors_that_a_detector_lacks_are_refused(stranger, run, left_out):  # noqa: F811
    from mad.saved_detector import _file_hash

    folder = stranger("metrics.json")
    path = folder / "detector" / "fast" / "detector.safetensors"
    state = load_file(path)
    del state[left_out]
    save_file(state, path)
    stranger("detector/fast/detector.json", tensors_hash=_file_hash(path))
    with pytest.raises(ValueError, match="fit the detector again"):
        open_run(folder, model=str(run[0] / "model")).detector("fast")


def test_a_pipe_in_place_of_tensors_is_not_waited_for(stranger, run):  # noqa: F811
    path = stranger("metrics.json") / "detector" / "fast" / "detector.safetensors"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"detector\.safetensors cannot be read \(it is no file\)"):
        open_run(path.parents[2], model=str(run[0] / "model")).detector("fast")


@pytest.mark.parametrize("noise", ["x", [1], 1e999, math.nan, {}])
def test_rounding_is_a_number(stranger, run, noise):  # noqa: F811
    folder = stranger("detector/fast/detector.json", noise=noise)
    with pytest.raises(ValueError, match="its calibration cannot be read.*fit the detector again"):
        open_run(folder, model=str(run[0] / "model")).detector("fast")


def test_no_setting_keeps_one_waiting_for_ever(stranger, run):  # noqa: F811
    folder = stranger("detector/fast/detector.json", config__explain_steps=10**9)
    with pytest.raises(ValueError, match="explain_steps=1000000000, but at most 10000"):
        open_run(folder, model=str(run[0] / "model")).detector("fast")


def test_tensors_that_no_memory_holds_are_refused(stranger, run):  # noqa: F811
    """A file that takes no room on the disk, and says that it is of 8 TB."""
    path = stranger("metrics.json") / "scores.safetensors"
    size = 2**43
    told = {"scores": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    header = json.dumps(told).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + size)
        except OSError:
            pytest.skip("this disk has no files of that size")
    with pytest.raises(ValueError, match=r"scores\.safetensors"):
        open_run(path.parent, model=str(run[0] / "model"))


@pytest.mark.parametrize("name", ["circuit.json", "detector/fast/detector.json"])
def test_half_a_character_is_no_text(stranger, run, name):  # noqa: F811
    folder = stranger(name, task="\ud800")
    with pytest.raises(ValueError, match="surrogates not allowed"):
        open_run(folder, model=str(run[0] / "model")).detector("fast")


# ---- copies of the model -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"vocab_size": 30}, "vocabulary 29, outputs 29, but this one has vocabulary 30"),
        ({"n_embd": 24}, "d_model 12, d_head 4, d_mlp 48, but this one has d_model 24"),
        ({"n_inner": 20}, "d_mlp 48, but this one has d_mlp 20"),
        ({"n_layer": 1}, "but this model is"),
    ],
)
def test_other_weights_have_the_architecture_of_the_circuits_model(
    run,  # noqa: F811
    tmp_path,
    changes,
    fact,  # noqa: F811
):
    tiny.gpt2_module(**changes).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=fact):
        open_run(run[0] / "run", model=str(tmp_path / "other"), allow_other_weights=True)


def test_another_family_is_no_copy(stranger, run, tmp_path):  # noqa: F811
    modules.gptj_module(n_embd=12, n_inner=48).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="a model of family gpt2, but this one has family gptj"):
        open_run(stranger("metrics.json"), model=str(tmp_path / "other"), allow_other_weights=True)


def test_an_old_circuit_does_not_vouch_for_other_weights(stranger, run, tmp_path):  # noqa: F811
    folder = stranger("circuit.json", model__architecture=None)
    assert open_run(folder, model=str(run[0] / "model")).circuit
    tiny.scaled_up(tiny.gpt2_module(), seed=9).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="does not say the architecture"):
        open_run(folder, model=str(tmp_path / "other"), allow_other_weights=True)
