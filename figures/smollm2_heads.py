"""The roles of SmolLM2's heads in docs/smollm2.md: where each looks, and what it does.

Run: python figures/smollm2_heads.py          (ten minutes on two cores)

    name mover        from END to IO, and logit difference through its edge to the logits
    negative mover    the same, against it
    S-inhibition      from END to S2, and logit difference through the queries of the name movers
    duplicate token   from S2 to S1, and logit difference in all
    induction         from S2 to S1 + 1, the same
    previous token    from each token to the one before, the same

IO and S are the two names, S1 and S2 where S stands, END the last token (Wang et al. 2022, arXiv
2211.00593).  What something does is the model's logit difference less that when it carries the
corrupt prompt's value.  A head has a role where both attention and effect pass a bound.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from smollm2 import OUT, Subject
from torch import Tensor

from circuits.engine import Engine
from circuits.model.attention import attention_scores
from circuits.names import head_name, parse_node, reader_name
from circuits.objective import Objective
from circuits.prompts import Prompts
from mad.benchmark.tables import markdown_table

ATTENTION, EFFECT = 0.3, 0.05  # bounds: mean attention, and effect in logits
PLACES = {
    "name mover": "END to IO",
    "S-inhibition": "END to S2",
    "duplicate token": "S2 to S1",
    "induction": "S2 to S1 + 1",
    "previous token": "to the token before",
}
AT_ONCE = 16  # prompts whose attention is held at once


def attention(engine: Engine, prompts: Prompts) -> dict[str, Float[Tensor, "L H"]]:
    """How much each head attends from one place of `PLACES` to the other, on average."""
    parts = [_attention(engine, part) for part in prompts.batches(AT_ONCE)]
    return {role: torch.cat([part[role] for part in parts]).mean(0) for role in PLACES}


def _attention(engine: Engine, prompts: Prompts) -> dict[str, Float[Tensor, "B L H"]]:
    assert prompts.answers is not None and prompts.wrong_answers is not None
    tokens, rows = prompts.clean, torch.arange(len(prompts))
    end, io = prompts.positions[:, 0], _places(tokens == prompts.answers[:, 0])[:, 0]
    s1, s2 = _places(tokens == prompts.wrong_answers[:, 0]).T
    everywhere = torch.arange(tokens.shape[1]).expand_as(tokens)
    patterns = torch.stack(
        [
            attention_scores(
                engine.architecture, block.attention, q, k, prompts.key_mask, at=everywhere
            ).softmax(-1)
            for block, (q, k) in zip(
                engine.architecture.blocks, engine.clean(prompts, sides=True).sides, strict=True
            )
        ],
        2,
    )  # heads B L S S
    patterns = patterns.permute(1, 2, 0, 3, 4)
    before = patterns.diagonal(-1, -2, -1) * prompts.key_mask[:, None, None, 1:]
    between = {"name mover": (end, io), "S-inhibition": (end, s2)}
    between |= {"duplicate token": (s2, s1), "induction": (s2, s1 + 1)}
    found = {role: patterns[rows, :, :, one, other] for role, (one, other) in between.items()}
    return found | {"previous token": before.sum(-1) / (prompts.lengths - 1)[:, None, None]}


def _places(found: Bool[Tensor, "B S"]) -> Tensor:
    """Where each row is True, as often as all rows are."""
    return found.nonzero()[:, 1].view(len(found), -1)


class Effects:
    """What parts of the model do for a metric: it without them, less it, per prompt."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.graph = objective, objective.engine.graph
        self.model = objective.full()

    def without(self, removed: Sequence[Bool[Tensor, "R W"]], layer: int) -> Float[Tensor, "K N"]:
        """The effect of each set of edges, none of which is read before a layer."""
        masks = torch.stack([self.graph.exists & ~edges for edges in removed])
        return self.model - self.objective.measure(masks, first_layer=layer)

    def edges(self, nodes: Sequence[str], readers: Sequence[str]) -> Bool[Tensor, "R W"]:
        """The edges from some nodes to some readers; to all of them where none is given."""
        removed = torch.zeros_like(self.graph.exists)
        rows = [self.graph.reader_index[reader] for reader in readers or self.graph.readers]
        columns = [self.graph.writer_index[node] for node in nodes]
        removed[torch.tensor(rows)[:, None], torch.tensor(columns)] = True
        return removed & self.graph.exists

    def of_each(self, heads: Sequence[str], readers: Sequence[str] = ()) -> dict[str, Tensor]:
        """The effect of each head, in all or through its edges to some readers."""
        earliest = min((self._layer(reader) for reader in readers), default=None)
        found = {}
        for layer, group in groupby(sorted(heads, key=self._layer), key=self._layer):
            own = list(group)
            first = layer if earliest is None else earliest
            removed = [self.edges([head], readers) for head in own]
            found |= dict(zip(own, self.without(removed, first), strict=True))
        return found

    def _layer(self, name: str) -> int:
        node = name.partition("<")[0]
        return self.graph.n_layers if node == "logits" else parse_node(node).layer
