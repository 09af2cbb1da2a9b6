"""A function's value with the gradient of another function: its surrogate.

What a backward rule changes is written as such a surrogate, in plain torch with `detach`, while the
value stays that of the model to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def with_gradient_of(
    surrogate: Callable[..., Tensor], value: Callable[..., Tensor], *inputs: Tensor
) -> Tensor:
    """Returns `value(*inputs)`, whose gradient in the inputs is that of `surrogate(*inputs)`.

    The surrogate runs in the backward pass only.  Of an input that it does not use the gradient is
    0.  Not twice differentiable.

    >>> x = torch.tensor([2.0], requires_grad=True)
    >>> y = with_gradient_of(lambda x: 5 * x, torch.exp, x)
    >>> bool(y == x.exp()), torch.autograd.grad(y, x)[0].item()
    (True, 5.0)
    """
    return _WithGradientOf.apply(surrogate, value, *inputs)  # type: ignore[return-value]


class _WithGradientOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, surrogate: Callable, value: Callable, *inputs: Tensor) -> Tensor:
        ctx.surrogate = surrogate
        ctx.save_for_backward(*inputs)
        return value(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            inputs = [one.detach().requires_grad_() for one in ctx.saved_tensors]
            made = ctx.surrogate(*inputs)
            found = torch.autograd.grad(made, inputs, gradients[0], materialize_grads=True)
        return None, None, *found
