"""What causal scrubbing exchanges: for each node of a hypothesis, on each way to the root, the
input that it is run on and the donor of all that the hypothesis is silent of.

Everything is drawn before anything is run, so that results depend on the seed alone, and not on how
much runs at once.  Modes: `abstraction.scrubbing`.

Shapes: prompts N, references M.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from abstraction.features import Classes
from abstraction.hypothesis import Hypothesis

MODES = ("tree", "joint", "pooled")


@dataclass(frozen=True)
class Visit:
    """One node on one way to the root: on which inputs it stands in for M references.

    `rows` says which rows of a child each of the M reads; None: row by row.
    """

    name: str
    references: Int[Tensor, " M"]
    donors: Int[Tensor, " M"]
    children: Mapping[str, Visit]
    rows: Mapping[str, Int[Tensor, " M"] | None] = field(default_factory=dict)

    def part(self, rows: slice | Int[Tensor, " m"]) -> Visit:
        """Some of the references, with what they read; of a pool all."""
        children, into = {}, {}
        for name, child in self.children.items():
            pool = self.rows.get(name)
            children[name] = child.part(rows) if pool is None else child
            into[name] = None if pool is None else pool[rows]
        return Visit(self.name, self.references[rows], self.donors[rows], children, into)


@dataclass(frozen=True)
class Draws:
    """How prompts are exchanged: which of them agree by node, and what is drawn of them."""

    hypothesis: Hypothesis
    agreeing: Mapping[str, Classes]  # by node
    any: Classes
    exclude_self: bool
    seed: int

    def visits(self, resamples: int, mode: str) -> Visit:
        """What stands in for each prompt, `resamples` times: references N x resamples."""
        generator = torch.Generator().manual_seed(self.seed)
        n_prompts = len(self.any.of_prompt)
        everything = torch.arange(n_prompts).repeat(resamples)
        if mode == "pooled":
            return self._pooled(everything, resamples, generator)
        shared = self._draw(self.any, everything, generator) if mode == "joint" else None
        return self._tree(self.hypothesis.root, everything, shared, generator)

    def _draw(self, among: Classes, references: Tensor, generator: torch.Generator) -> Tensor:
        return among.draw(references, generator, exclude_self=self.exclude_self)

    def _tree(
        self, name: str, references: Tensor, shared: Tensor | None, generator: torch.Generator
    ) -> Visit:
        donors = self._draw(self.any, references, generator) if shared is None else shared
        children = {}
        for child in self.hypothesis.nodes[name].reads or {}:
            new = self._draw(self.agreeing[child], references, generator)
            children[child] = self._tree(child, new, shared, generator)
        return Visit(name, references, donors, children)

    def _pooled(self, everything: Tensor, resamples: int, generator: torch.Generator) -> Visit:
        n_prompts, made = len(self.any.of_prompt), {}
        for name in self.hypothesis.order:
            donors = self._draw(self.any, everything, generator)
            children = {child: made[child] for child in self.hypothesis.nodes[name].reads or {}}
            rows = {}
            for child in children:
                new = self._draw(self.agreeing[child], everything, generator)
                copy = torch.randint(resamples, new.shape, generator=generator)
                rows[child] = new + copy * n_prompts
            made[name] = Visit(name, everything, donors, children, rows)
        return made[self.hypothesis.root]
