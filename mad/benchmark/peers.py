"""Discovery beside a peer: the same weights, prompts and thresholds, in one run on one machine.

The peer is auto-circuit 1.0.1, in an environment of its own (`mad.benchmark.peers_exchange`).  Each
piece of work is done by both sides in turns, one idle while the other works, and each figure is the
median over rounds.  A side's *forward* is its own plain forward of the same model on the same batch
in the same run: TransformerLens 2's for the peer, the TransformerLens bridge's for this engine.

That both do the same is measured too: the logits, the ranks of scores and the kept edges agree, or
the table says how far they do not.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from circuits.engine import Engine
from mad.benchmark.peers_exchange import PeerProcess, write_exchange
from mad.benchmark.peers_work import BARE, PLAIN, Work, all_work
from mad.benchmark.speed import Shape, random_model, random_prompts

# Weights so wide that each head bends the logits: of GPT-2's .02 the embedding is nearly all.
SHAPE = Shape("4L8H", "gpt2", 4, 8, 64, 64, batch=32, positions=10, rounds=20, spread=0.2)
# ACDC keeps 154 (10 %) and 30 (2 %) of this shape's 1,519 edges.
THRESHOLDS = (0.0025, 0.03)
SEED = 0


@dataclass(frozen=True)
class Comparison:
    """Median seconds of one piece of work on both sides, and how far the results agree."""

    work: str
    peer_seconds: float | None  # None: that side does not do it
    seconds: float | None
    peer_forwards: float | None
    bridge_forwards: float | None
    module_forwards: float | None
    agreement: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """How many times as long the peer takes."""
        if self.seconds is None or self.peer_seconds is None:
            return None
        return self.peer_seconds / self.seconds


def compare_with_peer(
    python: str,
    shape: Shape = SHAPE,
    *,
    threads: int = 1,
    thresholds: Sequence[float] = THRESHOLDS,
) -> tuple[dict[str, str], list[Comparison]]:
    """Returns the peer's versions, and each piece of work on both sides.

    Args:
        python: of the environment that the peer is in.
        threads: of the peer's side; this side's are torch's.
        thresholds: of ACDC, each for a sweep of its own.

    Raises:
        ValueError: the peer cannot be run.
    """
    module, model = random_model(shape, SEED)
    engine, prompts = Engine(model), random_prompts(shape, SEED)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_exchange(folder, module, prompts, engine.graph, threads=threads)
        with PeerProcess(python, folder, threads=threads) as peer:
            work = all_work(module, engine, prompts, thresholds)
            return peer.versions, _comparisons(measure(peer, work, shape.rounds))


# ---- measuring -----------------------------------------------------------------------------------


@dataclass
class Measured:
    """What one piece of work took on both sides, round by round."""

    work: Work
    theirs: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    agreement: dict[str, float] = field(default_factory=dict)


def measure(peer: PeerProcess, work: Sequence[Work], rounds: int) -> list[Measured]:
    """Does all work in turns, first the peer, then this side; what is done once has no warm-up."""
    measured = [Measured(each) for each in work]
    for result in measured:
        if result.work.rounds != 1:
            _both(peer, result.work)
    for number in tqdm(range(rounds), desc="beside the peer", unit="round", disable=None):
        for result in measured:
            if number < (result.work.rounds or rounds):
                _turn(peer, result)
    return measured


def _turn(peer: PeerProcess, result: Measured) -> None:
    """One round of one piece of work."""
    answer, own = _both(peer, result.work)
    if answer is not None:
        result.theirs.append(answer["seconds"])
    if own is not None:
        result.ours.append(own[0])
    if answer is not None and own is not None and result.work.agreement is not None:
        result.agreement = result.work.agreement(answer, own[1])


def _both(peer: PeerProcess, work: Work) -> tuple[dict[str, Any] | None, tuple[float, Any] | None]:
    """The peer's answer, and this side's seconds and outcome."""
    answer = None if work.request is None else peer.ask(**work.request)
    return answer, None if work.ours is None else work.ours()


def _comparisons(measured: Sequence[Measured]) -> list[Comparison]:
    """Medians, in seconds and in forwards."""
    by_name = {result.work.name: result for result in measured}
    forward = statistics.median(by_name[PLAIN].theirs)
    bridge, module = (statistics.median(by_name[name].ours) for name in (PLAIN, BARE))
    comparisons = []
    for result in measured:
        theirs = statistics.median(result.theirs) if result.theirs else None
        ours = statistics.median(result.ours) if result.ours else None
        comparisons.append(
            Comparison(
                result.work.name,
                theirs,
                ours,
                peer_forwards=theirs and theirs / forward,
                bridge_forwards=ours and ours / bridge,
                module_forwards=ours and ours / module,
                agreement=result.agreement,
            )
        )
    return comparisons


# ---- the table -----------------------------------------------------------------------------------

HEADERS = (
    "work",
    "peer, ms",
    "madcap, ms",
    "peer / madcap",
    "peer's forwards",
    "bridge forwards",
    "module forwards",
    "agreement",
)


def table_rows(comparisons: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """The cells of a table of comparisons, below `HEADERS`; empty where nothing was measured.

    >>> table_rows([Comparison("EAP", 0.4, 0.1, 8.0, 5.0, 6.0, {"rank correlation": 1.0})])
    [('EAP', '400.00', '100.00', '4.0', '8.00', '5.00', '6.00', 'rank correlation 1')]
    """
    return [
        (
            each.work,
            _number(each.peer_seconds and 1e3 * each.peer_seconds, 2),
            _number(each.seconds and 1e3 * each.seconds, 2),
            _number(each.ratio, 1),
            _number(each.peer_forwards, 2),
            _number(each.bridge_forwards, 2),
            _number(each.module_forwards, 2),
            ", ".join(f"{name} {value:.3g}" for name, value in each.agreement.items()),
        )
        for each in comparisons
    ]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
