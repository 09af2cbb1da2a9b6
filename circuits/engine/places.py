"""What nodes write and read at some positions of each prompt: at all, or at the scored ones.

Of the present circuit there are differences a_w - ablated_w, and of candidates, which lack some of
its edges, changes a'_w - a_w.

Shapes: candidates K, batch B, pos S, d_model D, writers W, changed writers C, readers R, readers r
of one group, scored positions P; s is S or P; b and p are B and s, or 1 where rows are equal; `*S`
positions, where edges are told apart by them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Places:
    """Some positions of each prompt; `positions` says which, None: all."""

    def __init__(
        self,
        differences: Float[Tensor, "W B s D"],
        removed: Float[Tensor, "W b p D"],
        base: Float[Tensor, "levels b p D"],
        positions: Int[Tensor, "B P"] | None = None,
    ) -> None:
        """Takes what the present circuit's writers write less what removed edges carry, and that.

        `removed` and `base` are as in `Ablated`.
        """
        self.differences, self.removed, self.base = differences, removed, base
        self.positions = positions
        self.expect([], 0)

    def at(self, positions: Int[Tensor, "B P"]) -> Places:
        """The same at some positions of each prompt."""
        differences, removed, base = (
            at_positions(part, positions) for part in (self.differences, self.removed, self.base)
        )
        return Places(differences, removed, base, positions)

    def expect(self, writers: Sequence[int], n_candidates: int) -> None:
        """Makes room for what some writers, in the order of running, write under candidates."""
        self.changed, self.count = list(writers), 0
        self.row_of = {writer: row for row, writer in enumerate(writers)}
        shape = (len(writers), n_candidates, *self.differences.shape[1:])
        self.changes = self.differences.new_empty(shape)

    def take(self, writers: list[int], written: Float[Tensor, "w K B s D"]) -> Tensor:
        """Takes what the next writers write under candidates, and returns how they change."""
        rows = self._index(writers)
        present = self.differences[rows] + self.removed[rows]
        return self.append(written.sub_(present[:, None]))

    def append(self, change: Float[Tensor, "w K B s D"]) -> Tensor:
        """Takes the change of the next writers, and returns it."""
        self.changes[self.count : self.count + len(change)] = change
        self.count += len(change)
        return change

    def accept(self, candidate: int) -> None:
        """Makes one of the candidates the present circuit."""
        self.differences[self._index(self.changed)] += self.changes[:, candidate]
        self.expect([], 0)

    def mix(
        self, kept: Bool[np.ndarray, "r W *S"], level: int, at_least: int
    ) -> Float[Tensor, "r k B s D"]:
        """What readers get that keep all of their edges: once where it is the same for all K.

        Its sum over writers of the present circuit always is.  With `at_least` K it comes K times.
        """
        columns = np.flatnonzero(kept.reshape(*kept.shape[:2], -1).any(2).any(0))
        end = int(columns.max(initial=-1)) + 1
        if 2 * len(columns) >= end:  # to skip the others would be a copy of most
            present = self._sum(kept[:, :end], self.differences[:end, None])
        else:
            differences = self.differences[self._index(columns)]
            present = self._sum(kept[:, columns], differences[:, None])
        present += self.base[level]
        shares = kept[:, self.changed[: self.count]]
        if not shares.any():
            return present if at_least == 1 else present.repeat(1, at_least, 1, 1, 1)
        return self._sum(shares, self.changes[: self.count]).add_(present)

    def take_away(self, inputs: Float[Tensor, "K B s D"], lost: Bool[np.ndarray, "K W *S"]) -> None:
        """Takes from what a reader gets under each candidate what it would over edges it lacks."""
        writers = np.flatnonzero(lost.reshape(*lost.shape[:2], -1).any(2).any(0)).tolist()
        inputs -= self._sum(lost[:, writers], self.differences[self._index(writers)][:, None])[:, 0]
        if changed := [writer for writer in writers if writer in self.row_of]:
            changes = self.changes[[self.row_of[writer] for writer in changed]]
            shares = self._shares(lost[:, changed])
            inputs -= torch.einsum("kcbs,ckbsd->kbsd", shares, changes)

    def _sum(
        self, kept: Bool[np.ndarray, "r c *S"], values: Float[Tensor, "c k B s D"]
    ) -> Float[Tensor, "r k B s D"]:
        """The sum of values over some edges."""
        shares = self._shares(kept)
        if kept.ndim == 2:
            return (shares[..., 0, 0] @ values.flatten(1)).view(len(shares), *values.shape[1:])
        return torch.einsum("rcbs,ckbsd->rkbsd", shares, values)

    def _shares(self, kept: Bool[np.ndarray, "r c *S"]) -> Float[Tensor, "r c b s"]:
        """1 for an edge and 0 for none, at these positions; b and s 1 where they are alike."""
        shares = torch.from_numpy(kept).to(self.differences.device, self.differences.dtype)
        if shares.ndim == 2:
            return shares[:, :, None, None]
        return shares[:, :, None] if self.positions is None else shares[:, :, self.positions]

    def _index(self, rows: Sequence[int] | Int[np.ndarray, "n"]) -> Int[Tensor, "n"]:
        return torch.as_tensor(rows, dtype=torch.long, device=self.differences.device)


def at_positions(
    values: Float[Tensor, "*n b S D"], positions: Int[Tensor, "B P"]
) -> Float[Tensor, "*n c p D"]:
    """Values at some positions of each prompt; what has one row for all positions stays so."""
    if values.shape[-2] == 1:
        return values
    shape = (*values.shape[:-3], len(positions))
    index = positions[..., None].expand(*shape, -1, values.shape[-1])
    return values.expand(*shape, *values.shape[-2:]).gather(-2, index)
