"""How far the parts of a model depart from what its circuit makes of the same input.

The model M is run once, and the circuit C (every edge off it carrying its ablated value) beside it.
At the scored positions, of each living node:

    routing   per head: d(M) - d(C), where d is the log-odds of the key that M attends to most,
                  d = s_j - logsumexp over i != j of s_i        s = scores before the softmax
    nodes     |a(M) - a(C)|^2 of what it writes

Log-odds do not saturate: when a second mechanism points a head where the first one points it
anyway, the pattern and the output stay as they were, and the log-odds do not.

Both measures are this library's own; the comparison of a model with its circuit is that of
Conmy et al. 2023 (arXiv 2304.14997).

Shapes: prompts B, positions S, scored positions P, keys K, living heads h, living nodes n (heads
and MLPs), nodes of one block w, writers W, readers R.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.ablation import Ablation
from circuits.batches import over_batches
from circuits.engine import Clean, Engine
from circuits.engine.masked import Seen
from circuits.engine.memory import Footprint
from circuits.model.attention import attention_scores
from circuits.prompts import Prompts


@dataclass(frozen=True)
class Departure:
    """What departs where, averaged over the scored positions of each prompt; on the CPU."""

    routing: Float[Tensor, "B h"]
    nodes: Float[Tensor, "B n"]
    head_names: tuple[str, ...]
    node_names: tuple[str, ...]


def departure(
    engine: Engine,
    mask: Bool[Tensor, "R W *S"],
    ablation: Ablation,
    prompts: Prompts,
    *,
    memory: str = "2GB",
) -> Departure:
    """Returns how far a model departs from a circuit on each prompt.

    Raises:
        InputError: the ablation has no value at a prompt's length; see `Engine.masked`.
        TooLittleMemory: not even one prompt fits.
    """

    def each(size: Footprint) -> int:
        return size.observed + (size.prepared(True) if ablation.per_prompt else 0)

    return over_batches(
        lambda batch: _departure(engine, mask, ablation, batch),
        engine,
        prompts,
        each,
        memory=memory,
        shared=ablation.shared_bytes,
    )


@torch.no_grad()
def _departure(engine: Engine, mask: Tensor, ablation: Ablation, prompts: Prompts) -> Departure:
    comparison = _Comparison(engine, prompts, engine.clean(prompts, sides=True))
    engine.masked(prompts, mask, ablation.values(engine, prompts), observe=comparison)
    return comparison.result()


@dataclass
class _Comparison:
    """A clean run, and how far the nodes of another run depart from it as they are seen."""

    engine: Engine
    prompts: Prompts
    clean: Clean
    routing: dict[str, Tensor] = field(default_factory=dict)  # of each head seen so far
    nodes: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, seen: Seen) -> None:
        """Takes what nodes do in the other run."""
        names = [self.engine.graph.writers[writer] for writer in seen.writers]
        ours = self.prompts.at_scored(self.clean.writers[seen.writers])
        gap = (self.prompts.at_scored(seen.written[:, 0]) - ours).float()
        self.nodes.update(zip(names, self._average(gap.square().sum(-1)), strict=True))
        if seen.queries is not None:
            self.routing.update(zip(names, self._average(self._routed(seen)), strict=True))

    def _routed(self, seen: Seen) -> Float[Tensor, "w B P"]:
        """How far the log-odds of the model's favourite keys are from those of heads as seen."""
        graph, architecture = self.engine.graph, self.engine.architecture
        assert seen.queries is not None and seen.keys is not None
        attention = architecture.blocks[seen.layer].attention
        heads = [writer - graph.first_writer(seen.layer) for writer in seen.writers]
        queries, keys = self.clean.sides[seen.layer]
        sides = (
            (
                queries[heads],
                keys[[head // graph.kv_group for head in heads]],
                [*range(len(heads))],
            ),
            (seen.queries, seen.keys, seen.kv_of_head),
        )
        at = self.prompts.positions.clamp(min=0)
        key_mask = self.prompts.key_mask
        ours, theirs = (
            attention_scores(architecture, attention, q, k, key_mask, key_of_head, at=at)
            for q, k, key_of_head in sides
        )
        favourite = ours.argmax(-1)
        return log_odds(ours, favourite) - log_odds(theirs, favourite)

    def _average(self, values: Float[Tensor, "w B P"]) -> Float[Tensor, "w B"]:
        return self.prompts.mean_over_scored(values.float()).cpu()

    def result(self) -> Departure:
        """All departures."""
        routing, nodes = (self._columns(named) for named in (self.routing, self.nodes))
        return Departure(routing, nodes, tuple(self.routing), tuple(self.nodes))

    def _columns(self, named: dict[str, Tensor]) -> Float[Tensor, "B w"]:
        columns = list(named.values())
        return torch.stack(columns, 1) if columns else torch.zeros(len(self.prompts), 0)


def log_odds(scores: Float[Tensor, "h B P K"], key: Int[Tensor, "h B P"]) -> Float[Tensor, "h B P"]:
    """Of one key against the others; 0 where there is no other."""
    scores = scores.float()
    others = scores.scatter(-1, key[..., None], float("-inf")).logsumexp(-1)
    return torch.where(others.isfinite(), scores.gather(-1, key[..., None])[..., 0] - others, 0.0)
