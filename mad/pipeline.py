"""A run folder: a circuit with its figures and a calibrated detector, made from trusted prompts in
one go.

    DIR/circuit.json, scores.safetensors    the circuit
    DIR/metrics.json                        its figures
    DIR/splits.json                         a hash of every trusted prompt, by what it was used for
    DIR/config.yaml                         the full configuration, overrides, seeds, versions and git commit
    DIR/detector/NAME/                      calibrated detectors

The trusted prompts are split into four disjoint parts: discovery finds the circuit, evaluation
measures it, fit takes the means that it is scored under, and calibration bounds false alarms.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from circuits.ablation import AblationConfig, fit_ablation
from circuits.circuit import Circuit
from circuits.engine import Engine
from circuits.engine.memory import parse_memory
from circuits.extraction import Extraction, extract
from circuits.faithfulness import faithfulness_scale
from circuits.metrics import metric_named
from circuits.model.load import LoadedModel, ModelConfig, load_model, local_path
from circuits.objective import prepare
from circuits.prompts import Prompts, prompts_from_records
from circuits.selection import Selection
from mad.calibration import Calibrated, check_alpha, fit, sequence_hashes
from mad.detector import Context
from mad.detectors import Fast
from mad.saved_detector import check_weights, load_detector, save_detector
from mad.tasks import TASKS

log = logging.getLogger(__name__)

PICTURES = tuple(
    f"{stem}.{form}"
    for stem, forms in (
        ("circuit", "svg png pdf"),
        ("positions", "svg png pdf"),
        ("curve", "png svg"),
    )
    for form in forms.split()
)
RUN_FILES = ("circuit.json", "scores.safetensors", "metrics.json", "splits.json", "config.yaml")


@dataclass
class Splits:
    """How many trusted prompts each part gets; scaled down together when there are fewer."""

    discovery: int = 200  # finds the circuit
    evaluation: int = 200  # measures it
    fit: int = 300  # gives the means that it is scored under
    calibration: int = 300  # bounds false alarms; alpha needs at least 1/alpha - 1


@dataclass
class RunConfig:
    """Everything that an extraction depends on."""

    model: Any = (
        "???"  # preset, hub name, HuggingFace folder, or X.pt | X.safetensors beside X.config.json
    )
    task: Any = "???"  # trusted prompts: a preset, or a file (JSONL, auto-circuit JSON, EAP-IG CSV)
    method: Any = "???"  # how edges are judged
    ablation: Any = field(
        default_factory=AblationConfig
    )  # what a removed edge carries during discovery
    detector: Any = field(
        default_factory=Fast
    )  # the detector that is fitted and calibrated at the end
    # what the circuit has to keep: kl, logit_diff, prob_diff, cross_entropy, accuracy
    metric: str = "logit_diff"
    selection: Selection = field(default_factory=Selection)  # which scored edges are kept
    splits: Splits = field(default_factory=Splits)  # trusted prompts for each purpose
    positions: bool = (
        False  # tell edges apart by position; for prompts that all have the same length
    )
    alpha: float = 0.01  # the false-alarm rate that calibration should allow
    # working memory beside the model's own weights: kB, MB, GB; decides how much runs at once
    memory: str = "2GB"
    random_draws: int = 20  # random circuits of the same size to compare with
    seed: int = 0  # of prompts, splits and random circuits
    out: str = "???"  # folder to write
    overwrite: bool = False  # replace what another run left in `out`
    overrides: list[str] = field(default_factory=list)  # filled in by madcap: the words as typed


@dataclass(frozen=True)
class Run:
    """A finished run, in memory."""

    folder: Path
    model: LoadedModel
    engine: Engine
    circuit: Circuit
    metrics: Mapping[str, Any]
    detector: Calibrated
    splits: Mapping[str, Prompts]


def make_run(config: RunConfig) -> Run:
    """Extracts a circuit, measures it, fits and calibrates a detector, and writes all into
    `config.out`.

    The circuit is written as soon as it is found, so that nothing is lost if the detector cannot be
    fitted.

    Raises:
        FileExistsError: the folder is in use.
        ValueError: see `circuits.extract` and `mad.fit`.
    """
    check_alpha(config.alpha)
    parse_memory(config.memory)
    config.detector.check()
    folder = Path(config.out)
    check_folder(folder, config.overwrite)
    model = load_model(config.model)
    splits = trusted_splits(config, model)
    engine = Engine(model, n_positions=_one_length(splits) if config.positions else None)
    extraction = extract(
        engine,
        splits["discovery"],
        splits["evaluation"],
        config.method,
        metric=config.metric,
        ablation=config.ablation,
        selection=config.selection,
        memory=config.memory,
        random_draws=config.random_draws,
        seed=config.seed,
        about={
            "model": _reference(config.model, model),
            "task": asdict(config.task),
            "seed": config.seed,
        },
    )
    clear(folder)
    extraction.circuit.save(folder)
    _write_json(folder / "metrics.json", extraction.metrics)
    hashes = {name: sequence_hashes(prompts) for name, prompts in splits.items()}
    _write_json(folder / "splits.json", hashes)
    _write_config(folder / "config.yaml", config)
    try:
        calibrated = fit(
            config.detector,
            Context(engine, extraction.circuit),
            splits["fit"],
            splits["calibration"],
            used={name: splits[name] for name in ("discovery", "evaluation")},
            memory=config.memory,
        )
    except ValueError as error:
        raise ValueError(
            f"the circuit is saved in {folder}, but its detector could not be fitted: {error}"
        ) from error
    save_detector(
        calibrated, folder / "detector" / config.detector.name, weight_hash=model.weight_hash
    )
    if problem := calibrated.calibration.problem(config.alpha):
        log.warning("scores are not calibrated: %s", problem)
    scoring = _scoring_faithfulness(engine, extraction, calibrated, splits, config)
    metrics = {**extraction.metrics, "scoring": scoring}
    _write_json(folder / "metrics.json", metrics)
    return Run(folder, model, engine, extraction.circuit, metrics, calibrated, splits)


def _one_length(splits: Mapping[str, Prompts]) -> int:
    """The length of all prompts.

    Raises:
        ValueError: they differ.
    """
    lengths = sorted({int(length) for prompts in splits.values() for length in prompts.lengths})
    if len(lengths) > 1:
        raise ValueError(
            f"positions=true, but the prompts have {lengths[0]} to {lengths[-1]} tokens: edges per "
            "position need "
            "templated prompts of one length; leave out positions, or the prompts of other lengths"
        )
    return lengths[0]


@dataclass(frozen=True)
class Opened:
    """A run folder read back, with its model loaded and checked."""

    folder: Path
    model: LoadedModel
    engine: Engine
    circuit: Circuit

    def detector(self, name: str, *, allow_other_weights: bool = False) -> Calibrated:
        """The run's calibrated detector of that name."""
        return load_detector(
            self.folder / "detector" / name,
            Context(self.engine, self.circuit),
            weight_hash=self.model.weight_hash,
            allow_other_weights=allow_other_weights,
        )


def open_run(
    folder: Path,
    *,
    model: str | None = None,
    device: str = "cpu",
    allow_other_weights: bool = False,
) -> Opened:
    """Reads a run folder and loads the model that its circuit names.

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


def load_trusted(records: list[dict], model: LoadedModel) -> Prompts:
    """Different trusted records as the model's prompts.

    Raises:
        ValueError: some are labelled anomalous, or what the records do wrong.
    """
    prompts = load_prompts(records, model)
    if prompts.labels is not None and bool(prompts.labels.any()):
        raise ValueError(
            f"{int(prompts.labels.sum())} of {len(prompts)} trusted prompts are labelled anomalous "
            "(label=1); "
            "trusted prompts must be normal"
        )
    return prompts.deduplicated()


def load_prompts(records: list[dict], model: LoadedModel) -> Prompts:
    """Records as the model's prompts: its tokenizer, BOS, context and vocabulary."""
    return prompts_from_records(
        records,
        tokenizer=model.tokenizer,
        prepend_bos=model.prepend_bos,
        max_length=model.context,
        vocabulary=model.vocabulary,
        outputs=model.outputs,
    )


def trusted_splits(config: RunConfig, model: LoadedModel) -> dict[str, Prompts]:
    """The four disjoint parts of a task's trusted prompts.

    Raises:
        ValueError: fewer than four different prompts, or what the task's records do wrong.
    """
    sizes = asdict(config.splits)
    total = sum(sizes.values())
    prompts = load_trusted(TASKS[config.task.name].generate(config.task, total, config.seed), model)
    if len(prompts) < len(sizes):
        raise ValueError(
            f"{len(prompts)} different trusted prompts, but at least {len(sizes)} are needed"
        )
    if len(prompts) < total:
        spare = len(prompts) - len(sizes)  # each part gets one prompt, and its share of the rest
        sizes = {
            name: 1 + (size - 1) * spare // (total - len(sizes)) for name, size in sizes.items()
        }
        log.warning("only %d different trusted prompts; split into %s", len(prompts), sizes)
    return prompts.split(sizes, config.seed)


def _scoring_faithfulness(
    engine: Engine,
    extraction: Extraction,
    calibrated: Calibrated,
    splits: Mapping[str, Prompts],
    config: RunConfig,
) -> dict[str, Any] | None:
    """Faithfulness under the detector's own ablation, which new inputs are scored under; warns
    below one half.
    """
    name = calibrated.detector.scores_under
    if name is None:
        return None
    ablation = fit_ablation(AblationConfig(name), engine, splits["fit"], memory=config.memory)
    metric = metric_named(config.metric)
    try:
        objective = prepare(engine, splits["evaluation"], metric, ablation, memory=config.memory)
        result = faithfulness_scale(objective).faithfulness(extraction.circuit.mask)
    except ValueError as error:
        log.warning("no faithfulness under the detector's ablation: %s", error)
        return {"ablation": name, "faithfulness": None}
    if result.value < 0.5:
        log.warning(
            "under the ablation that inputs are scored with (%s) the circuit's faithfulness is "
            "only %.2f; "
            "scores will be noisy: keep more edges, or discover with ablation=%s",
            name,
            result.value,
            name,
        )
    return {"faithfulness": result.value, **asdict(result)}


def _reference(config: ModelConfig, model: LoadedModel) -> dict[str, Any]:
    """How to load the same model again."""

    def absolute(path: str) -> str:
        return (
            str(local_path(path).resolve())
            if not path.startswith("pkg://") and local_path(path).exists()
            else path
        )

    return {
        "path": absolute(config.path),
        "dtype": config.dtype,
        "prepend_bos": model.prepend_bos,
        "split_input": config.split_input,
        "head": None if config.head is None else absolute(config.head),
        "weight_hash": model.weight_hash,
    }


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")


def _write_config(path: Path, config: RunConfig) -> None:
    import yaml

    packages = ("madcap", "torch", "transformers", "transformer-lens")
    made_with = {
        "python": sys.version.split()[0],
        **{name: version(name) for name in packages},
        "git": _git_commit(),
    }
    path.write_text(yaml.safe_dump({**asdict(config), "made_with": made_with}, sort_keys=False))


def _git_commit() -> str | None:
    """The commit of madcap's own checkout, when it runs from one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
