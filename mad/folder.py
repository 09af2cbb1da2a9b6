"""A run folder: what is in it, whether it may be written, and reading it back with its model.

DIR/circuit.json, scores.safetensors    the circuit
DIR/metrics.json                        its figures
DIR/splits.json                         a hash of every trusted prompt, by its part
DIR/config.yaml                         the full configuration, overrides, seeds, versions and
                                        git commit
DIR/detector/NAME/                      calibrated detectors
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from circuits.circuit import Circuit
from circuits.engine import Engine
from circuits.model.load import LoadedModel, ModelConfig, load_model, local_path
from mad.calibration import Calibrated
from mad.detector import Context
from mad.saved_detector import check_weights, load_detector

_PICTURES = {"circuit": "svg png pdf", "positions": "svg png pdf", "curve": "png svg"}
PICTURES = [f"{stem}.{form}" for stem, forms in _PICTURES.items() for form in forms.split()]
RUN_FILES = ("circuit.json", "scores.safetensors", "metrics.json", "splits.json", "config.yaml")


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that holds something, unless it holds a run that may be overwritten.

    Raises:
        FileExistsError: it is a file, in use, or holds something that is no run.
    """
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; choose another out=")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{folder} is in use; choose another out=, or overwrite=true")
        if not any((folder / name).is_file() for name in RUN_FILES):
            raise FileExistsError(
                f"{folder} holds something that is no madcap run; choose another out="
            )


def clear(folder: Path) -> None:
    """Removes what an earlier run wrote, once there is something to put in its place."""
    for name in (*RUN_FILES, *PICTURES):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "detector", ignore_errors=True)


@dataclass(frozen=True)
class Opened:
    """A run folder read back, with its model loaded and checked."""

    folder: Path
    model: LoadedModel
    engine: Engine
    circuit: Circuit

    def detector(
        self, name: str, *, allow_other_weights: bool = False, memory: str = "2GB"
    ) -> Calibrated:
        """The run's calibrated detector of that name."""
        return load_detector(
            self.folder / "detector" / name,
            Context(self.engine, self.circuit),
            weight_hash=self.model.weight_hash,
            allow_other_weights=allow_other_weights,
            memory=memory,
        )


def open_run(
    folder: Path,
    *,
    model: str | None = None,
    device: str = "cpu",
    allow_other_weights: bool = False,
) -> Opened:
    """Reads a run folder and loads the model that its circuit names.

    >>> from circuits import EAP, ModelConfig, Selection
    >>> from circuits.tasks.recall import Recall
    >>> from mad import MaxProbability, RunConfig, make_run
    >>> model = ModelConfig("pkg://mad/models/recall_redirect")
    >>> config = RunConfig(model, Recall(), EAP(), detector=MaxProbability(), out="opened")
    >>> config.selection, config.random_draws = Selection(edges=30), 0
    >>> opened = open_run(make_run(config).folder)
    >>> len(opened.circuit) <= 30, opened.detector("max_probability").detector.config.name
    (True, 'max_probability')

    Args:
        folder: what `madcap extract` wrote.
        model: another place to load the model from.
        device: where to run it.
        allow_other_weights: accept a model with other weights than the circuit was found on.

    Raises:
        FileNotFoundError: no circuit there, or its model is gone.
        ValueError: the model has other weights, or another shape.
    """
    circuit = Circuit.load(folder)
    reference = dict(circuit.about.get("model") or {})
    if "weight_hash" not in reference:
        raise ValueError(
            f"the circuit in {folder} does not say which model it was found on; extract it again"
        )
    found_on = reference.pop("weight_hash")
    if model is not None:
        reference["path"] = model
    loaded = load_model(ModelConfig(**{**reference, "device": device}))
    check_weights(found_on, loaded.weight_hash, "circuit", allow_other_weights)
    engine = Engine(loaded, n_positions=circuit.graph.n_positions)
    if engine.graph != circuit.graph:
        raise ValueError(f"the circuit is of {circuit.graph}, but this model is {engine.graph}")
    return Opened(folder, loaded, engine, circuit)


def model_reference(config: ModelConfig, model: LoadedModel) -> dict[str, Any]:
    """How to load the same model again."""

    def absolute(path: str) -> str:
        here = not path.startswith("pkg://") and local_path(path).exists()
        return str(local_path(path).resolve()) if here else path

    return {
        "path": absolute(config.path),
        "dtype": config.dtype,
        "prepend_bos": model.prepend_bos,
        "split_input": config.split_input,
        "head": None if config.head is None else absolute(config.head),
        "weight_hash": model.weight_hash,
    }


def write_json(path: Path, data: Any) -> None:
    """Writes data that people may read."""
    path.write_text(json.dumps(data, indent=1) + "\n")


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Writes a configuration with what it was run with."""
    import yaml

    packages = ("madcap", "torch", "transformers", "transformer-lens")
    made_with = {
        "python": sys.version.split()[0],
        **{name: version(name) for name in packages},
        "git": _git_commit(),
    }
    path.write_text(yaml.safe_dump({**config, "made_with": made_with}, sort_keys=False))


def _git_commit() -> str | None:
    """The commit of madcap's own checkout, when it runs from one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
