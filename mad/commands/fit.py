"""Fit another detector to a circuit, or the same one to other trusted inputs.

    madcap fit circuit=runs/pronoun detector=mahalanobis trusted=trusted.jsonl
    madcap fit circuit=runs/pronoun detector=strict trusted=trusted.jsonl
    madcap fit circuit=runs/pronoun detector=nodes detector.summary=max trusted=trusted.jsonl

The trusted inputs are split into two parts, one to fit on and one to calibrate on; inputs that the
circuit was found or measured on are refused, because false alarms would not be bounded. Score with
`madcap score ... detector=NAME`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mad.commands.score import Place

if TYPE_CHECKING:
    from circuits.prompts import Prompts
    from mad.folder import Opened


@dataclass
class Fit:
    """Which detector is fitted to what."""

    circuit: str = "???"  # the run folder that `madcap extract` wrote
    trusted: str = "???"  # trusted inputs: JSONL, auto-circuit JSON or EAP-IG CSV
    detector: Any = "???"  # which detector
    fit_share: float = 0.5  # share of the trusted inputs to fit on; the rest calibrate
    # the false-alarm rate that calibration should allow, or nothing is fitted; null: 0.01, or what
    # it allows
    alpha: float | None = None
    # working memory beside the model's own weights: kB, MB, GB; decides how much runs at once
    memory: str = "2GB"
    seed: int = 0  # of the split
    model: Place = field(default_factory=Place)
    device: str = "cpu"  # any torch device
    overwrite: bool = False  # replace a detector of the same name


def run(config: Fit) -> None:
    """Fits, calibrates and saves the detector."""
    from mad.calibration import fit
    from mad.detector import Context
    from mad.folder import open_run
    from mad.preparation import usable_alpha
    from mad.saved_detector import FILES, save_detector
    from mad.staging import staged

    _check_settings(config)
    name, folder = config.detector.name, Path(config.circuit)
    target = folder / "detector" / name
    if target.exists() and not config.overwrite:
        raise FileExistsError(f"{target} exists; overwrite=true replaces it")
    opened = open_run(folder, model=config.model.path, head=config.model.head, device=config.device)
    parts = _parts(config, opened)
    usable_alpha(config.alpha, len(parts["calibration"]), "fit_share")
    with staged(target, ours=FILES, keep=FILES[0], overwrite=config.overwrite) as place:
        calibrated = fit(
            config.detector,
            Context(opened.engine, opened.circuit),
            parts["fit"],
            parts["calibration"],
            used=opened.used(),
            memory=config.memory,
        )
        save_detector(calibrated, place.folder, weight_hash=opened.model.weight_hash)
        place.publish()
    sizes = {part: len(prompts) for part, prompts in parts.items()}
    print(
        f"detector {name}: fitted on {sizes['fit']} inputs, calibrated on {sizes['calibration']} "
        f"-> {target}"
    )


def _check_settings(config: Fit) -> None:
    from circuits.engine.memory import parse_memory
    from mad.calibration import check_alpha

    if config.alpha is not None:
        check_alpha(config.alpha)
    parse_memory(config.memory)
    config.detector.check()
    if not 0 < config.fit_share < 1:
        raise ValueError(f"fit_share={config.fit_share}, but it must be above 0 and under 1")


def _parts(config: Fit, opened: Opened) -> dict[str, Prompts]:
    """The trusted inputs to fit on, and those to calibrate on."""
    from circuits.prompts import read_records
    from mad.trusted import load_trusted

    prompts = load_trusted(read_records(Path(config.trusted)), opened.model)
    if len(prompts) < 2:
        raise ValueError(
            f"{config.trusted} has {len(prompts)} different inputs, but at least 2 are needed"
        )
    first = min(max(1, round(config.fit_share * len(prompts))), len(prompts) - 1)
    return prompts.split({"fit": first, "calibration": len(prompts) - first}, config.seed)
