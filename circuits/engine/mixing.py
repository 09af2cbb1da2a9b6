"""What readers get in a run under masks: the one formula that everything else is built on.

Under a mask m[r, w] in [0, 1] (1 = kept) every reader has an input of its own,

    x_r = sum_w  m[r, w] a_w + (1 - m[r, w]) ablated_w  +  attention output biases
        = base_r + sum_w m[r, w] (a_w - ablated_w)

with a_w the writer's output in this run.  `Differences` holds a_w - ablated_w in one buffer, in
forward order, so that the sums of all readers of a layer are one matrix product; base_r is the same
for all masks (`Engine.ablated`).

Shapes: candidate masks K, batch B (b per candidate), pos S, d_model D, living writers C, readers r
of one group, scored positions P.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Differences:
    """What living writers wrote, less what removed edges carry."""

    def __init__(
        self, masks: Tensor, prefix: Float[Tensor, "c B S D"], *, per_example: bool, grad: bool
    ) -> None:
        """Takes masks [K, R, C], or [K, R, C, S] by position, and the writers before the run.

        With `per_example` mask k is for prompt k alone; with `grad` the originals of what is
        written are kept, for gradients to reach them.
        """
        self.masks, self.per_example, self.grad = masks, per_example, grad
        # Apart, so that a reader's gradient is put in its place once, not added to one for all.
        self.by_reader = masks.unbind(1) if grad else ()
        self.by_position = masks.ndim == 4
        n_prompts, *rest = prefix.shape[1:]
        self.shape = (len(masks), 1 if per_example else n_prompts, *rest)
        self.groups: list[Tensor] = []
        self.rows = 0  # written so far
        if len(masks) == 1 or per_example or grad or self.by_position:
            self.shared = prefix[:0]
            self.buffer = prefix.new_empty(masks.shape[2], *self.shape)
            self._store(self.per_candidate(prefix))
        else:  # prompts differ, masks do not touch them: once for all candidates
            self.shared = prefix
            self.buffer = prefix.new_empty(masks.shape[2] - len(prefix), *self.shape)

    @property
    def count(self) -> int:
        """How many living writers have written."""
        return len(self.shared) + self.rows

    def room(self, count: int) -> Float[Tensor, "c K b S D"]:
        """Where what the next writers write will be."""
        return self.buffer[self.rows : self.rows + count]

    def append(self, written: Float[Tensor, "c K b S D"], removed: Tensor) -> None:
        """Takes what the next writers wrote (which may be `room` itself), less `removed`."""
        if self.grad:
            self._store(written - removed)
        else:
            torch.sub(written, removed, out=self.room(len(written)))
            self.rows += len(written)

    def _store(self, difference: Float[Tensor, "c K b S D"]) -> None:
        self.room(len(difference)).copy_(difference.detach())
        self.rows += len(difference)
        if self.grad:
            self.groups.append(difference)

    def per_candidate(self, values: Float[Tensor, "c B S D"]) -> Float[Tensor, "c K b S D"]:
        """Values of prompts, once for each candidate."""
        return self.align(values).expand(-1, *self.shape)

    def align(self, values: Float[Tensor, "*c b s D"]) -> Float[Tensor, "*c k d s D"]:
        """Values of prompts beside values of candidates."""
        return values.unsqueeze(-3 if self.per_example else -4)

    def mix(
        self, readers: list[int] | slice, at: Int[Tensor, "B P"] | None = None
    ) -> Float[Tensor, "r K b S D"]:
        """Returns sum_w m[r, w] (a_w - ablated_w) over what has been written, at some positions."""
        if self.by_position:
            differences = torch.cat(self.groups) if self.grad else self.buffer[: self.rows]
            mask = self.masks[:, readers, : len(differences)]
            mixed = torch.einsum("krcs,ckbsd->rkbsd", mask, differences)
            return mixed if at is None else self.gather(mixed, at)
        shared, own = self.shared, self.buffer[: self.rows]
        if at is not None:
            own = self.gather(own, at)
            if len(shared):
                shared = shared[:, torch.arange(len(at), device=at.device)[:, None], at]
        mask = self._rows(readers) if self.grad else self.masks[:, readers, : self.count]
        if self.grad:
            groups = [group if at is None else self.gather(group, at) for group in self.groups]
            product = _Product.apply(mask, own.flatten(2), *groups)
        elif len(shared):
            product = self._with_shared(mask, shared, own)
        else:
            product = torch.bmm(mask, own.flatten(2).transpose(0, 1))
        return product.view(len(mask), -1, *own.shape[2:]).transpose(0, 1)

    def _rows(self, readers: list[int] | slice) -> Float[Tensor, "K r C"]:
        """The masks of some readers, with columns of writers that have not yet written."""
        if isinstance(readers, slice):
            return torch.stack(self.by_reader[readers], 1)
        return torch.stack([self.by_reader[reader] for reader in readers], 1)

    def _with_shared(
        self, mask: Float[Tensor, "K r c"], shared: Float[Tensor, "p b s D"], own: Tensor
    ) -> Tensor:
        """The product where the first writers are the same for all candidates."""
        before, after = mask[..., : len(shared)], mask[..., len(shared) :]
        product = before.reshape(-1, len(shared)) @ shared.flatten(1)
        product = product.view(*mask.shape[:2], -1)
        return product.baddbmm_(after, own.flatten(2).transpose(0, 1)) if len(own) else product

    def gather(self, values: Tensor, at: Int[Tensor, "B P"]) -> Tensor:
        """`values` [..., k, b, s, D] at some positions; axes of size 1 are broadcast values."""
        batch_axis = values.ndim - (4 if self.per_example else 3)
        if values.shape[batch_axis] == 1 and len(at) > 1:
            shape = list(values.shape)
            shape[batch_axis] = len(at)
            values = values.expand(shape)
        index = at % values.shape[-2]
        index = index[:, None] if self.per_example else index[None]  # [k, b, P]
        shape = (*values.shape[:-2], index.shape[-1], values.shape[-1])
        return values.gather(-2, index[..., None].expand(shape))


class _Product(torch.autograd.Function):
    """mask [K, r, C] times differences [c, K, N], read from the buffer in place of a copy.

    Of the mask only the first c columns count.  The buffer holds the same numbers as `groups`; rows
    that were written are never written again.
    """

    @staticmethod
    def forward(ctx: Any, mask: Tensor, buffer: Tensor, *groups: Tensor) -> Tensor:
        ctx.columns, mask = mask.shape[2], mask[..., : len(buffer)]
        ctx.mask, ctx.buffer, ctx.shapes = mask, buffer, [group.shape for group in groups]
        return torch.bmm(mask, buffer.transpose(0, 1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        for_mask = None
        if ctx.needs_input_grad[0]:
            for_mask = torch.bmm(gradient, ctx.buffer.permute(1, 2, 0))
            for_mask = torch.nn.functional.pad(for_mask, (0, ctx.columns - len(ctx.buffer)))
        if not any(ctx.needs_input_grad[2:]):
            return for_mask, None, *(None for _ in ctx.shapes)
        for_differences = torch.bmm(ctx.mask.mT, gradient).transpose(0, 1)  # [c, K, N]
        parts = for_differences.split([shape[0] for shape in ctx.shapes])
        shaped = (part.reshape(shape) for part, shape in zip(parts, ctx.shapes, strict=True))
        return for_mask, None, *shaped
