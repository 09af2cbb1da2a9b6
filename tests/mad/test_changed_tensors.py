"""Tensors of a saved detector that someone has changed, with their hash: a score or a refusal in
one line, and never a traceback.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from circuits import Circuit, Engine
from mad.calibration import Calibrated, fit
from mad.detector import Context
from mad.detectors import DETECTORS
from mad.saved_detector import _file_hash, load_detector, save_detector
from tests import tiny

ENGINE = Engine(tiny.gpt2())
KEPT = torch.rand(ENGINE.graph.exists.shape, generator=torch.Generator().manual_seed(0)) < 0.5
KEPT &= ENGINE.graph.exists
CONTEXT = Context(ENGINE, Circuit(ENGINE.graph, KEPT, KEPT.float()))
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("fast", {"hosts": 2}),
    ("deviation", {}),
    ("nodes", {}),
    ("nodes", {"summary": "max"}),
    ("effects", {"summary": "tails", "steps": 1}),
    ("mahalanobis", {"layers": "1"}),
    ("token_count", {}),
]
DTYPES = [getattr(torch, name) for name in "int64 int32 uint8 bool float16 float32 float64".split()]
VALUES = [0, 1, -1, -2, 29, 10**6, 2**62, 1e38, math.nan, math.inf, -math.inf]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> list[Path]:
    """A folder for each detector."""
    folders = []
    for number, (name, chosen) in enumerate(SETTINGS):
        folders.append(tmp_path_factory.mktemp("detectors") / str(number) / name)
        config = DETECTORS[name].schema(**chosen)
        fitted = fit(config, CONTEXT, tiny.prompts(9, 1), tiny.prompts(5, 2), used={})
        save_detector(fitted, folders[-1], weight_hash="weights")
    return folders


def reshaped(tensor: Tensor, how: str) -> Tensor:
    if tensor.ndim == 0:
        return tensor[None]
    return {
        "flat": lambda: tensor.flatten(),
        "deeper": lambda: tensor[None],
        "none": lambda: tensor[:0],
        "one": lambda: tensor[:1],
        "twice": lambda: torch.cat([tensor, tensor]),
        "wider": lambda: torch.cat([tensor, tensor], -1),
        "narrow": lambda: tensor[..., :1],
        "turned": lambda: tensor.mT if tensor.ndim > 1 else tensor.flip(0),
        "number": lambda: tensor.flatten()[:1].sum().to(tensor.dtype),
    }[how]()


SHAPES = ["flat", "deeper", "none", "one", "twice", "wider", "narrow", "turned", "number"]
CHANGES = st.one_of(
    st.tuples(st.just("missing"), st.none()),
    st.tuples(st.just("shape"), st.sampled_from(SHAPES)),
    st.tuples(st.just("dtype"), st.sampled_from(DTYPES)),
    st.tuples(st.sampled_from(["first value", "all values"]), st.sampled_from(VALUES)),
)


def changed(state: Mapping[str, Tensor], name: str, change: tuple[str, Any]) -> dict[str, Tensor]:
    what, how = change
    new = {key: tensor.clone() for key, tensor in state.items()}
    if what == "missing":
        del new[name]
    elif what == "shape":
        new[name] = reshaped(new[name], how).contiguous()
    elif what == "dtype":
        new[name] = new[name].to(how)
    elif new[name].numel():
        value = torch.tensor(how, dtype=torch.float64).to(new[name].dtype)  # as C does
        new[name].view(-1)[: 1 if what == "first value" else None] = value
    return new


@contextlib.contextmanager
def tampered(folder: Path, state: Mapping[str, Tensor]) -> Iterator[None]:
    """With these tensors in the folder, and their hash; as it was afterwards."""
    path, about = folder / "detector.safetensors", folder / "detector.json"
    before = {file: file.read_bytes() for file in (path, about)}
    save_file(dict(state), path)
    about.write_text(json.dumps(json.loads(before[about]) | {"tensors_hash": _file_hash(path)}))
    try:
        yield
    finally:
        for file, content in before.items():
            file.write_bytes(content)


def load(folder: Path) -> Calibrated:
    return load_detector(folder, CONTEXT, weight_hash="weights")


def check(saved: list[Path], data: st.DataObject) -> None:
    folder = data.draw(st.sampled_from(saved))
    state = load_file(folder / "detector.safetensors")
    for _ in range(data.draw(st.integers(1, 2))):
        if state:
            state = changed(state, data.draw(st.sampled_from(sorted(state))), data.draw(CHANGES))
    try:
        with tampered(folder, state):
            assert load(folder).p_values(tiny.prompts(3, 4)).shape == (3,)
    except ValueError as refusal:
        assert str(refusal) and "\n" not in str(refusal)


def fuzz(examples: int):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, suppress_health_check=checks)


@fuzz(25)
@given(st.data())
def test_changed_tensors_give_a_score_or_one_line(saved, data):
    check(saved, data)


@pytest.mark.slow
@fuzz(3000)
@given(st.data())
def test_very_many_changed_tensors_give_a_score_or_one_line(saved, data):
    check(saved, data)


@pytest.mark.parametrize(
    ("kind", "name", "change", "message"),
    [
        (0, "clean", ("all values", 29), "clean is out of range"),
        (0, "lengths", ("first value", 2**62), "lengths is out of range"),
        (0, "positions", ("all values", -1), "positions names none in some host"),
        (0, "clean", ("shape", "one"), "clean is torch.int64 of shape"),
        (1, "first", ("shape", "wider"), r"first is torch.float64 of shape \(9, 24\), but it must"),
        (1, "rest", ("first value", math.nan), "rest is not finite"),
        (2, "usual.directions", ("dtype", torch.float16), "directions is torch.float16 of shape"),
        (3, "usual.scale", ("missing", None), "scale is missing"),
        (5, "typical", ("shape", "twice"), "typical is torch.float64 of shape"),
    ],
)
def test_what_is_wrong_is_named(saved, kind, name, change, message):
    state = load_file(saved[kind] / "detector.safetensors")
    with tampered(saved[kind], changed(state, name, change)):
        with pytest.raises(ValueError, match=f"{message}.*fit the detector again"):
            load(saved[kind])


def test_numbers_of_another_circuit_are_refused_when_they_are_compared(saved):
    """All that is saved of them agrees; only what is measured has another size."""
    state = load_file(saved[3] / "detector.safetensors")
    fewer = {k: t[:-1].contiguous() if k.startswith("usual") else t for k, t in state.items()}
    with tampered(saved[3], fewer):
        with pytest.raises(ValueError, match="but measures .*; fit the detector again"):
            load(saved[3]).score(tiny.prompts(3, 4))
