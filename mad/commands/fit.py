"""Fit another detector to a circuit, or the same one to other trusted inputs.

    madcap fit circuit=runs/pronoun detector=mahalanobis trusted=trusted.jsonl
    madcap fit circuit=runs/pronoun detector=strict trusted=trusted.jsonl
    madcap fit circuit=runs/pronoun detector=nodes detector.summary=max trusted=trusted.jsonl

The trusted inputs are split into two parts, one to fit on and one to calibrate on; inputs that the
circuit was found or measured on are refused, because false alarms would not be bounded. Score with
`madcap score ... detector=NAME`.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Fit:
    """Which detector is fitted to what."""

    circuit: str = "???"  # the run folder that `madcap extract` wrote
    trusted: str = "???"  # trusted inputs: JSONL, auto-circuit JSON or EAP-IG CSV
    detector: Any = "???"  # which detector
    fit_share: float = 0.5  # share of the trusted inputs to fit on; the rest calibrate
    alpha: float = 0.01  # the false-alarm rate that calibration should allow
    # working memory beside the model's own weights: kB, MB, GB; decides how much runs at once
    memory: str = "2GB"
    seed: int = 0  # of the split
    device: str = "cpu"  # any torch device
    overwrite: bool = False  # replace a detector of the same name


def run(config: Fit) -> None:
    """Fits, calibrates and saves the detector."""
    from circuits.engine.memory import parse_memory
    from circuits.prompts import read_records
    from mad.calibration import check_alpha, fit
    from mad.detector import Context
    from mad.folder import open_run
    from mad.saved_detector import save_detector
    from mad.trusted import load_trusted

    check_alpha(config.alpha)
    parse_memory(config.memory)
    config.detector.check()
    folder = Path(config.circuit)
    target = folder / "detector" / config.detector.name
    if target.exists() and not config.overwrite:
        raise FileExistsError(f"{target} exists; overwrite=true replaces it")
    if not 0 < config.fit_share < 1:
        raise ValueError(f"fit_share={config.fit_share}, but it must be above 0 and under 1")
    opened = open_run(folder, device=config.device)
    prompts = load_trusted(read_records(Path(config.trusted)), opened.model)
    if len(prompts) < 2:
        raise ValueError(
            f"{config.trusted} has {len(prompts)} different inputs, but at least 2 are needed"
        )
    first = min(max(1, round(config.fit_share * len(prompts))), len(prompts) - 1)
    parts = prompts.split({"fit": first, "calibration": len(prompts) - first}, config.seed)
    calibrated = fit(
        config.detector,
        Context(opened.engine, opened.circuit),
        parts["fit"],
        parts["calibration"],
        used=_used(folder / "splits.json"),
        memory=config.memory,
    )
    save_detector(calibrated, target, weight_hash=opened.model.weight_hash)
    print(
        f"detector {config.detector.name}: fitted on {first} inputs, calibrated on "
        f"{len(prompts) - first} -> {target}"
    )
    if problem := calibrated.calibration.problem(config.alpha):
        logging.getLogger(__name__).warning("scores are not calibrated: %s", problem)


def _used(splits: Path) -> dict[str, list[str]]:
    """Hashes of the prompts that the circuit was found and measured on."""
    if not splits.is_file():
        raise FileNotFoundError(
            f"no {splits}, which tells what the circuit was found and measured on; without it "
            "false alarms could not be bounded: extract again"
        )
    try:
        data = json.loads(splits.read_text())
        return {name: list(data[name]) for name in ("discovery", "evaluation")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{splits} cannot be read ({error}); extract again") from error
