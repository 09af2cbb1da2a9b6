"""A run folder: what is in it, whether it may be written, and reading it back with its model.

DIR/circuit.json, scores.safetensors    the circuit
DIR/ablation.safetensors                constants that were trained for it, with ablation=optimal
DIR/metrics.json                        its figures
DIR/evaluation.json                     all its figures, if `madcap evaluate` was run
DIR/splits.json                         a hash of every trusted prompt, by its part
DIR/config.yaml                         the full configuration, overrides, seeds, versions and
                                        git commit; never read back
DIR/detector/NAME/                      calibrated detectors

A folder may be a stranger's: docs/run-folders.md says what is and is not done for it.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from circuits.ablation import ABLATIONS, Ablation, restore_ablation
from circuits.circuit import Circuit
from circuits.engine import Engine
from circuits.files import own_file, read_json, read_tensors
from circuits.model.load import LoadedModel, load_model
from mad.calibration import Calibrated
from mad.detector import Context
from mad.known_models import remember
from mad.model_reference import Reference
from mad.saved_detector import check_weights, detectors_in, load_detector
from mad.staging import Staged, staged

log = logging.getLogger(__name__)

_PICTURES = {
    "circuit": "svg png pdf",
    "positions": "svg png pdf",
    "curve": "png svg",
    "training": "png svg",
    "evaluation": "png svg",
}
PICTURES = [f"{stem}.{form}" for stem, forms in _PICTURES.items() for form in forms.split()]
EVALUATION = "evaluation.json"  # what `madcap evaluate` adds
ABLATION = "ablation.safetensors"
RUN_FILES = (
    "circuit.json",
    "scores.safetensors",
    ABLATION,
    "metrics.json",
    "splits.json",
    "config.yaml",
)
RESERVED = "reserved"  # room on the disk for the circuit, held while it is looked for
DEFAULT_DETECTOR = "fast"  # where a run has several, and none is named


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


def staged_run(folder: Path, overwrite: bool) -> AbstractContextManager[Staged]:
    """A run folder to be written, that takes the place of what is there once it is complete.

    Raises:
        FileExistsError: as `check_folder`, or another run writes there.
        OSError: it cannot be written.
    """
    check_folder(folder, overwrite)
    ours = (*RUN_FILES, EVALUATION, *PICTURES, "detector", RESERVED)
    return staged(folder, ours=ours, keep="circuit.json", overwrite=overwrite)


@dataclass(frozen=True)
class Opened:
    """A run folder read back, with its model loaded and checked."""

    folder: Path
    model: LoadedModel
    engine: Engine
    circuit: Circuit

    @property
    def detectors(self) -> list[str]:
        """The names of the run's calibrated detectors."""
        return detectors_in(self.folder / "detector")

    def detector(
        self, name: str | None = None, *, allow_other_weights: bool = False, memory: str = "2GB"
    ) -> Calibrated:
        """The run's calibrated detector of that name; None: its only one, or `fast` of several.

        Raises:
            FileNotFoundError: it has none of that name, or several and no name is given.
            ValueError: it cannot be read, or was fitted on other weights.
        """
        if name is None:
            name = self._usual_detector()
        own_file(self.folder, f"detector/{name}/detector.json")
        return load_detector(
            self.folder / "detector" / name,
            Context(self.engine, self.circuit),
            weight_hash=self.model.weight_hash,
            allow_other_weights=allow_other_weights,
            memory=memory,
        )

    def _usual_detector(self) -> str:
        names = self.detectors
        if len(names) > 1 and DEFAULT_DETECTOR not in names:
            raise FileNotFoundError(
                f"{self.folder} has several detectors; choose detector={'|'.join(names)}"
            )
        return names[0] if len(names) == 1 else DEFAULT_DETECTOR

    def ablation(self) -> Ablation | None:
        """The constants that were trained for the circuit; None where its ablation has none.

        Raises:
            ValueError: they cannot be read, or are of another model.
        """
        name = self.circuit.says("ablation")
        if name not in ABLATIONS or not ABLATIONS[name].learned:
            return None
        path = own_file(self.folder, ABLATION)
        if not path.is_file():
            log.warning("there is no %s, so that ablation=%s is trained anew", path, name)
            return None
        try:
            return restore_ablation(name, self.engine, read_tensors(path))
        except (KeyError, IndexError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}); extract again, or delete it"
            ) from error

    def used(self) -> dict[str, list[str]]:
        """Hashes of the prompts that the circuit was found and measured on; errors as `splits`."""
        return {name: self.splits()[name] for name in ("discovery", "evaluation")}

    def splits(self) -> dict[str, list[str]]:
        """Hashes of all trusted prompts, by their part.

        Raises:
            FileNotFoundError: the folder does not say.
            ValueError: `splits.json` cannot be read.
        """
        splits = own_file(self.folder, "splits.json")
        if not splits.is_file():
            raise FileNotFoundError(
                f"no {splits}, which tells what the circuit was found and measured on; without it "
                "false alarms could not be bounded: extract again"
            )
        try:
            data = read_json(splits)
            parts = {name: list(data[name]) for name in ("discovery", "evaluation")}
            parts |= {name: list(hashes) for name, hashes in data.items()}
            if not all(isinstance(hashed, str) for part in parts.values() for hashed in part):
                raise TypeError("a hash is no text")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{splits} cannot be read ({error}); extract again") from error
        return parts


def open_run(
    folder: Path,
    *,
    model: str | None = None,
    head: str | None = None,
    device: str = "cpu",
    allow_other_weights: bool = False,
) -> Opened:
    """Reads a run folder and loads the model that its circuit names.

    Nothing outside of the folder is read, and nothing is fetched, for a model that the user has not
    named to madcap before (`mad.known_models`); say `model=` then.

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
        head: another place to load its head from, where it has one of its own.
        device: where to run it.
        allow_other_weights: accept a model with other weights than the circuit was found on.

    Raises:
        FileNotFoundError: no circuit there, or its model is gone.
        ValueError: the folder names a model that the user has never named, or the model has other
            weights, or another shape.
    """
    circuit, source = Circuit.load(folder), folder / "circuit.json" if folder.is_dir() else folder
    reference = Reference.of(circuit, source)
    loaded = load_model(reference.named(source, model, head, device))
    remember(model, head)
    reference.check_architecture(loaded, allow_other_weights)
    check_weights(reference.weight_hash, loaded.weight_hash, "circuit", allow_other_weights)
    engine = Engine(loaded, n_positions=circuit.graph.n_positions)
    if engine.graph != circuit.graph:
        raise ValueError(f"the circuit is of {circuit.graph}, but this model is {engine.graph}")
    return Opened(folder, loaded, engine, circuit)


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
