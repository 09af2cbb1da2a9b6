"""Transformers with exactly known circuits: programs, compiled to the weights of native models.

    Program (steps) -> places (which head or MLP) -> layout (which dimensions) -> weights -> model

The result knows its causal model, where each variable lives (its node, the basis of its subspace,
the positions at which the answer depends on it) and which edges the program uses.  The idea is
Tracr's (Lindner et al. 2023, arXiv 2301.05062).

Options make it harder to read without changing what it computes: a random rotation of the residual
stream; distractor heads and neurons, which read everything and write into a junk subspace that
nobody of the program reads; several heads that compute the same variable (`redundant`; see
`abstraction.ground_truth.weights` for what readers make of their votes).

RMS normalisation divides by the norm of the residual stream, which varies as variables are written.
One dimension holds a constant C = 2^14, written with the position embedding, so that the norm is C
to within a factor 1 + |x|^2 / 2 C^2, which is 1 in float32.  The norm's weight multiplies by
sqrt(C^2 / D + eps): every reader gets what was written.  That dimension is left out of the
rotation, which would spread rounding errors of its size.  Under ablation=zero it goes with the edge
from the input, and then nothing reads right: with RMS use another ablation.

Shapes: batch B, positions S, d_model D, categories n, writers W.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from abstraction.ground_truth.building import build, lay_out, rotation
from abstraction.ground_truth.options import Options, check_options, sizes
from abstraction.ground_truth.placement import Group, Place, groups, nodes_of, place, reads
from abstraction.ground_truth.program import Program, Sampler, encode
from circuits.graph import Graph
from circuits.model.load import LoadedModel


@dataclass(frozen=True)
class Aligned:
    """Where a variable lives: in what `nodes` write together, along the rows of `basis`.

    One-hot for a categorical variable; redundant nodes each write all of it.
    """

    nodes: tuple[str, ...]
    basis: Float[Tensor, "n D"]
    positions: tuple[int, ...]  # at which the answer depends on it, in inputs of full length


@dataclass(frozen=True, eq=False)
class Compiled:
    """A compiled program."""

    program: Program
    options: Options
    model: LoadedModel
    alignment: Mapping[str, Aligned]
    places: Mapping[str, Place]

    @property
    def tokens(self) -> tuple[str, ...]:
        return self.program.tokens

    def groups(
        self, *, split_input: bool | None = None, per_position: bool = False
    ) -> tuple[Group, ...]:
        """The edges that the program's steps read through; redundant ones together."""
        split = self.options.split_input if split_input is None else split_input
        return groups(self.program, self.places, split_input=split, per_position=per_position)

    @property
    def claimed_edges(self) -> tuple[tuple[str, ...], ...]:
        """The edges of each group, to be removed together."""
        return tuple(group.edges for group in self.groups())

    def edges(self, mechanism: str | None = None, **told_apart: bool) -> tuple[str, ...]:
        """The names of those edges, told apart as in `groups`; of one mechanism, if it is named."""
        chosen = [g for g in self.groups(**told_apart) if mechanism in (None, g.mechanism)]
        return tuple(dict.fromkeys(edge for group in chosen for edge in group.edges))

    def encode(self, names: Sequence[str]) -> list[int]:
        """Token ids of token names; ValueError for an unknown token, or too many of them."""
        return encode(self.program.name, names, self.tokens, self.program.length)

    def meaning(self, tokens: Int[Tensor, "B S"]) -> dict[str, Tensor]:
        """What the causal model says of every variable; ValueError for unknown ids, or too many."""
        if tokens.shape[1] > self.program.length:
            raise ValueError(
                f"inputs of {tokens.shape[1]} tokens, but {self.program.name} was compiled for "
                f"{self.program.length}"
            )
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(self.tokens):
            raise ValueError(
                f"token ids from {int(tokens.min())} to {int(tokens.max())}, but "
                f"{self.program.name} has 0 to {len(self.tokens) - 1}"
            )
        return self.program.causal_model.run({"token": tokens})

    def coordinates(
        self, graph: Graph, writers: Float[Tensor, "W B S D"], variable: str
    ) -> Float[Tensor, "B S n"]:
        """What the engine's writers say of a variable: one-hot, or one number."""
        names = nodes_of(variable, self.places, graph.split_input)
        total = torch.stack([writers[graph.writer_index[name]] for name in names]).sum(0)
        return total @ self.alignment[variable].basis.T.to(total) / len(names)

    def records(
        self, count: int, seed: int, *, sample: Sampler | None = None, label: int | None = None
    ) -> list[dict[str, Any]]:
        """Prompts with a counterfactual twin (`Program.records`)."""
        return self.program.records(count, seed, sample=sample, label=label)


def compile(program: Program, options: Options | None = None) -> Compiled:
    """Returns the program as a transformer.

    >>> from abstraction import PROGRAMS
    >>> compiled = compile(PROGRAMS["recall"]())
    >>> compiled.alignment["value"].nodes, len(compiled.edges())
    (('a1.h0',), 8)

    Raises:
        ValueError: it does not fit the sizes given, or a variable cannot be redundant.
    """
    options = options or Options()
    check_options(program, options)
    places = place(
        program,
        n_heads=None if options.n_heads is None else options.n_heads - options.distractor_heads,
        d_mlp=None if options.d_mlp is None else options.d_mlp - options.distractor_neurons,
        redundant=options.redundant,
        copies=options.copies,
    )
    size = sizes(program, options, places)
    layout = lay_out(program, options, size["d_model"])
    turn = rotation(layout, options)
    model = build(program, options, places, layout, turn, size)
    alignment = {
        name: Aligned(
            nodes_of(name, places, options.split_input),
            turn[list(dims)].to(options.dtype),
            _read_at(program, name),
        )
        for name, dims in layout.dims.items()
    }
    return Compiled(program, options, model, alignment, places)


def _read_at(program: Program, variable: str) -> tuple[int, ...]:
    """The positions at which the answer depends on a variable."""
    taken = [set(read.positions) for read in reads(program) if read.variable == variable]
    return tuple(sorted(set().union(*taken)))
