"""Any prompts of an objective, of edges or of units, with what is prepared of them: a minibatch.

Shapes: prompts B, scored positions P, vocabulary V, positions S; rows of tensors b, numbers of
each D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.engine.masked import Ablated
from circuits.objective import Runs
from circuits.prompts import Prompts


@dataclass(frozen=True)
class Minibatch:
    """Some prompts with the model's logits and the ablated values on them."""

    prompts: Prompts
    ablated: Any  # as `Ablation.values` gives them
    logits: Float[Tensor, "B P V"]


@torch.no_grad()
def minibatch(batches: Runs, rows: Int[Tensor, "B"]) -> Minibatch:
    """Returns the prompts at `rows` of all of them, in ascending order; a row may be there twice.

    What is prepared is copied, and the rest, where memory did not hold it, made anew.
    """
    engine, ablation = batches.engine, batches.ablation
    rows = rows.sort().values
    prompts = batches.whole.select(rows).to(engine.device)
    width, scored = prompts.clean.shape[1], prompts.positions.shape[1]
    values, logits, start = [], [], 0
    for batch in batches.kept:
        own = rows[(rows >= start) & (rows < start + len(batch.prompts))] - start
        start += len(batch.prompts)
        if len(own):
            own = own.to(engine.device)
            logits.append(_at(batch.clean.logits, own, scored))
            values.append(_parts(batch.ablated, own, width) if ablation.per_prompt else None)
    if len(rest := rows[rows >= start]):
        others = batches.whole.select(rest).to(engine.device)
        own = torch.arange(len(rest), device=engine.device)
        logits.append(_at(engine.logits(others), own, scored))
        made = ablation.values(engine, others) if ablation.per_prompt else None
        values.append(None if made is None else _parts(made, own, width))
    joined = logits[0] if len(logits) == 1 else torch.cat(logits)
    if not ablation.per_prompt:
        return Minibatch(prompts, ablation.values(engine, prompts), joined)
    return Minibatch(prompts, _joined([part for part in values if part is not None]), joined)


def _parts(ablated: Ablated | Tensor, rows: Int[Tensor, "b"], width: int) -> list[Tensor]:
    if isinstance(ablated, Tensor):
        return [_at(ablated, rows, width)]
    parts = [ablated.writers, ablated.base]
    parts += [] if ablated.unread is None else [ablated.unread]
    return [_at(part, rows, width) for part in parts]


def _joined(values: list[list[Tensor]]) -> Ablated | Tensor:
    columns = zip(*values, strict=True)
    parts = [own[0] if len(own) == 1 else torch.cat(own, -3) for own in columns]
    if len(parts) == 1:
        return parts[0]
    writers, base, *unread = parts
    return Ablated(writers, base, unread[0] if unread else None)


def _at(values: Float[Tensor, "*k B S D"], rows: Int[Tensor, "b"], width: int) -> Tensor:
    """Some rows, padded or cut to a width."""
    chosen = values.index_select(-3, rows)[..., :width, :]
    short = width - chosen.shape[-2]
    return torch.nn.functional.pad(chosen, (0, 0, 0, short)) if short > 0 else chosen
