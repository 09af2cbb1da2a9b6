"""A fitted, calibrated detector on disk: `detector.json` and `detector.safetensors` in a folder of
its own.

It remembers which weights, circuit and trusted prompts it was made with, and refuses others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from circuits.prompts import Prompts
from mad.detector import Calibration, Context, Detector
from mad.detectors import DETECTORS

FORMAT = 1


@dataclass(frozen=True)
class Calibrated:
    """A detector with its calibration; `about` names the trusted prompts of both."""

    detector: Detector
    calibration: Calibration
    about: Mapping[str, Any]


def fit(
    config: Any,
    context: Context,
    trusted: Prompts,
    calibration: Prompts,
    *,
    used: Mapping[str, Sequence[str]] | None = None,
    memory: str = "2GB",
) -> Calibrated:
    """Fits a detector on trusted prompts and calibrates it on others.

    Args: config: the configuration of a detector, such as `Fast()`; its `name` picks it from
        `DETECTORS`. context: the model, and the circuit where the detector needs one. trusted:
        prompts to fit on. calibration: prompts to calibrate on, exchangeable with the normal inputs
        to come. used: `sequence_hashes` of prompts that found or measured the circuit, by what they
        were used for. memory: working memory beside the model's own weights, such as 500MB.

    Raises:
        ValueError: the sets overlap each other or those that the circuit was found or evaluated on.
    """
    if shared := trusted.overlap(calibration):
        raise ValueError(
            f"{shared} prompts are in both the fit and the calibration split; they must be disjoint"
        )
    for name, prompts in (("fit", trusted), ("calibration", calibration)):
        own = set(sequence_hashes(prompts))
        for split, hashes in (used or {}).items():
            if shared := len(own.intersection(hashes)):
                raise ValueError(
                    f"{shared} prompts of the {name} split are in the circuit's {split} split; "
                    "they must be disjoint, "
                    "or false alarms would not be bounded: give other trusted prompts"
                )
    detector = DETECTORS[config.name][1](config, context, trusted, memory=memory)
    scores = detector.score(calibration, memory=memory)
    about = {
        name: {"prompts": len(prompts), "hash": prompts.hash()}
        for name, prompts in (("fit", trusted), ("calibration", calibration))
    }
    return Calibrated(detector, Calibration.of(scores), about)


def sequence_hashes(prompts: Prompts) -> list[str]:
    """A short hash of each clean token sequence, to find overlaps between runs without keeping the
    prompts.
    """
    return sorted(
        hashlib.sha256(" ".join(map(str, sequence)).encode()).hexdigest()[:16]
        for sequence in prompts.sequences()
    )


def save_detector(calibrated: Calibrated, folder: Path, *, weight_hash: str) -> None:
    """Writes a detector into its folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "format": FORMAT,
        "config": asdict(calibrated.detector.config),
        "weight_hash": weight_hash,
        "circuit_hash": _circuit_hash(calibrated.detector),
        **calibrated.about,
    }
    tensors = {
        name: tensor.cpu().contiguous() for name, tensor in calibrated.detector.state().items()
    }
    save_file(
        {**tensors, "calibration": calibrated.calibration.scores}, folder / "detector.safetensors"
    )
    (folder / "detector.json").write_text(json.dumps(data, indent=1) + "\n")


def load_detector(
    folder: Path, context: Context, *, weight_hash: str, allow_other_weights: bool = False
) -> Calibrated:
    """Reads a detector from its folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: another format, an unknown detector, or one fitted on other weights.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "detector.json"
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
        fields, found_on, circuit_hash = (
            data.pop(key) for key in ("config", "weight_hash", "circuit_hash")
        )
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no detector file that can be read: {error}") from error
    check_weights(found_on, weight_hash, f"detector {folder.name}", allow_other_weights)
    if fields.get("name") not in DETECTORS:
        raise ValueError(
            f"{path}: detector {fields.get('name')!r}, but the detectors are {', '.join(DETECTORS)}"
        )
    schema, _, restore = DETECTORS[fields["name"]]
    try:
        config = schema(**fields)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error
    tensors = folder / "detector.safetensors"
    try:
        state = load_file(tensors)
        calibration = Calibration.of(state.pop("calibration"))
    except (OSError, KeyError, SafetensorError) as error:
        raise ValueError(f"{tensors} cannot be read ({error}); fit the detector again") from error
    detector = restore(config, context, state)
    if circuit_hash != _circuit_hash(detector):
        raise ValueError(
            f"detector {folder.name} was calibrated on circuit {str(circuit_hash)[:16]}, but the "
            "circuit there now is "
            f"{str(_circuit_hash(detector))[:16]}; fit it again with `madcap fit ... "
            "overwrite=true`"
        )
    return Calibrated(detector, calibration, data)


def _circuit_hash(detector: Detector) -> str | None:
    """Of the circuit that a detector scores against; None where it needs none."""
    circuit = getattr(detector, "circuit", None)
    return None if circuit is None else circuit.hash()


def check_weights(expected: str, found: str, what: str, allow_other_weights: bool) -> None:
    """Raises ValueError when a model has other weights than those that `what` was made with."""
    if expected != found and not allow_other_weights:
        raise ValueError(
            f"the {what} was made on weights {expected[:16]}..., but this model has "
            f"{found[:16]}...; give the model it "
            "was made on, or allow_other_weights=true for a fine-tuned or attacked copy"
        )
