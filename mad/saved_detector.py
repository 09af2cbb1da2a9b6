"""A fitted, calibrated detector on disk: `detector.json` and `detector.safetensors` in a folder.

It remembers which weights, circuit and trusted prompts it was made with, and refuses others.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from circuits.files import own_file, read_json, read_tensors, restored, write_json, write_tensors
from mad.calibration import Calibrated, Calibration
from mad.detector import Context, Detector, DetectorKind
from mad.detectors import DETECTORS

FORMAT = 1
FILES = ("detector.json", "detector.safetensors")


def save_detector(calibrated: Calibrated, folder: Path, *, weight_hash: str) -> None:
    """Writes a detector into its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = folder / "detector.safetensors"
    state = {**calibrated.detector.state(), "calibration": calibrated.calibration.scores}
    write_tensors(tensors, state)
    data = {
        "format": FORMAT,
        "config": asdict(calibrated.detector.config),
        "weight_hash": weight_hash,
        "circuit_hash": circuit_hash(calibrated.detector),
        "tensors_hash": _file_hash(tensors),
        **calibrated.about,
    }
    write_json(folder / "detector.json", data)


def detectors_in(folder: Path) -> list[str]:
    """The names of the detectors in a folder of detectors."""
    found = folder.glob("*/detector.json")
    return sorted(path.parent.name for path in found if path.parent.name in DETECTORS)


def load_detector(
    folder: Path,
    context: Context,
    *,
    weight_hash: str,
    allow_other_weights: bool = False,
    memory: str = "2GB",
) -> Calibrated:
    """Reads a detector from its folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: another format, an unknown detector, or one fitted on other weights.
    """
    path = own_file(folder, "detector.json")
    data = _read(path)
    found_on, expected = data.pop("weight_hash"), data.pop("circuit_hash")
    check_weights(found_on, weight_hash, f"detector {folder.name}", allow_other_weights)
    kind, config = _config(data.pop("config"), path)
    state, scores = _read_tensors(folder, data.pop("tensors_hash", None))
    try:
        calibration = Calibration.restored(scores, data)
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path}: its calibration cannot be read ({error}); fit the detector again"
        ) from error
    try:
        detector = kind.restore(config, context, state, memory=memory)
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{folder}: detector.safetensors is not what a detector {config.name} keeps "
            f"({type(error).__name__}: {error}); fit the detector again"
        ) from error
    if expected != (found := circuit_hash(detector)):
        raise ValueError(
            f"detector {folder.name} was calibrated on circuit {str(expected)[:16]}, but the "
            f"circuit there now is {str(found)[:16]}; fit it again with `madcap fit ... "
            "overwrite=true`"
        )
    return Calibrated(detector, calibration, data)


def _read(path: Path) -> dict[str, Any]:
    """What `detector.json` says."""
    folder = path.parent
    if not path.is_file():
        there = detectors_in(folder.parent)
        raise FileNotFoundError(
            f"no detector at {folder}: fit it with `madcap fit circuit=... detector={folder.name} "
            "trusted=FILE`" + (f", or use detector={'|'.join(there)}" if there else "")
        )
    try:
        data = read_json(path)
        if (version := data.pop("format")) != FORMAT:
            raise ValueError(f"it has format {version}, but this version reads format {FORMAT}")
        if missing := {"config", "weight_hash", "circuit_hash"} - set(data):
            raise ValueError(f"it lacks {min(missing)!r}")
        if not isinstance(data["weight_hash"], str):
            raise ValueError(f"weight_hash is {data['weight_hash']!r}, but it must be text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no detector file that can be read: {error}") from error
    return data


def _config(told: Any, path: Path) -> tuple[DetectorKind, Any]:
    """The kind of detector that `detector.json` names, and its configuration."""
    name = told.get("name") if isinstance(told, dict) else None
    if not isinstance(name, str) or name not in DETECTORS:
        raise ValueError(f"{path}: detector {name!r}, but the detectors are {', '.join(DETECTORS)}")
    return DETECTORS[name], restored(DETECTORS[name].schema, told, f"{path}: config")


def _read_tensors(folder: Path, expected: Any) -> tuple[dict[str, Tensor], Tensor]:
    path = own_file(folder, "detector.safetensors")
    try:
        if not path.is_file():  # reading a pipe would wait for ever
            raise ValueError("it is no file")
        if expected is not None and _file_hash(path) != expected:
            raise ValueError("it was changed after detector.json was written")
        state = read_tensors(path)
        scores = state.pop("calibration")
        if scores.ndim != 1 or not scores.is_floating_point():
            raise TypeError(f"calibration is {scores.dtype} of shape {tuple(scores.shape)}")
        return state, scores
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); fit the detector again") from error


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def circuit_hash(detector: Detector) -> str | None:
    """Of the circuit that a detector scores against; None where it needs none."""
    return None if detector.circuit is None else detector.circuit.hash()


def check_weights(expected: str, found: str, what: str, allow_other_weights: bool) -> None:
    """Raises ValueError when a model has other weights than those that `what` was made with."""
    if expected != found and not allow_other_weights:
        raise ValueError(
            f"the {what} was made on weights {expected[:16]}..., but this model has "
            f"{found[:16]}...; give the model it was made on, or allow_other_weights=true for a "
            "fine-tuned or attacked copy"
        )
