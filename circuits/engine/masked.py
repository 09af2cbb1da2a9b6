"""One run of the model under edge masks: layer by layer, each node on its own readers' inputs.

What readers get is said in `circuits.engine.mixing`; a reader's norm is applied to that mixture.
Only living nodes are run (`circuits.engine.live_nodes`).

Shapes: candidate masks K, batch B (b per candidate), N = K b, pos S, d_model D, head width E,
living writers C, readers r of one group, scored positions P, vocabulary V.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.engine.live_nodes import Layer, LiveNodes
from circuits.engine.mixing import Differences
from circuits.model.architecture import Architecture, Block
from circuits.model.attention import attend
from circuits.prompts.prompts import Prompts


@dataclass(frozen=True)
class Place:
    """Which row of some values, and which of their positions, each row n of a run takes at T."""

    rows: Int[Tensor, "n"]
    positions: Int[Tensor, "n T"]

    def of(self, values: Float[Tensor, "*w B S D"]) -> Float[Tensor, "*w n T D"]:
        """The values in their places, copied."""
        return values[..., self.rows[:, None], self.positions, :]


@dataclass(frozen=True)
class Ablated:
    """What removed edges carry, and what a reader sees when all of its edges are removed.

    `writers` may have one row in B or S where the value is the same for all; `base[level]` is the
    sum of the writers and biases before reader group `level` (attention of block l: 2l, its MLP:
    2l + 1, logits: 2L).  With post-norms, `unread` is what each head gives its layer's norm when
    all of its inputs are ablated.

    With a `place`, `writers` and `base` are those of other prompts, and a run takes them from there
    as it needs them: of all writers, copies for each of its rows could be many times as large.

    With `donors` the rows are other prompts: what reader r of prompt b does not keep has the values
    of row `donors[r, b]`.
    """

    writers: Float[Tensor, "W B S D"]
    base: Float[Tensor, "levels B S D"]
    unread: Float[Tensor, "L heads n T D"] | None = None  # of the rows of a run, in their places
    place: Place | None = None
    donors: Int[Tensor, "R b"] | None = None

    def removed(self, writers: slice | Int[Tensor, "c"]) -> Float[Tensor, "c B S D"]:
        """What edges from some writers carry."""
        return self._placed(self.writers[writers])

    def level(self, level: int) -> Float[Tensor, "B S D"]:
        """What a reader group sees."""
        return self._placed(self.base[level])

    def _placed(self, values: Tensor) -> Tensor:
        return values if self.place is None else self.place.of(values)


@dataclass(frozen=True)
class Start:
    """A run that starts at block `layer`: the values of all writers before it."""

    layer: int
    writers: Float[Tensor, "w B S D"]


@dataclass(frozen=True)
class Seen:
    """What some nodes of one block did in a run under masks: its living heads, or its MLP."""

    layer: int
    writers: list[int]  # which nodes
    written: Float[Tensor, "w K b S D"]  # what they write
    # of heads, before they are normed by head and rotated
    queries: Float[Tensor, "w N S E"] | None = None
    keys: Float[Tensor, "kv N S E"] | None = None
    kv_of_head: list[int] | None = None  # see `attend`


class MaskedRun:
    """One run under masks: the state that its steps share."""

    def __init__(
        self,
        architecture: Architecture,
        todo: LiveNodes,
        masks: Float[Tensor, "K R W *S"],
        ablated: Ablated,
        start: Start,
        prompts: Prompts,
        *,
        per_example: bool,
        grad: bool,
        upstream: Float[Tensor, "W B S D"] | None = None,
        observe: Callable[[Seen], None] | None = None,
    ) -> None:
        self.architecture, self.graph = architecture, architecture.graph
        self.todo, self.ablated, self.start = todo, ablated, start
        self.upstream, self.observe, self.grad = upstream, observe, grad
        self.columns = todo.writers.to(masks.device)
        self.key_mask = None
        if not self.graph.causal:
            mask = prompts.key_mask
            self.key_mask = mask if per_example else mask.repeat(len(masks), 1)
        self.read: Tensor | None = None  # [W, K, 1, S|1, 1]: 1 where logits depend on a writer
        if ablated.unread is not None:
            read, _ = self.graph.read(masks.detach() != 0)
            self.read = read.transpose(0, 1)[:, :, None, :, None].to(masks.dtype)
        prefix = start.writers[todo.prefix_rows(masks.device)]
        self.differences = Differences(
            masks if todo.all_writers else masks[:, :, self.columns],
            prefix - self._removed(slice(0, len(prefix))),
            per_example=per_example,
            grad=grad,
        )

    def logits(self, at: Int[Tensor, "B P"]) -> Float[Tensor, "K B P V"]:
        """Runs the living nodes and returns the logits at some positions."""
        for layer in range(self.start.layer, self.graph.n_layers):
            block, step = self.architecture.blocks[layer], self.todo.layers[layer]
            if step.heads:
                self._heads(block, layer)
            if step.mlp:
                self._mlp(block, layer)
        last = slice(len(self.graph.readers) - 1, None)
        logits = self.architecture.logits(self._inputs(last, 2 * self.graph.n_layers, at)[0])
        return logits.flatten(0, 1)[None] if self.differences.per_example else logits

    def _inputs(
        self, readers: list[int] | slice, level: int, at: Int[Tensor, "B P"] | None = None
    ) -> Float[Tensor, "r K b S D"]:
        """What some readers get."""
        mixed = self.differences.mix(readers, at)
        if self.ablated.donors is None:
            base = self.differences.align(self.ablated.level(level))  # [K|1, b|1, s|1, D]
        else:
            base = self._donated(readers, level, self.ablated.donors[readers])
        base = base if at is None else self.differences.gather(base, at)
        return mixed + base if self.grad else mixed.add_(base)

    def _donated(
        self, readers: list[int] | slice, level: int, donors: Int[Tensor, "r b"]
    ) -> Float[Tensor, "r K b S D"]:
        """What removed edges bring to some readers, each from its own donors.

        A reader gets base - sum_w m[r, w] ablated_w of its donor, beside all of what it keeps.
        """
        kept = self.differences.masks[:, readers, : self.differences.count]
        values = self._values(slice(0, self.differences.count))
        by_position = "krcs,cnsd->krnsd" if self.differences.by_position else "krc,cnsd->krnsd"
        rest = self.ablated.level(level) - torch.einsum(by_position, kept, values)
        rows = torch.arange(len(donors), device=rest.device)[:, None]
        return rest[:, rows, donors.to(rest.device)].transpose(0, 1)

    def _removed(self, columns: slice) -> Tensor:
        """Ablated values of some living writers, broadcastable to [c, B, S, D]; 0 with donors.

        With donors they are no one value for all readers (see `_donated`).
        """
        values = self._values(columns)
        return values if self.ablated.donors is None else values.new_zeros(len(values), 1, 1, 1)

    def _values(self, columns: slice) -> Tensor:
        """Ablated values of some living writers as they are given."""
        return self.ablated.removed(columns if self.todo.all_writers else self.columns[columns])

    def _heads(self, block: Block, layer: int) -> None:
        step, attention = self.todo.layers[layer], block.attention
        inputs = self._inputs(step.readers, 2 * layer).flatten(1, -2)  # [r, N S, D]
        q, k, v = self._sides(block, step, inputs)
        z = attend(self.architecture, attention, q, k, v, self.key_mask, step.kv_of_head)
        weight = self.architecture.output_weight(attention)
        weight = weight if step.all_heads else weight[step.heads]
        into = None
        if not self.grad:  # straight to where it is kept
            into = self.differences.room(len(weight)).view(len(weight), -1, weight.shape[-1])
        written = torch.bmm(z.flatten(1, 2), weight, out=into)
        written = written.view(-1, *self.differences.shape)
        if block.post_norm1 is not None:
            factor = block.post_norm1.factor(self._all_heads(written, layer))
            written = written * factor if self.grad else written.mul_(factor)
        self._hand_on(written, layer, q, k)

    def _sides(self, block: Block, step: Layer, inputs: Float[Tensor, "r M D"]) -> list[Tensor]:
        """Queries, keys and values of living heads from their own inputs, [heads, N, S, E]."""
        attention, width = block.attention, self.architecture.head_width
        inputs, late = block.norm1.deferred(inputs)
        sides = []
        projections, living = (
            (attention.q, attention.k, attention.v),
            (step.heads, *2 * [step.kv_heads]),
        )
        parts = inputs.split([len(heads) for heads in living])
        for projection, heads, own in zip(projections, living, parts, strict=True):
            side = projection.each(own, width, None if step.all_heads else heads, late)
            sides.append(side.view(len(heads), -1, self.differences.shape[2], width))
        return sides

    def _all_heads(self, heads: Float[Tensor, "r K b S D"], layer: int) -> Float[Tensor, "K b S D"]:
        """What a layer's post-norm sums: heads as in this run where they are read, else unread."""
        assert self.read is not None and self.ablated.unread is not None
        first, step = self.graph.first_writer(layer), self.todo.layers[layer]
        read = self.read[first : first + self.graph.n_heads]
        if read.all():
            return heads.sum(0)
        alone = self.ablated.unread[layer]
        if self.ablated.donors is not None:  # of the donors of what a head asks
            asked = self.graph.first_reader(layer)
            donors = self.ablated.donors[asked : asked + self.graph.n_heads].to(alone.device)
            alone = alone[torch.arange(len(alone), device=alone.device)[:, None], donors]
        unread = self.differences.align(alone)
        return all_heads(heads, read, unread, None if step.all_heads else step.heads)

    def _mlp(self, block: Block, layer: int) -> None:
        assert block.norm2 is not None
        reader = self.graph.first_reader(layer + 1) - 1
        level = 2 * layer if self.graph.parallel else 2 * layer + 1
        inputs = self._inputs(slice(reader, reader + 1), level)[0]
        self._hand_on(block.feed_forward(block.norm2(inputs))[None], layer)

    def _hand_on(
        self,
        written: Float[Tensor, "w K b S D"],
        layer: int,
        q: Tensor | None = None,
        k: Tensor | None = None,
    ) -> None:
        """Shows what some nodes write, and hands it, or what `upstream` has, to later readers."""
        first = self.differences.count
        columns = slice(first, first + len(written))
        if self.observe is not None:
            kv_of_head = None if q is None else self.todo.layers[layer].kv_of_head
            self.observe(Seen(layer, self.columns[columns].tolist(), written, q, k, kv_of_head))
        if self.upstream is not None:
            written = self.differences.per_candidate(self.upstream[self.columns[columns]])
        self.differences.append(written, self.differences.align(self._removed(columns)))


def all_heads(
    computed: Float[Tensor, "h K b s D"],
    read: Float[Tensor, "heads K _ t 1"],
    unread: Float[Tensor, "heads k _ p D"],
    heads: list[int] | None,
) -> Float[Tensor, "K b s D"]:
    """What a layer's post-norm sums: heads as in a run where they are read, else unread.

    `read` and `unread` may have one row where positions or prompts are alike.

    Args:
        computed: of the heads that are run.
        heads: which ones these are; None: all of them.
    """
    own = read if heads is None else read[heads]
    return (own * computed).sum(0) + ((1 - read) * unread).sum(0)
