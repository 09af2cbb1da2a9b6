"""The parts of a decoder, as the engine sees them: norms, projections, attention, MLPs, and how
they are put together.

Parts hold *modules*, not tensors: weights are read at each use, so that they stay live and
gradients reach them. Which parts a model has is said by its family (`circuits.model.families`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from circuits.graph import Graph
from circuits.model.output_head import OutputHead
from circuits.model.surrogate import with_gradient_of

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Norm:
    """A normalisation over the last axis: `layer`, `rms`, or `none`."""

    kind: Literal["layer", "rms", "none"]
    eps: float = 0.0
    module: nn.Module | None = None  # holds the gain and bias; None: there are none
    offset: float = 0.0  # added to the stored gain: Gemma stores it less 1
    constant_scale: bool = False  # to gradients, what x is divided by does not depend on x

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        if self.constant_scale and self.kind != "none":
            return with_gradient_of(self._with_constant_scale, self._normed, x)
        return self._normed(x)

    def _with_constant_scale(self, x: Float[Tensor, "*batch d_model"]) -> Tensor:
        """The same, up to rounding and a constant, but linear in x to gradients."""
        x = x - x.mean(-1, keepdim=True) if self.kind == "layer" else x
        weight = getattr(self.module, "weight", None)
        scaled = x * self.scale(x).detach()
        return scaled if weight is None else scaled * (weight + self.offset)

    def _normed(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        if self.kind == "none":
            return x
        weight = getattr(self.module, "weight", None)
        if self.kind == "layer":
            bias = getattr(self.module, "bias", None)
            return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)
        if self.offset == 0.0 or weight is None:
            return F.rms_norm(x, x.shape[-1:], weight, self.eps)
        wide = _at_least_float32(x)  # as Gemma: a gain near 1 loses its digits in bfloat16
        gain = weight.to(wide.dtype) + self.offset
        return F.rms_norm(wide, x.shape[-1:], gain, self.eps).to(x.dtype)

    def scale(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        """1 / rms(x), by which an RMS norm multiplies, before or after the projection behind it."""
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        return (length.square() / x.shape[-1] + self.eps).rsqrt().to(x.dtype)

    def deferred(self, x: Float[Tensor, "*batch d_model"]) -> tuple[Tensor, Norm | None]:
        """What a projection behind this norm is given, and the norm that it still has to apply.

        An RMS norm is cheaper after the projection (`Linear.each`); in float16 what is not yet
        normed could overflow.
        """
        if self.kind == "rms" and x.dtype != torch.float16:
            return x, self
        return self(x), None

    @property
    def gain(self) -> Float[Tensor, "d_model"]:
        """What an RMS norm with parameters multiplies by, beside `scale`."""
        weight: Any = getattr(self.module, "weight", None)
        return weight + self.offset

    def gained(self, weight: Float[Tensor, "*h d_model E"]) -> Float[Tensor, "*h d_model E"]:
        """The weight of a projection that reads this RMS norm, with the norm's gain in it."""
        gain = getattr(self.module, "weight", None)
        return weight if gain is None else weight * (gain + self.offset)[:, None]

    @torch.no_grad()
    def pull_back(
        self, x: Float[Tensor, "*batch d_model"], gradients: Float[Tensor, "r *batch d_model"]
    ) -> Float[Tensor, "r *batch d_model"]:
        """Takes r gradients behind the norm to its input x, which they share.

        With y = g x / rms(x) and G = g gradient / rms, it is G - x (x . G) / (D rms^2) there, or G
        alone if the scale is constant.
        """
        if self.kind == "none":
            return gradients
        if self.kind == "rms":
            scale, gain = self.scale(x), getattr(self.module, "weight", None)
            factor = scale if gain is None else (gain + self.offset) * scale
            if self.constant_scale:
                return gradients * factor
            gradients, inputs = gradients * factor, x.expand_as(gradients)
            along = torch.linalg.vecdot(gradients, inputs).unsqueeze(-1)
            return gradients.addcmul_(inputs, along * scale.square() / x.shape[-1], value=-1)
        with torch.enable_grad():
            shared = x.detach().expand_as(gradients).requires_grad_()
            return torch.autograd.grad(self(shared), shared, gradients)[0]

    def factor(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What an RMS norm of x multiplies x by, and so each addend of x."""
        wide = _at_least_float32(x)
        factor = (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        if (weight := getattr(self.module, "weight", None)) is not None:
            factor = factor * (weight.to(wide.dtype) + self.offset)
        return factor.to(x.dtype).expand_as(x)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True)
class Linear:
    """A projection, with its weight as [out, in] however the module stores it.

    With a `norm` (RMS), what one input makes for all heads is normed together (OLMo 2).  A head
    reads an input of its own, so its numbers are scaled by what the whole layer makes of that.
    """

    module: nn.Module
    stored_in_out: bool = False  # GPT-2's Conv1D
    norm: Norm | None = None

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]

    @property
    def weight(self) -> Float[Tensor, "out in_"]:
        weight: Any = self.module.weight
        return weight.T if self.stored_in_out else weight

    @property
    def bias(self) -> Float[Tensor, "out"] | None:
        return getattr(self.module, "bias", None)

    def __call__(self, x: Float[Tensor, "*batch in_"]) -> Float[Tensor, "*batch out"]:
        made = F.linear(x, self.weight, self.bias)
        return made if self.norm is None else self.norm(made)

    def by_head(self, width: int) -> Float[Tensor, "heads in_ E"]:
        """The weight that makes each head's E numbers."""
        return self.weight.unflatten(0, (-1, width)).mT

    def each(
        self,
        inputs: Float[Tensor, "r N in_"],
        width: int,
        heads: list[int] | None = None,
        norm: Norm | None = None,
    ) -> Float[Tensor, "r N E"]:
        """What some heads (None: all of them, in order) make of their own inputs, row by row.

        `norm` is an RMS norm that inputs still have to pass: it multiplies rows, which is cheaper
        after the projection.
        """
        weight = self.by_head(width)
        bias = None if self.bias is None else self.bias.unflatten(0, (-1, width))[:, None]
        if heads is not None:
            weight, bias = weight[heads], None if bias is None else bias[heads]
        if norm is not None:
            made = torch.bmm(inputs, norm.gained(weight)) * norm.scale(inputs)
            made = made if bias is None else made + bias
        elif bias is None:
            made = torch.bmm(inputs, weight)
        else:
            made = torch.baddbmm(bias, inputs, weight)
        if self.norm is None:
            return made
        assert norm is None, "what is behind a norm of outputs is scaled once, by its own input"
        together = F.linear(inputs, self.weight, self.bias)
        gain = self.norm.gain.unflatten(0, (-1, width))[:, None]  # [heads, 1, E]
        return made * self.norm.scale(together) * (gain if heads is None else gain[heads])

    @torch.no_grad()
    def pull_back(
        self,
        gradients: Float[Tensor, "heads B S E"],
        inputs: Float[Tensor, "B S in_"] | None,
        out: Float[Tensor, "heads B S in_"],
    ) -> None:
        """Puts into `out` what gradients at each head's numbers are at that head's own input.

        `inputs` is that input, the same for all heads; only a norm of outputs asks for it.  With
        one, y = W x and G = gain gradient / rms(y), it is W_h' G_h - W' y (y_h . G_h) / (n
        rms(y)^2).
        """
        weight = self.by_head(gradients.shape[-1]).mT  # [heads, E, in]
        rows = out.view(len(out), -1, out.shape[-1])
        if self.norm is None:
            torch.bmm(gradients.flatten(1, 2), weight, out=rows)
            return
        assert inputs is not None
        together = F.linear(inputs, self.weight, self.bias)  # [B, S, heads E]
        scale = self.norm.scale(together)
        split = (-1, gradients.shape[-1])
        gain = self.norm.gain.unflatten(0, split)[:, None, None]
        gradients = gradients * gain * scale
        torch.bmm(gradients.flatten(1, 2), weight, out=rows)
        if self.norm.constant_scale:
            return
        own = together.unflatten(-1, split).movedim(-2, 0)
        along = torch.linalg.vecdot(gradients, own).unsqueeze(-1) * scale.square()
        out.addcmul_(along / together.shape[-1], together @ self.weight, value=-1)


@dataclass(frozen=True)
class Rotary:
    """Rotary positions: the model's own tables, and how pairs of coordinates are laid out."""

    # (positions, like) -> cos, sin, each [pos, width]
    tables: Callable[[int, Tensor], tuple[Tensor, Tensor]]
    pairs: Literal["halves", "adjacent"]


@dataclass(frozen=True)
class Attention:
    """Projections and constants of one attention layer."""

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    scale: float  # scores are q . k * scale
    soft_cap: float | None = None  # scores become cap * tanh(scores / cap)
    window: int | None = None  # how many positions a query sees, itself included; None: all
    q_norm: Norm | None = None  # of each head's queries, before they are rotated
    k_norm: Norm | None = None
    rotary: Rotary | None = None  # None: queries and keys do not tell positions
    # the softmax of scores, which are -inf where forbidden, and what is made of each product, both
    # with another gradient than their own; None: as they are
    pattern: Activation | None = None
    product: Activation | None = None


@dataclass(frozen=True)
class MLP:
    """`down(activation(up(x)))`, or `down(activation(gate(x)) * up(x))` when gated."""

    up: Linear
    down: Linear
    activation: Activation
    gate: Linear | None = None
    inner_norm: Norm | None = None  # SoLU's norm between activation and output
    product: Callable[[Tensor, Tensor], Tensor] = torch.mul  # of activation(gate(x)) and up(x)

    def neurons(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch F"]:
        """What `down` reads: F numbers."""
        hidden = self.activation((self.gate or self.up)(x))
        if self.gate is not None:
            hidden = self.product(hidden, self.up(x))
        return hidden if self.inner_norm is None else self.inner_norm(hidden)

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return self.down(self.neurons(x))


@dataclass(frozen=True)
class Block:
    """One layer: attention and, unless the model has none, an MLP.

    A post-norm (RMS, no bias) is applied to what attention, or the MLP, adds to the stream.
    """

    norm1: Norm
    attention: Attention
    norm2: Norm | None = None
    mlp: MLP | None = None
    post_norm1: Norm | None = None
    post_norm2: Norm | None = None

    def feed_forward(
        self, x: Float[Tensor, "*batch d_model"], edit: Activation | None = None
    ) -> Float[Tensor, "*batch d_model"]:
        """What the MLP writes, from its normed input; `edit` may change its neurons."""
        assert self.mlp is not None
        written = self.mlp(x) if edit is None else self.mlp.down(edit(self.mlp.neurons(x)))
        return written if self.post_norm2 is None else self.post_norm2(written)


@dataclass(frozen=True)
class Architecture:
    """Everything the engine needs to know of a model.

    `graph` gives its shape; the input is `token(tokens) + position(positions)`.
    """

    graph: Graph
    blocks: tuple[Block, ...]
    token: nn.Module
    position: nn.Module | None
    final_norm: Norm
    unembed: Linear | OutputHead
    head_width: int
    context: int  # longest input, in tokens
    logit_cap: float | None = None

    @property
    def width(self) -> int:
        """Of the residual stream, d_model."""
        return int(self.token.weight.shape[1])  # type: ignore[union-attr, index]

    @property
    def outputs(self) -> int:
        """How many logits there are."""
        return self.unembed.outputs

    def sides(
        self, attention: Attention, normed: Float[Tensor, "*batch d_model"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [heads, *batch, E], keys and values [kv, *batch, E] from one input for all."""
        q, k, v = (
            projection(normed).unflatten(-1, (-1, self.head_width)).movedim(-2, 0)
            for projection in (attention.q, attention.k, attention.v)
        )
        return q, k, v

    def output_weight(self, attention: Attention) -> Float[Tensor, "heads E d_model"]:
        """By which each head writes what it has moved."""
        return attention.o.weight.T.unflatten(0, (-1, self.head_width))

    def logits(self, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch V"]:
        """What the model says where the residual stream ends as given."""
        return self.unembedded(self.final_norm(residual))

    def unembedded(self, normed: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch V"]:
        """`logits` from behind the final norm."""
        logits = self.unembed(normed)
        if self.logit_cap is None:
            return logits
        return self.logit_cap * torch.tanh(logits / self.logit_cap)
