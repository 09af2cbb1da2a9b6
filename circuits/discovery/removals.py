"""The metric of a circuit that edges are taken from, and of candidates that lack a few more.

A batch is run only as far as candidates reach (`circuits.engine.incremental`) where memory holds
what that starts from, and otherwise under whole masks.

Shapes: candidates K, edges removed by any of them E, prompts N (all batches), readers R, writers W;
`*S` positions, where edges are told apart by them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.engine.candidates import Edge
from circuits.engine.incremental import Incremental, forward_work
from circuits.objective import Batch, Batches, Objective

MOST = 64  # candidates at once, however much memory there is


class Removals:
    """A circuit on all prompts, and candidates that lack some of its edges."""

    def __init__(self, objective: Objective[Batches], kept: Bool[Tensor, "R W *S"]) -> None:
        """Runs the circuit on the batches whose runs memory can hold: half of what is spare.

        The other half is for candidates, `most` of them at once.
        """
        self.objective, self.kept, batches = objective, kept.clone(), objective.batches
        size, spare = batches.footprint, batches.spare
        self.held, total = 0, 0
        for batch in batches.kept:
            total += len(batch.prompts) * size.incremental
            if total > spare // 2:
                break
            self.held += 1
        self.runs = [self._run(batch) for batch in batches.kept[: self.held]]
        prompts = max(len(part) for part in batches.prompts)
        left = spare - spare // 2 - prompts * size.present - size.mask
        self.most = min(MOST, max(1, left // (prompts * size.masked() + size.mask)))
        self.whole = 0  # candidates run under whole masks, once for each batch

    def present(self) -> Float[Tensor, "N"]:
        """The oriented metric of the present circuit."""
        values = []
        for number, batch in enumerate(self.objective.batches):
            held = number < self.held
            logits = self.runs[number].logits if held else self.objective.logits(batch, self.kept)
            values.append(self._metric(batch, logits))
        return torch.cat(values, -1)

    def without(
        self, edges: Sequence[Edge], removed: Bool[np.ndarray, "K E"]
    ) -> Float[Tensor, "K N"]:
        """The oriented metric of K circuits: the k-th lacks those edges that `removed[k]` says."""
        self.candidates, values = (edges, removed), []
        for number, batch in enumerate(self.objective.batches):
            if number < self.held:
                logits = self.runs[number].without(edges, removed)
            else:
                masks = torch.stack([self._lacking(row) for row in removed])
                logits = self.objective.logits(batch, masks)
                self.whole += len(removed)
            values.append(self._metric(batch, logits))
        return torch.cat(values, -1)

    def accept(self, candidate: int) -> None:
        """Makes one of the circuits that were run last the present one."""
        self.kept = self._lacking(self.candidates[1][candidate])
        for run in self.runs:
            run.accept(candidate)

    @property
    def forwards(self) -> float:
        """What the candidates' runs took, in plain forwards of all prompts, by multiply-adds.

        A run under a whole mask counts as one forward of its batch.
        """
        architecture = self.objective.engine.architecture
        each = [forward_work(architecture, part) for part in self.objective.batches.prompts]
        incremental = sum(run.work for run in self.runs)
        whole = self.whole * sum(each[self.held :]) / max(1, len(each) - self.held)
        return (incremental + whole) / sum(each)

    def _lacking(self, lost: Bool[np.ndarray, "E"]) -> Bool[Tensor, "R W *S"]:
        """The present circuit without some of the edges that were last in question."""
        kept, (edges, _) = self.kept.clone(), self.candidates
        for number in np.flatnonzero(lost).tolist():
            kept[edges[number]] = False
        return kept

    @torch.no_grad()
    def _run(self, batch: Batch) -> Incremental:
        return Incremental(self.objective.engine, batch.prompts, self.kept, batch.ablated)

    @torch.no_grad()
    def _metric(self, batch: Batch, logits: Float[Tensor, "*K B P V"]) -> Float[Tensor, "*K B"]:
        return self.objective.metric.oriented(logits, batch.prompts, batch.clean.logits)
