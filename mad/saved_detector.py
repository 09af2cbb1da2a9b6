"""A fitted, calibrated detector on disk: `detector.json` and `detector.safetensors` in a folder.

It remembers which weights, circuit and trusted prompts it was made with, and refuses others.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from mad.calibration import Calibrated, Calibration
from mad.detector import Context, Detector
from mad.detectors import DETECTORS

FORMAT = 1


def save_detector(calibrated: Calibrated, folder: Path, *, weight_hash: str) -> None:
    """Writes a detector into its folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "format": FORMAT,
        "config": asdict(calibrated.detector.config),
        "weight_hash": weight_hash,
        "circuit_hash": circuit_hash(calibrated.detector),
        **calibrated.about,
    }
    state = {**calibrated.detector.state(), "calibration": calibrated.calibration.scores}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "detector.safetensors")
    (folder / "detector.json").write_text(json.dumps(data, indent=1) + "\n")


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
    path = folder / "detector.json"
    data = _read(path)
    config, found_on, expected = (
        data.pop(key) for key in ("config", "weight_hash", "circuit_hash")
    )
    check_weights(found_on, weight_hash, f"detector {folder.name}", allow_other_weights)
    name = config.get("name")
    if name not in DETECTORS:
        raise ValueError(f"{path}: detector {name!r}, but the detectors are {', '.join(DETECTORS)}")
    kind = DETECTORS[name]
    try:
        config = kind.schema(**config)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error
    state, calibration = _read_tensors(folder / "detector.safetensors")
    detector = kind.restore(config, context, state, memory=memory)
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
        there = sorted(found.parent.name for found in folder.parent.glob("*/detector.json"))
        raise FileNotFoundError(
            f"no detector at {folder}: fit it with `madcap fit circuit=... detector={folder.name} "
            "trusted=FILE`" + (f", or use detector={'|'.join(there)}" if there else "")
        )
    try:
        data = json.loads(path.read_text())
        if (version := data.pop("format")) != FORMAT:
            raise ValueError(f"it has format {version}, but this version reads format {FORMAT}")
        if missing := {"config", "weight_hash", "circuit_hash"} - set(data):
            raise KeyError(min(missing))
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no detector file that can be read: {error}") from error
    return data


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], Calibration]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
        return state, Calibration.of(state.pop("calibration"))
    except (OSError, KeyError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); fit the detector again") from error


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
