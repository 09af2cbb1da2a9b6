"""Metrics of a run, always one number per prompt, and which way is better.

Each metric looks at the scored positions of a prompt and averages over them.  With l the logits of
the run, p = softmax(l), p* the full model's distribution, A the answers and W the wrong answers at
a position:

    kl               sum p* (log p* - log p)                   nats, lower is better
    logit_diff       mean l[A] - mean l[W]                     higher is better
    prob_diff        sum p[A] - sum p[W]                       higher is better
    cross_entropy    - log sum p[A]                            nats, lower is better
    accuracy         1 if argmax l is in A, else 0             higher is better

Scores and faithfulness use `Metric.oriented`, for which higher is always better.

Shapes: prompts B, scored positions P, vocabulary V; `*K` any leading axes (candidate masks).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.prompts import Prompts
from circuits.prompts.errors import InputError

PerPosition = Callable[[Tensor, Prompts, Tensor | None], Tensor]


@dataclass(frozen=True)
class Metric:
    """A per-prompt metric: logits [*K, B, P, V] give [*K, B] in float32 or wider."""

    name: str
    per_position: PerPosition  # (log-ready logits, prompts, the model's logits) -> [*K, B, P]
    higher_is_better: bool
    needs_answers: bool = False
    needs_wrong_answers: bool = False
    needs_reference: bool = False  # the full model's logits
    flat_at_model: bool = False  # its gradient vanishes where the run equals the model
    differentiable: bool = True

    def __call__(
        self,
        logits: Float[Tensor, "*K B P V"],
        prompts: Prompts,
        reference: Float[Tensor, "B P V"] | None = None,
    ) -> Float[Tensor, "*K B"]:
        """Mean over the scored positions of each prompt.

        Raises:
            ValueError: the prompts lack what the metric needs.
            InputError: logits are not finite.
        """
        self.require(prompts)
        if self.needs_reference and reference is None:
            raise ValueError(
                f"metric {self.name} compares with the full model, whose logits were not given"
            )
        if not torch.isfinite(logits).all():
            raise InputError(
                "the logits are not finite (NaN or infinity); check the weights and the dtype"
            )
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return prompts.mean_over_scored(self.per_position(logits, prompts, reference))

    def oriented(
        self,
        logits: Float[Tensor, "*K B P V"],
        prompts: Prompts,
        reference: Float[Tensor, "B P V"] | None = None,
    ) -> Float[Tensor, "*K B"]:
        """The metric, negated where lower is better."""
        value = self(logits, prompts, reference)
        return value if self.higher_is_better else -value

    def lacks(self, prompts: Prompts) -> list[str]:
        """What the metric needs and the prompts do not have."""
        needed = {"answers": self.needs_answers, "wrong_answers": self.needs_wrong_answers}
        return [name for name, need in needed.items() if need and getattr(prompts, name) is None]

    def require(self, prompts: Prompts) -> None:
        """Raises ValueError where the prompts lack answers that the metric needs."""
        if missing := self.lacks(prompts):
            raise ValueError(
                f"metric {self.name} needs {' and '.join(missing)} in the prompts; add them, or "
                "use metric=kl, which needs none"
            )


def _pick(
    values: Float[Tensor, "*K B P V"], tokens: Int[Tensor, "B P A"], absent: float
) -> Float[Tensor, "*K B P A"]:
    """Values at token ids, with `absent` where the id is -1."""
    index = tokens.clamp(min=0).expand(*values.shape[:-1], tokens.shape[-1])
    return values.gather(-1, index).masked_fill(tokens < 0, absent)


def _mean_logit(logits: Tensor, tokens: Tensor) -> Tensor:
    return _pick(logits, tokens, 0.0).sum(-1) / (tokens >= 0).sum(-1).clamp(min=1)


def _kl(logits: Tensor, prompts: Prompts, reference: Tensor | None) -> Tensor:
    assert reference is not None
    model = reference.to(logits.dtype).log_softmax(-1)
    return (model.exp() * (model - logits.log_softmax(-1))).sum(-1)


def _logit_diff(logits: Tensor, prompts: Prompts, reference: Tensor | None) -> Tensor:
    assert prompts.answers is not None and prompts.wrong_answers is not None
    return _mean_logit(logits, prompts.answers) - _mean_logit(logits, prompts.wrong_answers)


def _prob_diff(logits: Tensor, prompts: Prompts, reference: Tensor | None) -> Tensor:
    assert prompts.answers is not None and prompts.wrong_answers is not None
    probabilities = logits.softmax(-1)
    right = _pick(probabilities, prompts.answers, 0.0).sum(-1)
    return right - _pick(probabilities, prompts.wrong_answers, 0.0).sum(-1)


def _cross_entropy(logits: Tensor, prompts: Prompts, reference: Tensor | None) -> Tensor:
    assert prompts.answers is not None
    chosen = _pick(logits.log_softmax(-1), prompts.answers, float("-inf"))
    absent = (prompts.answers < 0).all(-1)  # positions that are not scored
    return -torch.where(absent[..., None], torch.zeros_like(chosen), chosen).logsumexp(-1)


def _accuracy(logits: Tensor, prompts: Prompts, reference: Tensor | None) -> Tensor:
    assert prompts.answers is not None
    return (logits.argmax(-1, keepdim=True) == prompts.answers).any(-1).to(logits.dtype)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("kl", _kl, False, needs_reference=True, flat_at_model=True),
        Metric("logit_diff", _logit_diff, True, needs_answers=True, needs_wrong_answers=True),
        Metric("prob_diff", _prob_diff, True, needs_answers=True, needs_wrong_answers=True),
        Metric("cross_entropy", _cross_entropy, False, needs_answers=True),
        Metric("accuracy", _accuracy, True, needs_answers=True, differentiable=False),
    )
}


def metrics_for(prompts: Prompts) -> list[Metric]:
    """Returns all metrics that the prompts allow."""
    return [metric for metric in METRICS.values() if not metric.lacks(prompts)]


def metric_named(name: str) -> Metric:
    """Returns a metric by name; raises ValueError where there is none."""
    if name not in METRICS:
        raise ValueError(f"metric={name!r}, but the metrics are {', '.join(METRICS)}")
    return METRICS[name]
