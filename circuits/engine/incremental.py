"""Runs of circuits that have a few edges less than the present one: only what they reach is run.

A removed edge w -> r changes what r reads by ablated_w - a_w.  From there on, layer by layer, only
nodes are run that read something changed over kept edges; all others keep the values that they have
in the present circuit.  A reader's input is

    x_r = base_r + sum_w m[r, w] (a_w - ablated_w)                    of the present circuit
        + sum_{w changed} m[r, w] (a'_w - a_w)                        what has changed before it
        - sum_{w -> r removed} (a'_w - ablated_w)                     what it no longer reads

whose first line is the same for all candidates.  It is summed anew in each run, so that rounding
does not add up from circuit to circuit.

What only the logits' scored positions depend on at these same positions is run there alone
(`live_nodes.Needed`).  With post-norms a head that is run, or that is no longer read, changes what
all heads of its layer write.

Shapes: candidates K, edges removed by any of them E, batch B, pos S, d_model D, head width E,
writers W, changed writers C, readers R, readers r of one group, scored positions P, vocabulary V;
s is S or P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.engine.engine import Engine
from circuits.engine.live_nodes import needed
from circuits.engine.masked import Ablated, Seen, all_heads
from circuits.model.architecture import Block
from circuits.model.attention import attend
from circuits.prompts.prompts import Prompts

Edge = tuple[int, ...]  # reader, writer and, where edges are told apart by it, position


class Incremental:
    """A circuit's run on a batch, from which those of smaller circuits are reached.

    `logits` are those of the present circuit, [B, P, V]; `work` counts multiply-adds of candidates.
    """

    @torch.no_grad()
    def __init__(
        self, engine: Engine, prompts: Prompts, kept: Bool[Tensor, "R W *S"], ablated: Ablated
    ) -> None:
        """Runs the circuit once, by `Engine.masked`; ValueError as there."""
        self.architecture, self.graph = engine.architecture, engine.graph
        self.prompts, self.ablated = prompts, ablated
        self.work = 0
        self.kept = kept.cpu().numpy().copy()
        values = engine.embed(prompts)
        written = values.new_zeros(len(self.graph.writers), *values.shape[1:])
        written[: len(values)] = values

        def keep(seen: Seen) -> None:
            written[seen.writers] = seen.written[:, 0]

        self.logits = engine.masked(prompts, kept, ablated, observe=keep)
        self.everywhere = _Places(written, ablated.writers, ablated.base, None)
        self.scored = self.everywhere.at(prompts.positions % written.shape[2])
        self.normed_together = frozenset(
            layer for layer, block in enumerate(self.architecture.blocks) if block.post_norm1
        )
        self._look()
        self.candidates: _Candidates | None = None

    @torch.no_grad()
    def without(
        self, edges: Sequence[Edge], removed: Bool[np.ndarray, "K E"]
    ) -> Float[Tensor, "K B P V"]:
        """The logits of K circuits: candidate k lacks those kept edges that are `removed[k]`."""
        candidates = _Candidates(edges, removed)
        self._plan(candidates)
        for place, reached in ((self.everywhere, candidates.moved), (self.scored, candidates.all)):
            place.expect(reached, len(removed))
        for layer, heads, mlp in candidates.steps:
            for place in (self.everywhere, self.scored):
                here = [head for head in heads if self._place(layer, head) is place]
                if here:
                    self._heads(candidates, layer, here, place)
            if mlp:
                self._mlp(candidates, layer)
        end = [len(self.graph.readers) - 1]
        inputs = self._inputs(candidates, end, 2 * self.graph.n_layers, self.scored)[0]
        candidates.logits = self.architecture.logits(inputs)
        self.work += inputs[..., 0].numel() * self.architecture.outputs * inputs.shape[-1]
        self.candidates = candidates
        return candidates.logits

    @torch.no_grad()
    def accept(self, candidate: int) -> None:
        """Makes one of the circuits that were run last the present one."""
        candidates = self.candidates
        assert candidates is not None and candidates.logits is not None
        for place in (self.everywhere, self.scored):
            place.accept(candidate)
        for edge in candidates.lost_by(candidate):
            self.kept[edge] = False
        self.logits = candidates.logits[candidate].clone()
        self.candidates = None
        self._look()

    def _look(self) -> None:
        """Takes in what the present circuit leaves."""
        self.any_kept = self.kept if self.graph.n_positions is None else self.kept.any(-1)
        self.needed = needed(self.graph, self.any_kept, self.normed_together)
        if self.normed_together:
            self.read = self.graph.read(torch.from_numpy(self.kept)[None])[0]

    def _place(self, layer: int, head: int) -> _Places:
        """Where a head, or an MLP (the head after the last), has to be run."""
        writer = self.graph.first_writer(layer) + head
        return self.everywhere if self.needed.everywhere[writer] else self.scored

    # ---- what is run -----------------------------------------------------------------------------

    def _plan(self, candidates: _Candidates) -> None:
        """Finds the nodes that any candidate reaches, block by block."""
        graph, n_heads = self.graph, self.graph.n_heads
        changed = np.zeros(len(graph.writers), bool)
        hit = np.zeros(len(graph.readers), bool)
        hit[list(candidates.by_reader)] = True
        for layer in range(graph.n_layers):
            first, reader = graph.first_writer(layer), graph.first_reader(layer)
            after = graph.first_reader(layer + 1)
            hit[reader:after] |= self.any_kept[reader:after] @ changed
            queries = hit[reader : reader + n_heads]
            sides = hit[reader + n_heads : reader + n_heads + 2 * graph.kv_heads]
            shared = sides.reshape(2, -1).any(0).repeat(graph.kv_group)
            living = self.needed.anywhere[first : first + graph.writers_per_block]
            heads = living[:n_heads] & (queries | shared)
            if layer in self.normed_together:
                self._read_by_each(candidates)
                if heads.any() or layer in candidates.rescaled:
                    heads = living[:n_heads]
            changed[first : first + n_heads] = heads
            mlp = False
            if not graph.attention_only and living[n_heads]:
                row = self.any_kept[after - 1]
                mlp = bool(hit[after - 1] or (row & changed).any())
                changed[first + n_heads] = mlp
            if heads.any() or mlp:
                candidates.steps.append((layer, np.flatnonzero(heads).tolist(), mlp))
        candidates.all = np.flatnonzero(changed)
        candidates.moved = np.flatnonzero(changed & self.needed.everywhere)

    def _read_by_each(self, candidates: _Candidates) -> None:
        """Which writers the logits depend on under each candidate, and where that is new."""
        if candidates.read is not None:
            return
        masks = torch.from_numpy(self.kept)[None].repeat(
            len(candidates.removed), *[1] * self.kept.ndim
        )
        for number, mask in enumerate(masks):
            for edge in candidates.lost_by(number):
                mask[edge] = False
        candidates.read, _ = self.graph.read(masks)
        other = (candidates.read != self.read).flatten(2).any(2).any(0)
        starts = [self.graph.first_writer(layer) for layer in range(self.graph.n_layers)]
        candidates.rescaled = {
            layer
            for layer, first in enumerate(starts)
            if other[first : first + self.graph.n_heads].any()
        }

    # ---- running ---------------------------------------------------------------------------------

    def _inputs(
        self, candidates: _Candidates, rows: list[int], level: int, place: _Places
    ) -> Float[Tensor, "r K B s D"]:
        """What some readers get under each candidate."""
        inputs = place.mix(self.kept, rows, level, len(candidates.removed))
        for number, row in enumerate(rows):
            if row in candidates.by_reader:
                place.take_away(inputs[number], *candidates.of_reader(row))
        self.work += inputs.numel() * len(place.changed[: place.count])
        return inputs

    def _heads(
        self, candidates: _Candidates, layer: int, heads: list[int], place: _Places
    ) -> None:
        graph, architecture = self.graph, self.architecture
        block, reader, width = architecture.blocks[layer], graph.first_reader(layer), self._width
        kv_heads, kv_of_head = np.unique(np.array(heads) // graph.kv_group, return_inverse=True)
        queries = [reader + head for head in heads]
        first = reader + graph.n_heads
        moved = [first + side + kv for side in (0, graph.kv_heads) for kv in kv_heads.tolist()]
        if place is self.everywhere:
            inputs = self._inputs(candidates, queries + moved, 2 * layer, place)
            parts = [inputs[: len(queries)], inputs[len(queries) :]]
        else:
            parts = [
                self._inputs(candidates, queries, 2 * layer, place),
                self._inputs(candidates, moved, 2 * layer, self.everywhere),
            ]
        q_inputs, late = block.norm1.deferred(parts[0])
        kv_inputs, _ = block.norm1.deferred(parts[1])
        k_inputs, v_inputs = kv_inputs.split(len(kv_heads))
        attention, kv = block.attention, kv_heads.tolist()
        q, k, v = (
            projection.each(x.flatten(1, -2), width, own, late).view(
                len(own), -1, x.shape[3], width
            )
            for projection, x, own in (
                (attention.q, q_inputs, heads),
                (attention.k, k_inputs, kv),
                (attention.v, v_inputs, kv),
            )
        )
        n_candidates = len(candidates.removed)
        key_mask = None
        if not graph.causal:
            key_mask = self.prompts.key_mask.repeat(n_candidates, 1)
        at = None if place.positions is None else place.positions.repeat(n_candidates, 1)
        z = attend(architecture, attention, q, k, v, key_mask, kv_of_head.tolist(), at)
        written = torch.bmm(z.flatten(1, 2), architecture.output_weight(attention)[heads])
        written = written.view(len(heads), *parts[0].shape[1:])
        if block.post_norm1 is not None:
            written *= block.post_norm1.factor(
                self._layer_total(candidates, written, layer, heads, place)
            )
        self.work += (q.numel() + k.numel() + v.numel() + z.numel()) * written.shape[-1]
        self.work += 2 * q[..., 0].numel() * k.shape[2] * width
        writers = np.array(heads) + graph.first_writer(layer)
        self._hand_on(writers, written, place)

    @property
    def _width(self) -> int:
        return self.architecture.head_width

    def _layer_total(
        self,
        candidates: _Candidates,
        written: Float[Tensor, "h K B s D"],
        layer: int,
        heads: list[int],
        place: _Places,
    ) -> Float[Tensor, "K B s D"]:
        """What a post-norm sums: heads as they are run where they are read, else unread."""
        assert candidates.read is not None and self.ablated.unread is not None
        first = self.graph.first_writer(layer)
        read = candidates.read[:, first : first + self.graph.n_heads].transpose(0, 1)
        read = read[:, :, None, :, None].to(written.device, written.dtype)  # [heads, K, 1, S|1, 1]
        unread = self.ablated.unread[layer][:, None]
        if place.positions is not None:
            read, unread = (_gathered(x, place.positions) for x in (read, unread))
        return all_heads(written, read, unread, heads)

    def _mlp(self, candidates: _Candidates, layer: int) -> None:
        block, place = self.architecture.blocks[layer], self._place(layer, self.graph.n_heads)
        assert block.norm2 is not None
        reader = self.graph.first_reader(layer + 1) - 1
        level = 2 * layer if self.graph.parallel else 2 * layer + 1
        inputs = self._inputs(candidates, [reader], level, place)
        written = block.feed_forward(block.norm2(inputs))
        self.work += inputs[..., 0].numel() * _mlp_weights(block)
        self._hand_on(np.array([self.graph.first_writer(layer + 1) - 1]), written, place)

    def _hand_on(
        self, writers: Bool[np.ndarray, "w"], written: Float[Tensor, "w K B s D"], place: _Places
    ) -> None:
        """Shows later readers what some nodes write."""
        change = place.change(writers, written)
        if place is self.everywhere:
            self.everywhere.append(change)
            assert self.scored.positions is not None
            change = _gathered(change, self.scored.positions)
        self.scored.append(change)


class _Candidates:
    """Circuits that lack some of the present one's edges, and what running them takes."""

    def __init__(self, edges: Sequence[Edge], removed: Bool[np.ndarray, "K E"]) -> None:
        self.edges, self.removed = list(edges), removed
        self.by_reader: dict[int, list[int]] = {}
        for number, edge in enumerate(self.edges):
            self.by_reader.setdefault(edge[0], []).append(number)
        self.steps: list[tuple[int, list[int], bool]] = []  # layer, heads, whether its MLP
        self.all = self.moved = np.array([], int)  # changed writers; those at all positions
        self.read: Bool[Tensor, "K W s"] | None = None
        self.rescaled: set[int] = set()  # layers whose heads are no longer all read that were
        self.logits: Float[Tensor, "K B P V"] | None = None

    def lost_by(self, candidate: int) -> list[Edge]:
        """The edges that a candidate lacks."""
        return [self.edges[number] for number in np.flatnonzero(self.removed[candidate])]

    def of_reader(self, reader: int) -> tuple[list[Edge], Bool[np.ndarray, "K e"]]:
        """The edges into a reader, and which candidates lack them."""
        numbers = self.by_reader[reader]
        return [self.edges[number] for number in numbers], self.removed[:, numbers]


class _Places:
    """What nodes write and read at some positions of each prompt: at all, or at the scored ones.

    `differences` are a_w - ablated_w of the present circuit, `changes` a'_w - a_w of candidates.
    """

    def __init__(
        self,
        written: Float[Tensor, "W B s D"],
        removed: Float[Tensor, "W B s D"],
        base: Float[Tensor, "levels B s D"],
        positions: Tensor | None,
        differences: Tensor | None = None,
    ) -> None:
        self.removed, self.base, self.positions = removed, base, positions
        self.differences = written.sub_(removed) if differences is None else differences
        self.expect(np.array([], int), 0)

    def at(self, positions: Tensor) -> _Places:
        """The same at some positions of each prompt."""
        removed, base, differences = (
            _gathered(x[:, None], positions)[:, 0]
            for x in (self.removed, self.base, self.differences)
        )
        return _Places(differences, removed, base, positions, differences)

    def expect(self, changed: Bool[np.ndarray, "C"], n_candidates: int) -> None:
        """Makes room for what some writers, in forward order, write under candidates."""
        _, *shape = self.differences.shape
        self.changed, self.count = changed, 0
        self.changes = self.differences.new_empty(len(changed), n_candidates, *shape)
        self.row_of = {writer: row for row, writer in enumerate(changed.tolist())}

    def change(
        self, writers: np.ndarray, written: Float[Tensor, "w K B s D"]
    ) -> Float[Tensor, "w K B s D"]:
        """What some writers write, less what they do in the present circuit."""
        rows = torch.from_numpy(writers).to(written.device)
        return written.sub_((self.differences[rows] + self.removed[rows])[:, None])

    def append(self, change: Float[Tensor, "w K B s D"]) -> None:
        self.changes[self.count : self.count + len(change)] = change
        self.count += len(change)

    def accept(self, candidate: int) -> None:
        """Takes over what one of the candidates changed."""
        rows = torch.from_numpy(self.changed).to(self.changes.device)
        self.differences[rows] += self.changes[:, candidate]
        self.expect(np.array([], int), 0)

    def mix(
        self, kept: Bool[np.ndarray, "R W *S"], rows: list[int], level: int, n_candidates: int
    ) -> Float[Tensor, "r K B s D"]:
        """What readers get that read the same edges as in the present circuit."""
        own = kept[rows]
        columns = np.flatnonzero(own.reshape(*own.shape[:2], -1).any(2).any(0))
        differences = self.differences[torch.from_numpy(columns).to(self.differences.device)]
        present = self._product(own[:, columns], differences[:, None])
        present += self.base[level]
        changed = self.changed[: self.count]
        shares = own[:, changed]
        if not shares.any():
            return present.repeat(1, n_candidates, 1, 1, 1)
        return self._product(shares, self.changes[: self.count]).add_(present)

    def _product(
        self, kept: Bool[np.ndarray, "r c *S"], values: Float[Tensor, "c k B s D"]
    ) -> Float[Tensor, "r k B s D"]:
        """The sum of values over kept edges."""
        shares = torch.from_numpy(kept).to(values.device, values.dtype)
        if shares.ndim == 2:
            return (shares @ values.flatten(1)).view(len(shares), *values.shape[1:])
        shares = shares[:, :, None] if self.positions is None else shares[:, :, self.positions]
        return torch.einsum("rcbs,ckbsd->rkbsd", shares, values)

    def take_away(
        self,
        inputs: Float[Tensor, "K B s D"],
        edges: list[Edge],
        lost: Bool[np.ndarray, "K e"],
    ) -> None:
        """Takes from a reader's inputs what they read over edges that candidates lack."""
        values, shares = self.differences, torch.from_numpy(lost).to(inputs.device, inputs.dtype)
        writers = torch.tensor([edge[1] for edge in edges], device=values.device)
        values = values[writers][:, None].expand(-1, len(inputs), -1, -1, -1)  # [e, K, B, s, D]
        rows = {n: self.row_of[edge[1]] for n, edge in enumerate(edges) if edge[1] in self.row_of}
        if rows:
            values = values.clone()
            values[list(rows)] += self.changes[list(rows.values())]
        elif len(edges[0]) == 2:
            inputs -= (shares @ values[:, 0].flatten(1)).view_as(inputs)
            return
        shares = shares.T[:, :, None, None, None]
        if len(edges[0]) == 3:
            where = torch.tensor([edge[2] for edge in edges], device=values.device)
            here = self.positions
            if here is None:
                here = torch.arange(values.shape[3], device=values.device)[None]
            shares = shares * (here == where[:, None, None])[:, None, :, :, None]
        inputs -= (shares * values).sum(0)


def _gathered(
    values: Float[Tensor, "n k B S D"], positions: Tensor
) -> Float[Tensor, "n k B P D"]:
    """Values at some positions of each prompt; axes of size 1 are the same for all."""
    if values.shape[-2] == 1:
        return values
    shape = (*values.shape[:2], *positions.shape, values.shape[-1])
    values = values.expand(-1, -1, len(positions), -1, -1)
    return values.gather(3, positions[None, None, :, :, None].expand(shape))


def _mlp_weights(block: Block) -> int:
    assert block.mlp is not None
    parts = (block.mlp.up, block.mlp.down, block.mlp.gate)
    return sum(part.weight.numel() for part in parts if part is not None)
