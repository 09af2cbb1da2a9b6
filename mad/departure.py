"""How far the parts of a model depart from what its circuit makes of the same input.

The model M is run once, and the circuit C (every edge off it carrying its ablated value) beside it.
With `one_step` each node of the circuit is given the model's own values along its kept edges, so
that a departure belongs to the node where it arises; otherwise departures are handed on.  Three
kinds, each at the scored positions:

    output    KL(M || C) of the output distributions, nats
    routing   per head: d(M) - d(C), where d is the log-odds of the key that M attends to most,
                  d = s_j - logsumexp over i != j of s_i        s = scores before the softmax
    nodes     per node: |a(M) - a(C)|^2 of what it writes

Log-odds do not saturate: when a second mechanism points a head where the first one points it
anyway, the pattern and the output stay as they were, and the log-odds do not.

The three measures are this library's own; the comparison of a model with its circuit is that of
Conmy et al. 2023 (arXiv 2304.14997).

Shapes: prompts B, scored positions P, keys S, living heads h, living nodes n (heads and MLPs),
    writers W, readers R.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.ablation import Ablation
from circuits.engine import Engine
from circuits.engine.masked import Seen
from circuits.engine.memory import footprint, most_prompts, parse_memory
from circuits.metrics import METRICS
from circuits.model.attention import attention_scores
from circuits.prompts import Prompts


@dataclass(frozen=True)
class Departure:
    """What departs where, averaged over the scored positions of each prompt; on the CPU."""

    output: Float[Tensor, "B"]
    routing: Float[Tensor, "B h"]
    nodes: Float[Tensor, "B n"]
    head_names: tuple[str, ...]
    node_names: tuple[str, ...]


@torch.no_grad()
def departure(
    engine: Engine,
    mask: Bool[Tensor, "R W *S"],
    ablation: Ablation,
    prompts: Prompts,
    *,
    one_step: bool = True,
    memory: str = "2GB",
) -> Departure:
    """Returns how far a model departs from a circuit on each prompt.

    Raises:
        ValueError: see `Engine.masked`; the ablation has no value at a prompt's length.
        TooLittleMemory: not even one prompt fits.
    """
    size = footprint(engine, prompts)
    shared = size.shared(ablation.per_prompt) + size.mask
    each = size.observed + (size.prepared(True) if ablation.per_prompt else 0)
    batches = prompts.batches(most_prompts(prompts, each, parse_memory(memory), shared))
    parts = [
        _departure(engine, mask, ablation, batch.to(engine.device), one_step) for batch in batches
    ]
    return Departure(
        torch.cat([part.output for part in parts]),
        torch.cat([part.routing for part in parts]),
        torch.cat([part.nodes for part in parts]),
        parts[0].head_names,
        parts[0].node_names,
    )


def _departure(
    engine: Engine, mask: Tensor, ablation: Ablation, prompts: Prompts, one_step: bool
) -> Departure:
    graph, positions = engine.graph, prompts.positions
    clean = engine.clean(prompts, sides=True)
    at = positions.clamp(min=0)
    routing: list[tuple[str, Tensor]] = []
    nodes: list[tuple[str, Tensor]] = []

    def average(values: Float[Tensor, "w B P"]) -> list[Tensor]:
        return list(over_positions(values.float(), prompts).cpu())

    def compare(seen: Seen) -> None:
        names = [graph.writers[writer] for writer in seen.writers]
        difference = _rows(seen.written[:, 0], at) - _rows(clean.writers[seen.writers], at)
        nodes.extend(zip(names, average(difference.float().square().sum(-1)), strict=True))
        if seen.queries is None or seen.keys is None:
            return
        attention = engine.architecture.blocks[seen.layer].attention
        heads = [writer - graph.first_writer(seen.layer) for writer in seen.writers]
        key_heads = [head // graph.kv_group for head in heads]
        queries, keys = clean.sides[seen.layer]
        ours = attention_scores(
            engine.architecture,
            attention,
            queries[heads],
            keys[key_heads],
            prompts.key_mask,
            list(range(len(heads))),
            at=at,
        )
        theirs = attention_scores(
            engine.architecture,
            attention,
            seen.queries,
            seen.keys,
            prompts.key_mask,
            seen.kv_of_head,
            at=at,
        )
        key = ours.argmax(-1)
        routing.extend(
            zip(names, average(log_odds(ours, key) - log_odds(theirs, key)), strict=True)
        )

    logits = engine.masked(
        prompts,
        mask,
        ablation.values(engine, prompts),
        upstream=clean.writers if one_step else None,
        observe=compare,
    )
    return Departure(
        METRICS["kl"](logits, prompts, clean.logits).cpu().float(),
        _columns(routing, len(prompts)),
        _columns(nodes, len(prompts)),
        tuple(name for name, _ in routing),
        tuple(name for name, _ in nodes),
    )


def _rows(values: Float[Tensor, "w B S D"], at: Int[Tensor, "B P"]) -> Float[Tensor, "w B P D"]:
    return values[:, torch.arange(len(at), device=at.device)[:, None], at]


def _columns(named: list[tuple[str, Tensor]], n_prompts: int) -> Float[Tensor, "B w"]:
    return torch.stack([values for _, values in named], 1) if named else torch.zeros(n_prompts, 0)


def over_positions(values: Float[Tensor, "*h B P"], prompts: Prompts) -> Float[Tensor, "*h B"]:
    """The mean over each prompt's scored positions."""
    scored = (prompts.positions >= 0).to(values.dtype)
    return (values * scored).sum(-1) / scored.sum(-1)


def log_odds(scores: Float[Tensor, "h B P S"], key: Int[Tensor, "h B P"]) -> Float[Tensor, "h B P"]:
    """Of one key against the others; 0 where there is no other."""
    scores = scores.float()
    others = scores.scatter(-1, key[..., None], float("-inf")).logsumexp(-1)
    return torch.where(others.isfinite(), scores.gather(-1, key[..., None])[..., 0] - others, 0.0)
