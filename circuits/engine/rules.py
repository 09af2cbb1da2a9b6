"""Rules that change what a backward pass takes the model for; values stay the model's to the bit.

    rule       norms           activations   gated products   attention
    plain      as they are     as they are   as they are      as it is
    relp       constant scale  constant      halved           constant pattern
    relp_qk    constant scale  constant      halved           as it is
    gim        constant scale  as they are   halved           softmax at temperature 2, products
                                                              halved

Constant scale: 1 / rms(x), or 1 / std(x), counts as a number that does not depend on x.  Constant
activation: f(x) counts as x times the number f(x) / x (0 where x is 0).  Halved: both factors of a
product get half of their gradient.  A constant pattern gives queries and keys no gradient at all,
so that under `relp` edges to them score 0 where a method does not recompute the pattern itself.

RelP (Rezaei Jafari et al. 2025, arXiv 2508.21258, table 1) names these rules LN, identity, half and
AH; `relp_qk` leaves out the last, as the default of the authors' own code does.  GIM (Edin et al.
2025, arXiv 2505.17630): with the pattern softmax(s) of scores s its gradient is that of softmax at
s / 2, diag(p) - p p' without the factor 1/2; values get half of their gradient, queries and keys,
behind two products, a quarter.  Everything that is not in the table has its own gradient; what RelP
has no rule for, tanh as a soft-cap, is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from circuits.model.architecture import (
    MLP,
    Activation,
    Architecture,
    Attention,
    Block,
    Linear,
    Norm,
)
from circuits.model.surrogate import with_gradient_of

TEMPERATURE = 2.0  # of GIM's softmax


@dataclass(frozen=True)
class Rule:
    """What gradients take the parts of a model for; norms have a constant scale."""

    activation: Callable[[Activation], Activation] | None = None
    pattern: Activation | None = None  # the softmax of masked scores; None: with its own gradient
    halves_attention: bool = False  # its two products, as the gated one always is
    caps: bool = False  # whether soft-caps have their own gradient, or no rule


def _constant_ratio(activation: Activation) -> Activation:
    def linear(x: Tensor) -> Tensor:
        x_, made = x.detach(), activation(x.detach())
        return x * torch.where(x_ == 0, 0, made / x_)

    return partial(with_gradient_of, linear, activation)


def _constant_pattern(scores: Tensor) -> Tensor:
    return scores.softmax(-1).detach()


def _softer_pattern(scores: Tensor) -> Tensor:
    def softer(scores: Tensor) -> Tensor:
        return TEMPERATURE * (scores / TEMPERATURE).softmax(-1)  # so that the factor 1/2 goes

    return with_gradient_of(softer, lambda scores: scores.softmax(-1), scores)


def _halved(product: Tensor) -> Tensor:
    return with_gradient_of(lambda x: x / 2, lambda x: x.view_as(x), product)


def _halved_product(left: Tensor, right: Tensor) -> Tensor:
    return _halved(left * right)


RULES: dict[str, Rule | None] = {
    "plain": None,
    "relp": Rule(activation=_constant_ratio, pattern=_constant_pattern),
    "relp_qk": Rule(activation=_constant_ratio),
    "gim": Rule(pattern=_softer_pattern, halves_attention=True, caps=True),
}


def under(rule: str, architecture: Architecture) -> Architecture:
    """Returns the same model with the gradients of a rule.

    Raises:
        ValueError: there is no such rule, or the model has something that the rule does not define.
    """
    check_rule(rule)
    chosen = RULES[rule]
    if chosen is None:
        return architecture
    _refuse_caps(rule, chosen, architecture)
    return replace(
        architecture,
        blocks=tuple(_block(chosen, block) for block in architecture.blocks),
        final_norm=_norm(architecture.final_norm),
    )


def check_rule(rule: str) -> None:
    """Raises ValueError where there is no such rule."""
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}, but the rules are {', '.join(RULES)}")


def _refuse_caps(name: str, rule: Rule, architecture: Architecture) -> None:
    differentiated = rule.pattern is not _constant_pattern
    of_scores = [block.attention.soft_cap for block in architecture.blocks if differentiated]
    capped = {"logits": architecture.logit_cap, "attention scores": next(iter(of_scores), None)}
    for what, cap in capped.items():
        if cap is not None and not rule.caps:
            raise ValueError(
                f"rule={name} does not define a gradient of the soft-cap of {what} ({cap:g} * "
                f"tanh); use rule=plain or rule=gim, which leave that as it is"
            )


def _block(rule: Rule, block: Block) -> Block:
    return Block(
        norm1=_norm(block.norm1),
        attention=_attention(rule, block.attention),
        norm2=block.norm2 and _norm(block.norm2),
        mlp=block.mlp and _mlp(rule, block.mlp),
        post_norm1=block.post_norm1 and _norm(block.post_norm1),
        post_norm2=block.post_norm2 and _norm(block.post_norm2),
    )


def _norm(norm: Norm) -> Norm:
    return replace(norm, constant_scale=True)


def _projection(projection: Linear) -> Linear:
    return replace(projection, norm=projection.norm and _norm(projection.norm))


def _attention(rule: Rule, attention: Attention) -> Attention:
    return replace(
        attention,
        q=_projection(attention.q),
        k=_projection(attention.k),
        q_norm=attention.q_norm and _norm(attention.q_norm),
        k_norm=attention.k_norm and _norm(attention.k_norm),
        pattern=rule.pattern,
        product=_halved if rule.halves_attention else None,
    )


def _mlp(rule: Rule, mlp: MLP) -> MLP:
    activation = mlp.activation if rule.activation is None else rule.activation(mlp.activation)
    inner_norm = mlp.inner_norm and _norm(mlp.inner_norm)
    return replace(mlp, activation=activation, product=_halved_product, inner_norm=inner_norm)
