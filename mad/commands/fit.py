"""Fit another detector to a circuit, or the same one to other trusted inputs.

    madcap fit circuit=runs/pronoun detector=mahalanobis trusted=trusted.jsonl
    madcap fit circuit=runs/pronoun detector=strict trusted=trusted.jsonl
    madcap fit circuit=runs/pronoun detector=nodes detector.summary=max trusted=trusted.jsonl
    madcap fit circuit=RUN detector=fast trusted=trusted.jsonl calibration=hard.jsonl overwrite=true

The trusted inputs are split into two parts, one to fit on and one to calibrate on; inputs that the
circuit was found or measured on are refused, because false alarms would not be bounded. Score with
`madcap score ... detector=NAME`.

calibration=FILE adds harmless inputs of your own that should not be flagged either, such as near
misses: a line's "group" names its group ("harmless" without), a p-value is the largest over the
groups and the trusted inputs, and false alarms are bounded in each. Each group needs 1 / alpha - 1
inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mad.commands.score import Place

if TYPE_CHECKING:
    from circuits.prompts import Prompts
    from mad.calibration import Calibration
    from mad.folder import Opened

UNNAMED = "harmless"  # the group of lines that name none


@dataclass
class Fit:
    """Which detector is fitted to what."""

    circuit: str = "???"  # the run folder that `madcap extract` wrote
    trusted: str = "???"  # trusted inputs: JSONL, auto-circuit JSON or EAP-IG CSV
    # harmless inputs to calibrate on besides; a line's `group` names its group
    calibration: str | None = None
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
    parts, harmless = _parts(config, opened), _harmless(config.calibration, opened)
    sizes = {"fit_share": len(parts["calibration"])}
    sizes |= {f"group {group}": len(prompts) for group, prompts in harmless.items()}
    fewest = min(sizes, key=lambda setting: sizes[setting])
    usable_alpha(config.alpha, sizes[fewest], fewest)
    with staged(target, ours=FILES, keep=FILES[0], overwrite=config.overwrite) as place:
        calibrated = fit(
            config.detector,
            Context(opened.engine, opened.circuit),
            parts["fit"],
            parts["calibration"],
            harmless=harmless,
            used=opened.used(),
            memory=config.memory,
        )
        if config.alpha and (problem := calibrated.calibration.problem(config.alpha)):
            raise ValueError(problem)  # some that were to calibrate have no score
        save_detector(calibrated, place.folder, weight_hash=opened.model.weight_hash)
        place.publish()
    print(
        f"detector {name}: fitted on {len(parts['fit'])} inputs, calibrated on "
        f"{_listed(calibrated.calibration)} -> {target}"
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


def _harmless(path: str | None, opened: Opened) -> dict[str, Prompts]:
    """The inputs of each group of a calibration file."""
    from circuits.prompts import read_records
    from mad.trusted import load_trusted

    groups: dict[str, list[dict[str, Any]]] = {}
    for number, record in enumerate(read_records(Path(path)) if path else [], start=1):
        name = record.pop("group", None)
        if not isinstance(name, str | None) or name == "":
            raise ValueError(
                f"{path}, prompt {number}: group={name!r}, but the name of a group is text"
            )
        groups.setdefault(name or UNNAMED, []).append(record)
    found = {}
    for name, records in groups.items():
        try:
            found[name] = load_trusted(records, opened.model)
        except ValueError as error:
            raise ValueError(f"{path}, group {name}: {error}") from error
    return found


def _listed(calibration: Calibration) -> str:
    trusted, *others = ((name, len(scores)) for name, scores in calibration.groups.items())
    return f"{trusted[1]}" + "".join(f" and {count} of group {name}" for name, count in others)
