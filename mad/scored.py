"""What a scored file shows: where its scores lie, which are flagged, and how labels are told apart.

    shown = read_scored(Path("scored.jsonl"), alpha=0.01)
    print(shown.summary())
    draw_scored(shown, Path("pictures"), ["png"])

A line's label is that of its input: 0 or "normal", 1 or "anomaly".  AUROC and ROC are of anomalies
against normals; see `mad.benchmark.auroc`.  Flags are the conformal ones, p_value <= alpha.

Shapes: inputs with one label n.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mad.benchmark.auroc import auroc, roc_curve
from mad.benchmark.roc import draw_roc, draw_score_distributions
from mad.calibration import check_alpha

NORMAL, ANOMALY, UNLABELLED = "normal", "anomaly", "no label"
LABELS = {0: NORMAL, 1: ANOMALY, NORMAL: NORMAL, ANOMALY: ANOMALY}
DECADES = 2.0  # scores that span more of them are drawn on a logarithmic scale


@dataclass(frozen=True)
class Scored:
    """The scores of a file, by the label of their input."""

    name: str  # of the file, without suffix
    alpha: float
    scores: Mapping[str, Float[Tensor, "n"]]
    threshold: float  # scores above it are flagged
    errors: int  # lines without a score

    @property
    def auroc(self) -> float | None:
        """Of anomalies against normals; None where one of them is missing."""
        if not {NORMAL, ANOMALY} <= set(self.scores):
            return None
        return auroc(self.scores[NORMAL], self.scores[ANOMALY])

    def flagged(self, label: str) -> float:
        """The share flagged of the inputs with a label."""
        return (self.scores[label] > self.threshold).double().mean().item()

    def summary(self) -> str:
        """The figures, in lines of text."""
        lines = [
            f"{label}: {len(own)} inputs, {100 * self.flagged(label):.1f} % flagged at alpha "
            f"{self.alpha:g}"
            for label, own in self.scores.items()
        ]
        if self.errors:
            lines.append(f"without a score: {self.errors} lines")
        if (value := self.auroc) is not None:
            lines.append(f"AUROC of anomalies against normals: {value:.3f}")
        return "\n".join(lines)


def read_scored(path: Path, alpha: float) -> Scored:
    """Returns what `madcap score` wrote to a file.

    >>> lines = [{"score": n, "p_value": 0.5 - n / 4, "label": n} for n in (0, 1)]
    >>> text = "".join(json.dumps(line) + chr(10) for line in lines)
    >>> Path("scored.jsonl").write_text(text) > 0
    True
    >>> shown = read_scored(Path("scored.jsonl"), alpha=0.3)
    >>> shown.auroc, shown.flagged("normal"), shown.flagged("anomaly")
    (1.0, 0.0, 1.0)

    Raises:
        FileNotFoundError: no such file.
        ValueError: alpha is no rate, a line is no result, or no line has a score.
    """
    check_alpha(alpha)
    if not path.is_file():
        raise FileNotFoundError(f"no scored file {path}; `madcap score ... out={path}` writes it")
    found: dict[str, list[float]] = {NORMAL: [], ANOMALY: [], UNLABELLED: []}
    flagged, passed, errors = [], [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            result = _result(line, f"{path}, line {number}")
            if "error" in result:
                errors += 1
                continue
            score = float(result["score"])
            found[LABELS.get(result.get("label"), UNLABELLED)].append(score)
            (flagged if result["p_value"] <= alpha else passed).append(score)
    if not flagged and not passed:
        raise ValueError(f"{path} holds no scores; score inputs that can be scored")
    # p-values fall as scores rise, so that flags are scores above some threshold
    threshold = max(passed) if passed else math.nextafter(min(flagged), -math.inf)
    scores = {label: torch.tensor(own).double() for label, own in found.items() if own}
    return Scored(path.stem, alpha, scores, threshold, errors)


def _result(line: bytes, where: str) -> dict[str, Any]:
    """A line of a scored file."""
    try:
        result = json.loads(line)
        if "error" not in result:
            if not all(math.isfinite(float(result[key])) for key in ("score", "p_value")):
                raise ValueError("a number is not finite")
            hash(result.get("label"))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{where} is no result of `madcap score` ({type(error).__name__}: {error}); give the "
            "file that it wrote"
        ) from error
    return result


def draw_scored(shown: Scored, folder: Path, formats: Sequence[str]) -> list[Path]:
    """Returns the files drawn: NAME.scores.FORMAT and, with both labels, NAME.roc.FORMAT.

    Raises:
        ValueError: a format that cannot be drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for form in formats:
        paths.append(
            draw_score_distributions(
                {label: own.tolist() for label, own in shown.scores.items()},
                shown.threshold,
                folder / f"{shown.name}.scores.{form}",
                alpha=shown.alpha,
                log_scale=_over_decades(shown),
                title=shown.name,
                caption=f"flagged where p_value is at most {shown.alpha:g}",
            )
        )
        if shown.auroc is not None:
            curve = roc_curve("score", "", shown.scores[NORMAL], shown.scores[ANOMALY])
            file = folder / f"{shown.name}.roc.{form}"
            title = f"{shown.name}: AUROC {curve.auroc:.3f}"
            paths.append(draw_roc([curve], file, title, alpha=shown.alpha))
    return paths


def _over_decades(shown: Scored) -> bool:
    everything = torch.cat([*shown.scores.values()])
    low, high = everything.min().item(), everything.max().item()
    return low > 0 and math.log10(high / low) > DECADES
