"""From a configuration to a run folder: a circuit with its figures and a calibrated detector."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from circuits.ablation import AblationConfig, fit_ablation
from circuits.circuit import Circuit
from circuits.engine import Engine
from circuits.extraction import EXACT_SAMPLE, Extraction, extract
from circuits.faithfulness import faithfulness_scale
from circuits.files import write_json, write_tensors
from circuits.metrics import metric_named
from circuits.model.load import LoadedModel
from circuits.objective import prepare
from circuits.parts.circuit import UnitCircuit
from circuits.parts.division import EDGES, UnitsConfig
from circuits.prompts import Prompts
from circuits.selection import Selection
from mad.calibration import Calibrated, fit, sequence_hashes
from mad.detector import Context
from mad.detectors import Fast
from mad.folder import ABLATION, RESERVED, staged_run, write_config
from mad.known_models import recorded
from mad.model_reference import model_reference
from mad.preparation import Prepared, check_settings, metric_of, prepare_run
from mad.saved_detector import save_detector
from mad.staging import Staged
from mad.trusted import Splits

log = logging.getLogger(__name__)


@dataclass
class RunConfig:
    """Everything that an extraction depends on."""

    # preset, hub name, HuggingFace folder, X.gguf, or X.pt | X.safetensors beside X.config.json
    model: Any = "???"
    # trusted prompts: a preset, or a file (JSONL, auto-circuit JSON, EAP-IG CSV)
    task: Any = "???"
    method: Any = "???"  # how edges are judged
    # what a removed edge carries during discovery
    ablation: Any = field(default_factory=AblationConfig)
    # what the circuit is made of; a detector is fitted to one of edges only
    units: Any = field(default_factory=UnitsConfig)
    # the detector that is fitted and calibrated at the end
    detector: Any = field(default_factory=Fast)
    # what the circuit has to keep: kl, logit_diff, prob_diff, cross_entropy, accuracy;
    # null: kl, and logit_diff for eap and atp_star, which kl gives no gradient
    metric: str | None = None
    selection: Selection = field(default_factory=Selection)  # which scored edges are kept
    splits: Splits = field(default_factory=Splits)  # trusted prompts for each purpose
    # tell edges apart by position; for prompts that all have the same length
    positions: bool = False
    # the false-alarm rate that calibration should allow, or there is no run; null: 0.01, or what
    # it allows
    alpha: float | None = None
    # working memory beside the model's own weights: kB, MB, GB; decides how much runs at once
    memory: str = "2GB"
    random_draws: int = 20  # random circuits of the same size to compare with
    # of methods that estimate what each removal does: so many edges (or units) are really removed,
    # one at a time, and the ranks of both are correlated; 0: none
    exact_sample: int = EXACT_SAMPLE
    accept_worse: bool = False  # even a circuit that is worse than none by another metric
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


@dataclass(frozen=True)
class UnitRun:
    """A finished run whose circuit is of units, in memory; it has no detector."""

    folder: Path
    model: LoadedModel
    engine: Engine
    circuit: UnitCircuit
    metrics: Mapping[str, Any]
    splits: Mapping[str, Prompts]


def make_run(config: RunConfig) -> Run:
    """Extracts a circuit, measures it, fits a detector, and writes all into `config.out`.

    The circuit is written as soon as it is found, before it is measured, into OUT.partial, which
    takes the place of OUT when all is done: until then what was there stays.  If the detector
    cannot be fitted, the circuit is kept all the same.

    >>> from circuits import EAP, ModelConfig, Selection
    >>> from circuits.tasks.recall import Recall
    >>> from mad import MaxProbability, RunConfig
    >>> model = ModelConfig("pkg://mad/models/recall_redirect")
    >>> config = RunConfig(model, Recall(), EAP(), detector=MaxProbability(), out="run")
    >>> config.selection, config.random_draws = Selection(edges=30), 0
    >>> sorted(path.name for path in make_run(config).folder.glob("*.json"))
    ['circuit.json', 'metrics.json', 'splits.json']

    Raises:
        FileExistsError: the folder is in use.
        ValueError: see `circuits.extract` and `mad.fit`; or the circuit is to be of units.
    """
    check_settings(config)
    if config.units.name != EDGES:
        raise ValueError(
            f"units={config.units.name}, but detectors read edges; use make_unit_run or units=edges"
        )
    with staged_run(Path(config.out), config.overwrite) as place:
        prepared = prepare_run(config)
        extraction = _extracted(config, prepared, place)
        _write_figures(config, prepared, extraction, place.folder)
        if extraction.ablation.learned:
            write_tensors(place.folder / ABLATION, extraction.ablation.state())
        try:
            calibrated = _calibrated(config, prepared, extraction, place.folder)
        except ValueError as error:
            saved = place.folder if place.replaces else place.publish()
            raise ValueError(
                f"the circuit is saved in {saved}, but its detector could not be fitted: {error}"
            ) from error
        engine, splits = prepared.engine, prepared.splits
        scoring = _scoring_faithfulness(engine, extraction, calibrated, splits, config)
        metrics = {**extraction.metrics, "scoring": scoring}
        write_json(place.folder / "metrics.json", metrics)
        place.publish()
    folder, circuit = Path(config.out), extraction.circuit
    assert isinstance(circuit, Circuit)
    return Run(folder, prepared.model, engine, circuit, metrics, calibrated, splits)


def make_unit_run(config: RunConfig) -> UnitRun:
    """Extracts a circuit of units, measures it, and writes both into `config.out`.

    No detector is fitted: they all read edges.  The rest is as in `make_run`.

    >>> from circuits import EAPIG, ModelConfig, Selection
    >>> from circuits.parts import UnitsConfig
    >>> from circuits.tasks.recall import Recall
    >>> model = ModelConfig("pkg://mad/models/recall_redirect")
    >>> config = RunConfig(model, Recall(), EAPIG(), units=UnitsConfig("nodes"), out="nodes")
    >>> config.selection, config.random_draws = Selection(units=6), 0
    >>> make_unit_run(config).circuit
    UnitCircuit(6 of 11 units, method=eap_ig, metric=kl, ablation=counterfactual)

    Raises:
        FileExistsError: the folder is in use.
        FileNotFoundError: a folder holds no dictionary.
        ValueError: see `circuits.extract`; or the circuit is to be of edges.
    """
    check_settings(config)
    if config.units.name == EDGES:
        raise ValueError("units=edges makes a circuit of edges; use make_run")
    with staged_run(Path(config.out), config.overwrite) as place:
        prepared = prepare_run(config)
        extraction = _extracted(config, prepared, place)
        _write_figures(config, prepared, extraction, place.folder)
        place.publish()
    model, engine, circuit = prepared.model, prepared.engine, extraction.circuit
    assert isinstance(circuit, UnitCircuit)
    metrics, splits = extraction.metrics, prepared.splits
    return UnitRun(Path(config.out), model, engine, circuit, metrics, splits)


def _extracted(config: RunConfig, prepared: Prepared, place: Staged) -> Extraction:
    """The circuit, for which there is room on the disk, and which is written when it is found."""
    reserved = place.folder / RESERVED
    exists = prepared.engine.graph.exists
    reserved.write_bytes(
        bytes(12 * exists.numel() + min(100 * prepared.engine.graph.n_edges, 2**24))
    )

    def keep(circuit: Circuit | UnitCircuit) -> None:
        reserved.unlink()
        circuit.save(place.folder)

    return extract(
        prepared.engine,
        prepared.splits["discovery"],
        prepared.splits["evaluation"],
        config.method,
        metric=metric_of(config),
        ablation=config.ablation,
        selection=config.selection,
        units=config.units,
        memory=config.memory,
        random_draws=config.random_draws,
        exact_sample=config.exact_sample,
        accept_worse=config.accept_worse,
        seed=config.seed,
        about={
            "model": model_reference(config.model, prepared.model),
            "task": _task_reference(config.task),
            "seed": config.seed,
        },
        keep=keep,
    )


def _task_reference(task: Any) -> dict[str, Any]:
    """The task with its settings; a file of its own by its absolute path."""
    told = asdict(task)
    return told | ({"path": recorded(told["path"])} if "path" in told else {})


def _write_figures(
    config: RunConfig, prepared: Prepared, extraction: Extraction, folder: Path
) -> None:
    """Writes what is there before a detector is."""
    write_json(folder / "metrics.json", extraction.metrics)
    hashes = {name: sequence_hashes(prompts) for name, prompts in prepared.splits.items()}
    write_json(folder / "splits.json", hashes)
    write_config(folder / "config.yaml", asdict(config) | {"alpha": prepared.alpha})


def _calibrated(
    config: RunConfig, prepared: Prepared, extraction: Extraction, folder: Path
) -> Calibrated:
    """The detector, fitted and saved."""
    assert isinstance(extraction.circuit, Circuit)
    calibrated = fit(
        config.detector,
        Context(prepared.engine, extraction.circuit),
        prepared.splits["fit"],
        prepared.splits["calibration"],
        used=extraction.used,
        memory=config.memory,
    )
    target = folder / "detector" / config.detector.name
    save_detector(calibrated, target, weight_hash=prepared.model.weight_hash)
    return calibrated


def _scoring_faithfulness(
    engine: Engine,
    extraction: Extraction,
    calibrated: Calibrated,
    splits: Mapping[str, Prompts],
    config: RunConfig,
) -> dict[str, Any] | None:
    """Faithfulness under the ablation that inputs are scored with; warns below one half."""
    name = calibrated.detector.scores_under
    if name is None:
        return None
    ablation = fit_ablation(AblationConfig(name), engine, splits["fit"], memory=config.memory)
    metric = metric_named(extraction.circuit.about["metric"])
    try:
        objective = prepare(engine, splits["evaluation"], metric, ablation, memory=config.memory)
        result = faithfulness_scale(objective).faithfulness(extraction.circuit.mask)
    except ValueError as error:
        log.warning("no faithfulness under the detector's ablation: %s", error)
        return {"ablation": name, "faithfulness": None}
    if result.value < 0.5:
        log.warning(
            "under the ablation that inputs are scored with (%s) the circuit's faithfulness is "
            "only %.2f; scores will be noisy: keep more edges, or discover with ablation=%s",
            name,
            result.value,
            name,
        )
    return {"faithfulness": result.value, **asdict(result)}
