"""Runs of circuits that lack a few edges of the present one: only what they reach is run.

A removed edge w -> r changes what r reads by ablated_w - a_w.  From there on only nodes are run
that read something changed over kept edges (`circuits.engine.candidates`); all others keep the
values that they have in the present circuit.  A reader's input is

    x_r = base_r + sum_w m[r, w] (a_w - ablated_w)         of the present circuit
        + sum_{w changed} m[r, w] (a'_w - a_w)             what has changed before it
        - sum_{w -> r removed} (a'_w - ablated_w)          what it no longer reads

The first line is the same for all candidates.  It is summed anew in each run, so that rounding does
not add up from circuit to circuit.

What the logits depend on only at the positions that are scored is run there alone
(`circuits.engine.live_nodes.Needed`).

Shapes: candidates K, edges removed by any of them E, batch B, pos S, d_model D, head width H,
readers R, writers W, readers r and writers w of one step, scored positions P, vocabulary V; s is S
or P; `*S` positions, where edges are told apart by them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.engine.candidates import Candidates, Edge, Present, Step
from circuits.engine.engine import Engine
from circuits.engine.masked import Ablated, Seen, all_heads
from circuits.engine.places import Places, at_positions
from circuits.model.architecture import Architecture, Block, Linear
from circuits.model.attention import attend
from circuits.prompts.prompts import Prompts


class Incremental:
    """A circuit's run on a batch, from which those of smaller circuits are reached.

    `logits` are those of the present circuit, [B, P, V]; `work` counts the multiply-adds of
    candidates' runs.
    """

    @torch.no_grad()
    def __init__(
        self, engine: Engine, prompts: Prompts, kept: Bool[Tensor, "R W *S"], ablated: Ablated
    ) -> None:
        """Runs the circuit once, by `Engine.masked`; ValueError as there."""
        self.architecture, self.graph = engine.architecture, engine.graph
        self.prompts, self.ablated = prompts.to(engine.device), ablated
        post_normed = (n for n, block in enumerate(self.architecture.blocks) if block.post_norm1)
        self.present = Present(self.graph, kept.cpu().numpy(), frozenset(post_normed))
        embedded = engine.embed(prompts)
        written = embedded.new_zeros(len(self.graph.writers), *embedded.shape[1:])
        written[: len(embedded)] = embedded

        def keep(seen: Seen) -> None:
            written[seen.writers] = seen.written[:, 0]

        self.logits = engine.masked(prompts, kept, ablated, observe=keep)
        self.everywhere = Places(written.sub_(ablated.writers), ablated.writers, ablated.base)
        self.scored = self.everywhere.at(self.prompts.positions % written.shape[2])
        self.candidates: tuple[Candidates, Float[Tensor, "K B P V"]] | None = None
        self.work = 0

    @torch.no_grad()
    def without(
        self, edges: Sequence[Edge], removed: Bool[np.ndarray, "K E"]
    ) -> Float[Tensor, "K B P V"]:
        """The logits of K circuits; the k-th lacks those kept edges that `removed[k]` says."""
        candidates = Candidates(self.present, edges, removed)
        self.everywhere.expect(_writers(candidates.steps, everywhere=True), len(removed))
        self.scored.expect(_writers(candidates.steps), len(removed))
        for step in candidates.steps:
            self._hand_on(step, (self._heads if step.heads else self._mlp)(candidates, step))
        last = [len(self.graph.readers) - 1]
        inputs = self._inputs(candidates, last, 2 * self.graph.n_layers, self.scored)[0]
        logits = self.architecture.logits(inputs)
        self.work += logits.numel() * inputs.shape[-1]
        logits = logits.expand(len(candidates), -1, -1, -1)
        self.candidates = candidates, logits
        return logits

    @torch.no_grad()
    def accept(self, candidate: int) -> None:
        """Makes one of the circuits that were run last the present one."""
        assert self.candidates is not None, "there is nothing to accept before `without`"
        candidates, logits = self.candidates
        self.everywhere.accept(candidate)
        self.scored.accept(candidate)
        self.present = self.present.without(candidates.lost_by(candidate))
        self.logits, self.candidates = logits[candidate].clone(), None

    def _inputs(
        self, candidates: Candidates, readers: list[int], level: int, places: Places
    ) -> Float[Tensor, "r K B s D"]:
        """What some readers get under each candidate; K = 1 where that is the same for all."""
        kept, lost = self.present.kept[readers], any(r in candidates.into for r in readers)
        inputs = places.mix(kept, level, len(candidates) if lost else 1)
        self.work += inputs.numel() * places.count
        for number, reader in enumerate(readers):
            if reader in candidates.into:
                places.take_away(inputs[number], candidates.lost_into(reader))
        return inputs

    def _hand_on(self, step: Step, written: Float[Tensor, "w K B s D"]) -> None:
        """Shows later readers what some nodes write."""
        if not step.everywhere:
            self.scored.take(step.writers, written)
            return
        assert self.scored.positions is not None
        change = self.everywhere.take(step.writers, written)
        self.scored.append(at_positions(change, self.scored.positions))

    def _mlp(self, candidates: Candidates, step: Step) -> Float[Tensor, "w K B s D"]:
        block, graph = self.architecture.blocks[step.layer], self.graph
        assert block.norm2 is not None
        reader = graph.first_reader(step.layer + 1) - 1
        level = 2 * step.layer if graph.parallel else 2 * step.layer + 1
        inputs = self._inputs(candidates, [reader], level, self._places(step))
        self.work += _mlp_weights(block) * inputs[..., 0].numel()
        return block.feed_forward(block.norm2(inputs))

    def _heads(self, candidates: Candidates, step: Step) -> Float[Tensor, "w K B s D"]:
        architecture, block = self.architecture, self.architecture.blocks[step.layer]
        attention, places, n = block.attention, self._places(step), len(candidates)
        kv_heads, kv_of_head = np.unique(
            np.array(step.heads) // self.graph.kv_group, return_inverse=True
        )
        q, k, v = self._sides(candidates, step, kv_heads.tolist())
        key_mask = None if self.graph.causal else self.prompts.key_mask.repeat(n, 1)
        at = None if places.positions is None else places.positions.repeat(n, 1)
        z = attend(architecture, attention, q, k, v, key_mask, kv_of_head.tolist(), at)
        weight = architecture.output_weight(attention)[step.heads]
        written = torch.bmm(z.flatten(1, 2), weight)
        self.work += written.numel() * z.shape[-1] + 2 * z.numel() * k.shape[2]
        written = written.view(len(written), n, -1, *z.shape[2:3], written.shape[-1])
        if block.post_norm1 is not None:
            written *= block.post_norm1.factor(self._all_heads(candidates, step, written))
        return written

    def _sides(self, candidates: Candidates, step: Step, kv_heads: list[int]) -> list[Tensor]:
        """Queries, and keys and values of the heads that these read, [heads, N, s, H]."""
        graph, attention = self.graph, self.architecture.blocks[step.layer].attention
        first = graph.first_reader(step.layer)
        sides = (
            (attention.q, first, step.heads),
            (attention.k, first + graph.n_heads, kv_heads),
            (attention.v, first + graph.n_heads + graph.kv_heads, kv_heads),
        )
        queries, *moving = ([start + head for head in heads] for _, start, heads in sides)
        groups = [(queries, self.scored), (sum(moving, []), self.everywhere)]
        if step.everywhere:
            groups = [(sum(moving, queries), self.everywhere)]
        inputs = [
            (some, self._inputs(candidates, some, 2 * step.layer, places))
            for readers, places in groups
            for some in self._alike(candidates, readers, places)
        ]
        return [self._projected(step, *side, inputs, len(candidates)) for side in sides]

    def _alike(self, candidates: Candidates, readers: list[int], places: Places) -> list[list[int]]:
        """Readers that get other inputs under each candidate, and those that get the same."""
        changes = self.present.by_reader[:, places.changed[: places.count]].any(1)
        vary = [reader for reader in readers if changes[reader] or reader in candidates.into]
        same = [reader for reader in readers if reader not in vary]
        return [some for some in (vary, same) if some]

    def _projected(
        self,
        step: Step,
        projection: Linear,
        first: int,
        heads: list[int],
        inputs: list[tuple[list[int], Tensor]],
        n_candidates: int,
    ) -> Float[Tensor, "h N s H"]:
        """What a projection makes for some heads of their readers' inputs, `first` head 0's."""
        norm, width = self.architecture.blocks[step.layer].norm1, self.architecture.head_width
        readers, parts = [first + head for head in heads], []
        for some, mixed in inputs:
            rows = [row for row, reader in enumerate(some) if reader in readers]
            if rows:  # in one piece, as all readers are in order
                x, late = norm.deferred(mixed[rows[0] : rows[-1] + 1])
                own = [some[row] - first for row in rows]
                made = projection.each(x.flatten(1, 3), width, own, late)
                self.work += made.numel() * x.shape[-1]
                parts.append((own, made.view(*x.shape[:4], width)))
        shape = parts[0][1].shape[2:]
        if len(parts) == 1 and parts[0][1].shape[1] == n_candidates:
            return parts[0][1].flatten(1, 2)
        side = parts[0][1].new_empty(len(heads), n_candidates, *shape)
        for own, made in parts:
            side[[heads.index(head) for head in own]] = made.expand(-1, n_candidates, *shape)
        return side.flatten(1, 2)

    def _all_heads(
        self, candidates: Candidates, step: Step, written: Float[Tensor, "w K B s D"]
    ) -> Float[Tensor, "K B s D"]:
        """What a layer's post-norm sums: heads as they are run where they are read, else unread."""
        assert candidates.read is not None and self.ablated.unread is not None
        first, positions = self.graph.first_writer(step.layer), self._places(step).positions
        read = candidates.read[:, first : first + self.graph.n_heads].transpose(0, 1)
        read = read[:, :, None, :, None].to(written.device, written.dtype)  # [heads, K, 1, S|1, 1]
        unread = self.ablated.unread[step.layer][:, None]
        if positions is not None:
            read, unread = at_positions(read, positions), at_positions(unread, positions)
        return all_heads(written, read, unread, step.heads)

    def _places(self, step: Step) -> Places:
        return self.everywhere if step.everywhere else self.scored


def _writers(steps: Sequence[Step], *, everywhere: bool = False) -> list[int]:
    """What the steps run, or what they run at all positions."""
    return [
        writer for step in steps if step.everywhere or not everywhere for writer in step.writers
    ]


def forward_work(architecture: Architecture, prompts: Prompts) -> int:
    """The multiply-adds of a plain run with logits at the scored positions."""
    n_tokens, length = prompts.clean.numel(), prompts.clean.shape[1]
    heads = architecture.graph.n_heads * architecture.head_width
    total = prompts.positions.numel() * architecture.width * architecture.outputs
    for block in architecture.blocks:
        attention = block.attention
        linear = [attention.q, attention.k, attention.v, attention.o]
        weights = sum(part.weight.numel() for part in linear) + _mlp_weights(block)
        total += n_tokens * (weights + 2 * length * heads)
    return total


def _mlp_weights(block: Block) -> int:
    if block.mlp is None:
        return 0
    parts = (block.mlp.up, block.mlp.down, block.mlp.gate)
    return sum(part.weight.numel() for part in parts if part is not None)
