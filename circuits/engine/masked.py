"""One run of the model under edge masks.

Under a mask m[r, w] in [0, 1] (1 = kept) every reader gets its own input,

    x_r = sum_w  m[r, w] a_w + (1 - m[r, w]) ablated_w  +  attention output biases
        = base_r + sum_w m[r, w] (a_w - ablated_w)

with a_w the writer's output in this run, and its norm is applied to that mixture.  The differences
a_w - ablated_w are kept in one buffer, in forward order, so that all readers of a layer are one
matrix product. What comes before the first layer that is run is the same for all candidate masks
and is kept once.

Shapes: candidate masks K, batch B (b per candidate), pos S, d_model D, living writers C, readers r
of one group, scored positions P, vocabulary V.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.engine.live_nodes import LiveNodes
from circuits.model.architecture import Block
from circuits.model.attention import attend


@dataclass(frozen=True)
class Ablated:
    """What removed edges carry, and what a reader sees when all of its edges are removed.

    `writers` may have one row in B or S where the value is the same for all; `base[level]` is the
    sum of the writers and biases before reader group `level` (attention of block l: 2l, its MLP: 2l
    + 1, logits: 2L). With post-norms, `unread` is what each head gives its layer's norm when all of
    its inputs are ablated.
    """

    writers: Float[Tensor, "W B S D"]
    base: Float[Tensor, "levels B S D"]
    unread: Float[Tensor, "L heads B S D"] | None = None


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
    queries: Float[Tensor, "w N S E"] | None = (
        None  # of heads, N = K b, before they are normed and rotated
    )
    keys: Float[Tensor, "kv N S E"] | None = None
    kv_of_head: list[int] | None = None  # see `attend`


class MaskedRun:
    """One run under masks: the state that its steps share."""

    def __init__(
        self,
        engine: Any,  # Engine
        todo: LiveNodes,
        masks: Float[Tensor, "K R W *S"],
        ablated: Ablated,
        start: Start,
        key_mask: Bool[Tensor, "B S"] | None,
        per_example: bool,
        grad: bool,
        upstream: Float[Tensor, "W B S D"] | None = None,
        observe: Callable[[Seen], None] | None = None,
    ) -> None:
        self.engine, self.todo, self.ablated, self.grad = engine, todo, ablated, grad
        self.upstream, self.observe = upstream, observe
        self.per_example, self.start = per_example, start
        n_prompts, n_positions, width = start.writers.shape[1:]
        self.candidates = len(masks)
        self.rows = 1 if per_example else n_prompts  # prompts per candidate
        self.shape = (self.candidates, self.rows, n_positions, width)
        self.columns = todo.writers.to(masks.device)
        self.per_position = engine.graph.n_positions is not None
        self.read: Tensor | None = (
            None  # [W, K, 1, S | 1, 1]: 1 where the logits depend on a writer
        )
        if ablated.unread is not None:
            read, _ = engine.graph.read(masks.detach() != 0)
            self.read = read.transpose(0, 1)[:, :, None, :, None].to(masks.dtype)
        self.masks = (
            masks if todo.all_writers else masks[:, :, self.columns]
        )  # [K, R, C] or [K, R, C, S]
        self.key_mask = key_mask
        if key_mask is not None and not per_example:
            self.key_mask = key_mask.repeat(self.candidates, 1)
        # Prompts differ, masks do not touch them: what comes before the start is the same for all
        # candidates.
        prefix = start.writers[todo.prefix_rows(masks.device)]
        prefix = prefix - self._ablated_rows(slice(0, len(prefix)))
        self.groups: list[Tensor] = []
        self.written = 0
        if self.candidates == 1 or per_example or grad or self.per_position:
            self.shared = prefix.new_empty(0, *prefix.shape[1:])
            self.buffer = prefix.new_empty(len(self.columns), *self.shape)
            self._write(self._per_candidate(prefix))
        else:
            self.shared = prefix
            self.buffer = prefix.new_empty(len(self.columns) - len(prefix), *self.shape)

    def _per_candidate(self, values: Float[Tensor, "w B S D"]) -> Float[Tensor, "w K b S D"]:
        values = values[:, :, None] if self.per_example else values[:, None]
        return values.expand(-1, *self.shape)

    def _ablated_rows(self, columns: slice) -> Tensor:
        """Ablated values of some living writers, broadcastable to [c, B, S, D]."""
        values = self.ablated.writers
        return values[columns] if self.todo.all_writers else values[self.columns[columns]]

    def _write(self, value: Float[Tensor, "w K b S D"]) -> None:
        """Appends differences to the buffer; with gradients also keeps the differentiable original."""
        self.buffer[self.written : self.written + len(value)] = value.detach()
        self.written += len(value)
        if self.grad:
            self.groups.append(value)

    def _align(self, values: Float[Tensor, "*w b s D"]) -> Float[Tensor, "*w k c s D"]:
        """Per-prompt values beside per-candidate ones."""
        return values.unsqueeze(-3 if self.per_example else -4)

    def _mix(
        self, readers: list[int] | slice, level: int, positions: Tensor | None = None
    ) -> Tensor:
        """Inputs of some readers, [r, K, b, S, D]: base + mask times differences."""
        base = self._align(self.ablated.base[level])  # [K|1, b|1, s|1, D]
        if self.per_position:
            return self._mix_per_position(readers, base, positions)
        shared, own = self.shared, self.buffer[: self.written]
        if positions is not None:
            rows = torch.arange(len(positions), device=positions.device)[:, None]
            base = _gather(base, positions, self.per_example)
            shared = (
                shared[:, rows, positions] if len(shared) else shared[:, :, : positions.shape[1]]
            )
            own = _gather(own, positions, self.per_example)
        mask = self.masks[:, readers, : len(shared) + len(own)]  # [K, r, c]
        n_positions = self.shape[2] if positions is None else positions.shape[1]
        shape = (self.candidates, mask.shape[1], self.rows, n_positions, self.shape[3])
        if self.grad:
            groups = (
                self.groups
                if positions is None
                else [_gather(group, positions, self.per_example) for group in self.groups]
            )
            mixed = _Mix.apply(mask, own.flatten(2), *groups).view(shape)
        elif len(shared):
            common = mask[..., : len(shared)].reshape(-1, len(shared)) @ shared.flatten(1)
            mixed = common.view(self.candidates, mask.shape[1], -1)
            if len(own):
                mixed = mixed.baddbmm_(mask[..., len(shared) :], own.flatten(2).transpose(0, 1))
            mixed = mixed.view(shape)
        else:
            mixed = torch.bmm(mask, own.flatten(2).transpose(0, 1)).view(shape)
        mixed = mixed + base[:, None] if self.grad else mixed.add_(base[:, None])
        return mixed.transpose(0, 1)

    def _mix_per_position(
        self, readers: list[int] | slice, base: Tensor, positions: Tensor | None
    ) -> Tensor:
        """`_mix` with a mask for each position."""
        differences = torch.cat(self.groups) if self.grad else self.buffer[: self.written]
        mask = self.masks[:, readers, : len(differences)]
        mixed = torch.einsum("krcs,ckbsd->rkbsd", mask, differences) + base
        return mixed if positions is None else _gather(mixed, positions, self.per_example)

    def logits(self, positions: Int[Tensor, "B P"] | None) -> Float[Tensor, "K B P V"]:
        engine, graph = self.engine, self.engine.graph
        for layer in range(self.start.layer, graph.n_layers):
            block, step = engine.architecture.blocks[layer], self.todo.layers[layer]
            if step.heads is not None:
                self._heads(block, layer)
            if step.mlp:
                self._mlp(block, layer)
        residual = self._mix(slice(len(graph.readers) - 1, None), 2 * graph.n_layers, positions)[0]
        logits = engine._unembed(engine.architecture.final_norm(residual))
        return logits.flatten(0, 1)[None] if self.per_example else logits

    def _heads(self, block: Block, layer: int) -> None:
        engine, step = self.engine, self.todo.layers[layer]
        width, attention = engine.architecture.head_width, block.attention
        inputs = self._mix(step.readers, 2 * layer).flatten(1, -2)  # [r, K b S, D]
        # RMS normalisation multiplies rows: cheaper after the projection.  In float16 that could overflow.
        late = block.norm1.kind == "rms" and inputs.dtype != torch.float16
        scale = block.norm1.scale(inputs) if late else None
        inputs = inputs if late else block.norm1(inputs)
        sides, row = [], 0
        picks = (
            (attention.q, step.heads),
            (attention.k, step.kv_heads),
            (attention.v, step.kv_heads),
        )
        for projection, pick in picks:
            weight = projection.weight.unflatten(0, (-1, width)).mT  # [heads, D, E]
            bias = None if projection.bias is None else projection.bias.unflatten(0, (-1, width))
            if not step.all_heads:
                weight, bias = weight[pick], None if bias is None else bias[pick]
            rows = slice(row, row + len(weight))
            row += len(weight)
            if scale is not None:
                side = torch.bmm(inputs[rows], block.norm1.gained(weight)) * scale[rows]
                side = side if bias is None else side + bias[:, None]
            elif bias is not None:
                side = torch.baddbmm(bias[:, None], inputs[rows], weight)
            else:
                side = torch.bmm(inputs[rows], weight)
            sides.append(side.view(len(weight), -1, self.shape[2], width))
        kv_of_head = None if step.all_heads else step.kv_of_head
        q, k, v = sides
        z = attend(engine.architecture, attention, q, k, v, self.key_mask, kv_of_head)
        weight = engine._output_weight(attention)
        weight = weight if step.all_heads else weight[step.heads]
        columns = slice(
            self.written + len(self.shared), self.written + len(self.shared) + len(weight)
        )
        removed = self._align(self._ablated_rows(columns))
        if self.grad:
            heads = torch.bmm(z.flatten(1, 2), weight).view(-1, *self.shape)
            if block.post_norm1 is not None:
                heads = heads * block.post_norm1.factor(self._all_heads(heads, layer))
            self._write(self._show(heads, layer, columns, q, k, kv_of_head) - removed)
            return
        into = self.buffer[self.written : self.written + len(weight)]
        torch.bmm(z.flatten(1, 2), weight, out=into.view(len(weight), -1, self.shape[-1]))
        if block.post_norm1 is not None:
            into.mul_(block.post_norm1.factor(self._all_heads(into, layer)))
        if (read := self._show(into, layer, columns, q, k, kv_of_head)) is not into:
            into.copy_(read)
        into.sub_(removed)
        self.written += len(weight)

    def _show(
        self,
        written: Float[Tensor, "w K b S D"],
        layer: int,
        columns: slice,
        q: Tensor | None = None,
        k: Tensor | None = None,
        kv_of_head: list[int] | None = None,
    ) -> Float[Tensor, "w K b S D"]:
        """Shows what some nodes write; returns what later readers are given of it."""
        if self.observe is not None:
            self.observe(Seen(layer, self.columns[columns].tolist(), written, q, k, kv_of_head))
        if self.upstream is None:
            return written
        return self._per_candidate(self.upstream[self.columns[columns]])

    def _all_heads(self, heads: Float[Tensor, "r K b S D"], layer: int) -> Float[Tensor, "K b S D"]:
        """The sum over a layer's heads that its post-norm sees: of this run where they are read,
        else the unread.
        """
        assert self.read is not None and self.ablated.unread is not None
        first, step = self.engine.graph.first_writer(layer), self.todo.layers[layer]
        read = self.read[first : first + self.engine.graph.n_heads]
        if read.all():
            return heads.sum(0)
        computed = read if step.all_heads else read[step.heads]
        return (computed * heads).sum(0) + (
            (1 - read) * self._align(self.ablated.unread[layer])
        ).sum(0)

    def _mlp(self, block: Block, layer: int) -> None:
        assert block.norm2 is not None
        graph = self.engine.graph
        reader = graph.first_reader(layer + 1) - 1
        level = 2 * layer if graph.parallel else 2 * layer + 1
        inputs = self._mix(slice(reader, reader + 1), level)[0]
        column = self.written + len(self.shared)
        removed = self._align(self._ablated_rows(slice(column, column + 1)))
        written = block.feed_forward(block.norm2(inputs))[None]
        self._write(self._show(written, layer, slice(column, column + 1)) - removed)


class _Mix(torch.autograd.Function):
    """mask [K, r, c] times differences [c, K, N], with the differences' buffer read in place of a
    copy.

    The buffer holds the same numbers as `groups`; rows that were written are never written again.
    """

    @staticmethod
    def forward(ctx: Any, mask: Tensor, buffer: Tensor, *groups: Tensor) -> Tensor:
        ctx.mask, ctx.buffer, ctx.shapes = mask, buffer, [group.shape for group in groups]
        return torch.bmm(mask, buffer.transpose(0, 1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        for_mask = (
            torch.bmm(gradient, ctx.buffer.permute(1, 2, 0)) if ctx.needs_input_grad[0] else None
        )
        if not any(ctx.needs_input_grad[2:]):
            return for_mask, None, *(None for _ in ctx.shapes)
        for_differences = torch.bmm(ctx.mask.mT, gradient).transpose(0, 1)  # [c, K, N]
        parts = for_differences.split([shape[0] for shape in ctx.shapes])
        return (
            for_mask,
            None,
            *(part.reshape(shape) for part, shape in zip(parts, ctx.shapes, strict=True)),
        )


def _gather(values: Tensor, positions: Int[Tensor, "B P"], per_example: bool) -> Tensor:
    """`values` [..., k, b, s, D] at the scored positions; axes of size 1 are broadcast values."""
    batch_axis = values.ndim - 4 if per_example else values.ndim - 3
    if values.shape[batch_axis] == 1 and len(positions) > 1:
        shape = list(values.shape)
        shape[batch_axis] = len(positions)
        values = values.expand(shape)
    index = positions % values.shape[-2]
    index = index[:, None] if per_example else index[None]  # [k, b, P]
    shape = (*values.shape[:-2], index.shape[-1], values.shape[-1])
    return values.gather(-2, index[..., None].expand(shape))
