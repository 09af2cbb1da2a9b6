"""From a configuration to a run folder: a circuit with its figures and a calibrated detector."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from circuits.ablation import AblationConfig, fit_ablation
from circuits.circuit import Circuit
from circuits.discovery import default_metric
from circuits.engine import Engine
from circuits.engine.memory import parse_memory
from circuits.extraction import Extraction, extract
from circuits.faithfulness import faithfulness_scale
from circuits.metrics import metric_named
from circuits.model.load import LoadedModel, load_model
from circuits.objective import prepare
from circuits.prompts import Prompts
from circuits.selection import Selection
from mad.calibration import Calibrated, check_alpha, fit, sequence_hashes
from mad.detector import Context
from mad.detectors import Fast
from mad.folder import check_folder, clear, model_reference, write_config, write_json
from mad.saved_detector import save_detector
from mad.trusted import Splits, one_length, trusted_splits

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
    # the detector that is fitted and calibrated at the end
    detector: Any = field(default_factory=Fast)
    # what the circuit has to keep: kl, logit_diff, prob_diff, cross_entropy, accuracy;
    # null: kl, and logit_diff for plain EAP, which kl gives no gradient
    metric: str | None = None
    selection: Selection = field(default_factory=Selection)  # which scored edges are kept
    splits: Splits = field(default_factory=Splits)  # trusted prompts for each purpose
    # tell edges apart by position; for prompts that all have the same length
    positions: bool = False
    alpha: float = 0.01  # the false-alarm rate that calibration should allow
    # working memory beside the model's own weights: kB, MB, GB; decides how much runs at once
    memory: str = "2GB"
    random_draws: int = 20  # random circuits of the same size to compare with
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


def make_run(config: RunConfig) -> Run:
    """Extracts a circuit, measures it, fits a detector, and writes all into `config.out`.

    The circuit is written as soon as it is found, so that nothing is lost if the detector cannot be
    fitted.

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
        ValueError: see `circuits.extract` and `mad.fit`.
    """
    check_alpha(config.alpha)
    parse_memory(config.memory)
    config.detector.check()
    folder = Path(config.out)
    check_folder(folder, config.overwrite)
    model = load_model(config.model)
    splits = trusted_splits(config.task, model, config.splits, config.seed)
    engine = Engine(model, n_positions=one_length(splits) if config.positions else None)
    extraction = _extracted(config, engine, splits)
    clear(folder)
    extraction.circuit.save(folder)
    write_json(folder / "metrics.json", extraction.metrics)
    hashes = {name: sequence_hashes(prompts) for name, prompts in splits.items()}
    write_json(folder / "splits.json", hashes)
    write_config(folder / "config.yaml", asdict(config))
    try:
        calibrated = fit(
            config.detector,
            Context(engine, extraction.circuit),
            splits["fit"],
            splits["calibration"],
            used=extraction.used,
            memory=config.memory,
        )
    except ValueError as error:
        raise ValueError(
            f"the circuit is saved in {folder}, but its detector could not be fitted: {error}"
        ) from error
    saved = folder / "detector" / config.detector.name
    save_detector(calibrated, saved, weight_hash=model.weight_hash)
    if problem := calibrated.calibration.problem(config.alpha):
        log.warning("scores are not calibrated: %s", problem)
    scoring = _scoring_faithfulness(engine, extraction, calibrated, splits, config)
    metrics = {**extraction.metrics, "scoring": scoring}
    write_json(folder / "metrics.json", metrics)
    return Run(folder, model, engine, extraction.circuit, metrics, calibrated, splits)


def _extracted(config: RunConfig, engine: Engine, splits: Mapping[str, Prompts]) -> Extraction:
    about = {
        "model": model_reference(config.model, engine.model),
        "task": asdict(config.task),
        "seed": config.seed,
    }
    return extract(
        engine,
        splits["discovery"],
        splits["evaluation"],
        config.method,
        metric=config.metric or default_metric(config.method.name),
        ablation=config.ablation,
        selection=config.selection,
        memory=config.memory,
        random_draws=config.random_draws,
        accept_worse=config.accept_worse,
        seed=config.seed,
        about=about,
    )


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
