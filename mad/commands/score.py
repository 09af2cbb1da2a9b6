"""Score new inputs by how far the model departs from its circuit on them.

    madcap score circuit=runs/pronoun inputs=new.jsonl out=scored.jsonl
    madcap score circuit=runs/pronoun inputs=new.jsonl out=scored.jsonl alpha=0.05 explain=all
    madcap score circuit=RUN inputs=new.jsonl out=scored.jsonl model=DIR allow_other_weights=true
    madcap score circuit=FROM_ELSEWHERE inputs=new.jsonl out=scored.jsonl model=gpt2

Inputs are JSONL, plain or packed by gzip, one object a line: {"text": "..."} or {"clean": [token
ids]}, with "positions" and "id" if you like; inputs=- reads a pipe. Each result line is {"id",
"score", "p_value", "anomalous", "because"}: a high score is more anomalous; p_value is the
conformal p-value among held-out trusted inputs; anomalous means p_value <= alpha; because lists the
edges off the circuit that the score comes from. Any number of lines is scored in constant memory,
and an interrupted run goes on where it stopped when it is run again. A bad line gives a line with
"error"; the exit code is then 3. So does one that takes more than memory=; where only its
explanation does, the result has "because_error" in place of "because". So it has where the score is
no more than rounding, whose shares would be noise. An input's "label" (0 or "normal", 1 or
"anomaly") is passed on, for `madcap plot scored=FILE`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Fitted:
    """One of a run's detectors."""

    # detector=NAME: one of the run's detectors; null: its only one, or fast of several
    name: str | None = None


@dataclass
class Place:
    """Where a model is."""

    # model=PATH: load the model from here instead of where the circuit was found; needed once for
    # a folder from elsewhere, which names a model that you have not used here
    path: str | None = None
    head: str | None = None  # the same of its head, where it has one of its own


@dataclass
class Score:
    """Which inputs are scored against which circuit."""

    circuit: str = "???"  # the run folder that `madcap extract` wrote
    inputs: str = "???"  # JSONL file of inputs; - for standard input
    out: str = "???"  # JSONL file of results
    detector: Fitted = field(default_factory=Fitted)
    alpha: float = 0.01  # inputs with p_value <= alpha are anomalous
    # which results get `because`: flagged, all or none; by fast or strict, one costs about four
    # times its score
    explain: str = "flagged"
    edges: int = 8  # how many edges `because` lists
    chunk: int = 64  # input lines that are read, scored and written at a time
    # working memory beside the model's own weights: kB, MB, GB; decides how much runs at once
    memory: str = "2GB"
    model: Place = field(default_factory=Place)
    device: str = "cpu"  # any torch device
    allow_other_weights: bool = False  # score a fine-tuned or attacked copy of the model
    overwrite: bool = False  # replace `out`


def run(config: Score) -> int:
    """Scores, and reports on stderr."""
    from mad.folder import open_run
    from mad.scoring import Scoring, score

    opened = open_run(
        Path(config.circuit),
        model=config.model.path,
        head=config.model.head,
        device=config.device,
        allow_other_weights=config.allow_other_weights,
    )
    calibrated = opened.detector(
        config.detector.name,
        allow_other_weights=config.allow_other_weights,
        memory=config.memory,
    )
    scoring = Scoring(config.alpha, config.explain, config.edges, config.chunk)
    out = Path(config.out)
    tally = score(
        Path(config.inputs),
        out,
        calibrated,
        opened.model,
        scoring,
        memory=config.memory,
        overwrite=config.overwrite,
    )
    resumed = f" ({tally.resumed} by an earlier run)" if tally.resumed else ""
    print(
        f"{tally.lines} lines{resumed}, {tally.flagged} anomalous at alpha {config.alpha:g}, "
        f"{tally.errors} errors -> {out}",
        file=sys.stderr,
    )
    return 3 if tally.errors else 0
