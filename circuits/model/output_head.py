"""A linear head in place of the language model's, such as the sensors of a measurement model.

    logits[p] = W[p] norm(residual at position p) + b[p]

W is [outputs, D], the same at all scored positions, or [places, outputs, D], one probe for each
sensor: row p is read at the p-th scored position.  A head with a single output is a yes-or-no
probe: its logit stands against 0, so that output 1 means yes, output 0 no, and softmax is the
probe's sigmoid.  Answers are numbers of outputs.

Shapes: positions P, d_model D, outputs O.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn


class OutputHead(nn.Module):
    """A linear head, frozen; ValueError where weight and bias do not fit each other."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        if bias is None:
            bias = weight.new_zeros(weight.shape[:-1])
        if weight.ndim not in (2, 3) or bias.shape != weight.shape[:-1]:
            raise ValueError(
                f"a head of weight {tuple(weight.shape)} and bias {tuple(bias.shape)}, but they "
                "are [outputs, d_model] and [outputs], or [places, outputs, d_model] and [places, "
                "outputs]"
            )
        if weight.ndim == 2:
            weight, bias = weight[None], bias[None]
        if weight.shape[1] == 1:  # against a logit of 0
            weight, bias = (torch.cat((torch.zeros_like(part), part), 1) for part in (weight, bias))
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        self.bias = nn.Parameter(bias.clone(), requires_grad=False)

    @property
    def places(self) -> int:
        return self.weight.shape[0]

    @property
    def outputs(self) -> int:
        return self.weight.shape[1]

    def forward(self, normed: Float[Tensor, "*batch P D"]) -> Float[Tensor, "*batch P O"]:
        """Logits at each position; ValueError where there are more than the head has places."""
        if self.places == 1:
            return nn.functional.linear(normed, self.weight[0], self.bias[0])
        n = normed.shape[-2]
        if n > self.places:
            raise ValueError(
                f"the head has {self.places} places, but {n} positions are read; name "
                f"{self.places} `positions` in each prompt"
            )
        return torch.einsum("...pd,pod->...po", normed, self.weight[:n]) + self.bias[:n]


def load_output_head(path: str | Path) -> OutputHead:
    """Reads a head from a safetensors file that holds `weight` and perhaps `bias`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no head.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no head at {path}: give a safetensors file that holds weight and bias"
        )
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
        return OutputHead(tensors["weight"], tensors.get("bias"))
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path} holds no head: {str(error).splitlines()[0]}; it needs weight [outputs, "
            "d_model]"
        ) from error
