"""Calibration: from scores to split-conformal p-values, and the fitting of a calibrated detector.

    p(s) = (1 + #{calibration scores >= s}) / (n + 1)

(Vovk et al. 2005; Papadopoulos et al. 2002): on inputs that are exchangeable with the n calibration
inputs, which neither found nor tuned anything, P(p <= alpha) <= alpha for every alpha, at any n.

Calibration inputs may come in groups (ordinary ones, hard ones).  Which group a new input is like
is not known when it is scored, so its p-value is the largest over the groups: it is at least that
of its own group, whichever that is, and the bound holds in each of them (Vovk et al. 2005, ch. 4,
on conformal prediction by category).

Scores below `noise` are rounding and count as equal, so that rounding alone is never flagged.

Shapes: calibration scores n, inputs B.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.prompts import InputError, Prompts
from mad.detector import Context, Detector, ExplainingDetector
from mad.detectors import DETECTORS

log = logging.getLogger(__name__)

TRUSTED = "trusted"  # the group of the trusted inputs that a detector is calibrated on
NOISE_PROMPTS = 16  # that rounding is measured on


@dataclass(frozen=True)
class Calibration:
    """Scores of held-out harmless inputs, sorted within each of their groups."""

    groups: Mapping[str, Float[Tensor, "_"]]
    noise: float | None = None  # scores below it are rounding; None: it is not known

    @classmethod
    def of(
        cls,
        scores: Float[Tensor, "n"] | Mapping[str, Float[Tensor, "_"]],
        noise: float | None = None,
    ) -> Calibration:
        """Sorts the scores, of trusted inputs or of several groups.

        >>> hard = Calibration.of({"trusted": torch.arange(99.0), "hard": torch.arange(199.0)})
        >>> hard.p_values(torch.tensor([150.0])).tolist(), hard.threshold(0.01)
        ([0.25], 197.0)

        Raises:
            ValueError: a group has none, or some are not finite.
        """
        groups = scores if isinstance(scores, Mapping) else {TRUSTED: scores}
        for name, own in groups.items():
            if not len(own):
                raise ValueError(
                    f"0 calibration scores of {name} inputs; give at least one to calibrate on"
                )
            if not torch.isfinite(own).all():
                raise ValueError(
                    "calibration scores are not finite; check the model's logits on the "
                    "calibration inputs"
                )
        return cls({name: own.double().sort().values for name, own in groups.items()}, noise)

    @classmethod
    def restored(cls, scores: Float[Tensor, "n"], about: Mapping[str, Any]) -> Calibration:
        """The calibration with these `scores`, of which `about` tells what `fit` has noted.

        Raises:
            ValueError: there are other scores than prompts noted, or as for `of`.
        """
        harmless = {name: int(own["prompts"]) for name, own in about.get("harmless", {}).items()}
        sizes = {TRUSTED: len(scores) - sum(harmless.values()), **harmless}
        if (noted := int(about["calibration"]["prompts"])) != sizes[TRUSTED]:
            raise ValueError(
                f"{len(scores)} calibration scores, but {noted + sum(harmless.values())} inputs"
            )
        noise = about.get("noise")
        if noise is not None and not math.isfinite(noise):
            raise ValueError(f"noise={noise}, but it must be finite")
        return cls.of(dict(zip(sizes, scores.split([*sizes.values()]))), noise)

    @property
    def scores(self) -> Float[Tensor, "n"]:
        """All scores, group after group."""
        return torch.cat([*self.groups.values()])

    def p_values(self, scores: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """The conformal p-value of each score: the largest over the groups."""
        new = self._level(scores.double())
        return torch.stack([_p_values(own, new) for own in self._levelled]).amax(0)

    def threshold(self, alpha: float) -> float:
        """The largest score that is not flagged at `alpha`: scores above it are."""
        return max(_threshold(own, alpha) for own in self._levelled)

    @property
    def _levelled(self) -> list[Float[Tensor, "_"]]:
        return [self._level(own) for own in self.groups.values()]

    def _level(self, scores: Float[Tensor, "_"]) -> Float[Tensor, "_"]:
        """Scores of which those that are rounding are equal."""
        return scores if self.noise is None else scores.clamp(min=self.noise)

    def doubt(self) -> str | None:
        """Why no score can be trusted, in one line; None when that is not so."""
        if self.noise is None or (largest := self.scores.max().item()) > self.noise:
            return None
        return (
            f"all calibration scores are rounding (largest {largest:.2g}, rounding "
            f"{self.noise:.2g}): on harmless inputs nothing off the circuit does anything, and an "
            "input is flagged as soon as its score is more than rounding; compare with a circuit "
            "of fewer edges"
        )

    def problem(self, alpha: float) -> str | None:
        """Why `alpha` cannot be used, in one line; None when it can.

        Raises:
            ValueError: alpha is not between 0 and 1.
        """
        check_alpha(alpha)
        needed = inputs_for(alpha)
        fewest, name = min((len(own), name) for name, own in self.groups.items())
        if fewest >= needed:
            return None
        where = "" if name == TRUSTED else f" of group {name}"
        return (
            f"alpha={alpha:g} needs at least {needed} calibration inputs, but there are "
            f"{fewest}{where}: the smallest possible p-value is {1 / (fewest + 1):.3g}; calibrate "
            f"on more {'trusted inputs' if name == TRUSTED else 'of these'} or raise alpha"
        )


def _p_values(held: Float[Tensor, "n"], scores: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    at_least = len(held) - torch.searchsorted(held, scores, side="left")
    return (1 + at_least).double() / (len(held) + 1)


def _threshold(held: Float[Tensor, "n"], alpha: float) -> float:
    most = math.floor(alpha * (len(held) + 1) + 1e-9) - 1  # calibration scores >= s
    return held[len(held) - 1 - most].item()


def inputs_for(alpha: float) -> int:
    """The fewest calibration inputs with which some p-value is at most alpha.

    >>> inputs_for(0.01), inputs_for(0.05)
    (99, 19)
    """
    return math.ceil(1 / alpha - 1 - 1e-9)


def check_alpha(alpha: float) -> None:
    """Raises ValueError when alpha is no false-alarm rate."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha}, but it must be above 0 and under 1")


@dataclass(frozen=True)
class Calibrated:
    """A detector with its calibration; `about` names the trusted prompts of both."""

    detector: Detector
    calibration: Calibration
    about: Mapping[str, Any]

    def score(self, prompts: Prompts, *, memory: str = "2GB") -> Float[Tensor, "B"]:
        """How anomalous each prompt is; high = anomalous."""
        return self.detector.score(prompts, memory=memory)

    def p_values(self, prompts: Prompts, *, memory: str = "2GB") -> Float[Tensor, "B"]:
        """The conformal p-value of each prompt; low = anomalous."""
        return self.calibration.p_values(self.score(prompts, memory=memory))


def fit(
    config: Any,
    context: Context,
    trusted: Prompts,
    calibration: Prompts,
    *,
    harmless: Mapping[str, Prompts] | None = None,
    used: Mapping[str, Prompts | Sequence[str]] | None = None,
    memory: str = "2GB",
) -> Calibrated:
    """Fits a detector on trusted prompts and calibrates it on others.

    >>> from circuits import Engine, load_model
    >>> from circuits.tasks import recall
    >>> from mad import MaxProbability
    >>> model = load_model("pkg://mad/models/recall_redirect")
    >>> prompts = model.prompts(recall.generate(recall.Recall(), 60, seed=0))
    >>> parts = prompts.split({"fit": 30, "calibration": 20, "new": 10}, seed=0)
    >>> context = Context(Engine(model))
    >>> fitted = fit(MaxProbability(), context, parts["fit"], parts["calibration"])
    >>> len(fitted.p_values(parts["new"]))
    10

    Args:
        config: the configuration of a detector, such as `Fast()`; its `name` picks it from
            `DETECTORS`.
        context: the model, and the circuit where the detector needs one.
        trusted: prompts to fit on.
        calibration: prompts to calibrate on, exchangeable with the normal inputs to come.
        harmless: further groups to calibrate on, by name, such as near misses that should not be
            flagged; false alarms are bounded in each of them.
        used: the prompts that found or measured the circuit (or their `sequence_hashes`), by what
            they were used for; {} where no prompts were.  Needed when there is a circuit.
        memory: working memory beside the model's own weights, such as 500MB.

    A prompt to calibrate on that the detector has no score for (longer than all that it was fitted
    on, say) is left out with a warning.

    Raises:
        ValueError: the sets overlap each other or those that the circuit was found or evaluated
            on, or it is not said which these were; or a group has no prompt that gets a score.
    """
    groups = _groups(calibration, harmless or {})
    parts = {"fit": trusted, "calibration": calibration, **(harmless or {})}
    for name, prompts in parts.items():
        if name != "fit" and (shared := trusted.overlap(prompts)):
            raise ValueError(
                f"{shared} prompts are in both the fit and the {name} split; they must be disjoint"
            )
    if used is None and context.circuit is not None:
        raise ValueError(
            "used=None, but prompts that found or measured the circuit may not calibrate it: give "
            'used={"discovery": PROMPTS, "evaluation": PROMPTS}, or used={} if there were none'
        )
    _check_unused(parts, used or {})
    detector = DETECTORS[config.name].fit(config, context, trusted, memory=memory)
    scores = {}
    for name, prompts in groups.items():
        scored, scores[name] = _scored(detector, prompts, name, memory)
        parts["calibration" if name == TRUSTED else name] = scored
    held = Calibration.of(scores, _noise(detector, trusted, memory))
    if doubt := held.doubt():
        log.warning(doubt)
    about: dict[str, Any] = {name: _described(parts[name]) for name in ("fit", "calibration")}
    if harmless:
        about["harmless"] = {name: _described(parts[name]) for name in harmless}
    return Calibrated(detector, held, about | {"noise": held.noise})


def _groups(calibration: Prompts, harmless: Mapping[str, Prompts]) -> dict[str, Prompts]:
    """The calibration prompts of each group."""
    if taken := {TRUSTED, "fit", "calibration"} & set(harmless):
        raise ValueError(
            f"a group of harmless inputs is called {min(taken)}, which names trusted ones; give it "
            "another name"
        )
    return {TRUSTED: calibration, **harmless}


def _scored(
    detector: Detector, prompts: Prompts, group: str, memory: str
) -> tuple[Prompts, Float[Tensor, "B"]]:
    """The prompts that a detector has scores for, with these; a warning where it leaves some out.

    New inputs of their kind get no score either, so that the p-values of all others hold.

    Raises:
        InputError: it has a score for none.
    """
    try:
        return prompts, detector.score(prompts, memory=memory)
    except InputError:
        faults = [_fault(detector, prompts.select([row]), memory) for row in range(len(prompts))]
    able = [row for row, fault in enumerate(faults) if fault is None]
    row, fault = next((row, fault) for row, fault in enumerate(faults) if fault is not None)
    if not able:
        raise fault
    log.warning(
        "%d of %d %s calibration inputs get no score from detector %s and are left out, the first "
        "is %r: %s",
        len(prompts) - len(able),
        len(prompts),
        group,
        detector.config.name,
        prompts.ids[row],
        fault,
    )
    kept = prompts.select(able)
    return kept, detector.score(kept, memory=memory)


def _fault(detector: Detector, prompt: Prompts, memory: str) -> InputError | None:
    """Why a prompt gets no score."""
    try:
        detector.score(prompt, memory=memory)
    except InputError as error:
        return error
    return None


def _noise(detector: Detector, trusted: Prompts, memory: str) -> float | None:
    """What rounding does to a detector's scores, at most; None where it cannot tell.

    It is measured on prompts that do not calibrate: the p-values stay valid.
    """
    if not isinstance(detector, ExplainingDetector):
        return None
    return detector.noise(trusted.select(slice(NOISE_PROMPTS)), memory=memory).max().item()


def _described(prompts: Prompts) -> dict[str, Any]:
    return {"prompts": len(prompts), "hash": prompts.hash()}


def _check_unused(
    parts: Mapping[str, Prompts], used: Mapping[str, Prompts | Sequence[str]]
) -> None:
    for name, prompts in parts.items():
        own = set(sequence_hashes(prompts))
        for split, others in used.items():
            hashes = sequence_hashes(others) if isinstance(others, Prompts) else others
            if shared := len(own.intersection(hashes)):
                raise ValueError(
                    f"{shared} prompts of the {name} split are in the circuit's {split} split; "
                    "they must be disjoint, or false alarms would not be bounded: give other "
                    "trusted prompts"
                )


def sequence_hash(sequence: Sequence[int]) -> str:
    """A short hash of a clean token sequence: it finds overlaps without keeping prompts."""
    return hashlib.sha256(" ".join(map(str, sequence)).encode()).hexdigest()[:16]


def sequence_hashes(prompts: Prompts) -> list[str]:
    """The hashes of all clean token sequences, sorted."""
    return sorted(map(sequence_hash, prompts.sequences()))
