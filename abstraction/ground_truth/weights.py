"""The weights of each step: heads that match and fetch, neurons that look up.

The residual stream is cut into subspaces, one per variable: n dimensions for a categorical one
(one-hot), one for a numerical one.

    head      score(i, j) = M match(query_i, key_j) + H tie(j)
              tie(j) = j (last), -j (first), 0 (mean)
    lookup    neuron (a, b, c):  relu(1[x=a] + 1[y=b] + 1[z=c] - 2)  writes table[a, b, c]
    threshold step at cut c:     relu((x - c)/gap + 1/2) - relu((x - c)/gap - 1/2)
    combine   y = relu(y) - relu(-y)
    switch    relu(1[normal=c] - 1[trigger]) and relu(1[other=c] + 1[trigger] - 1)  write c

Attention is hard: with H = 20 and M = 2 H S (2 H for a mean, which has no ties to break) the wrong
positions get less than S e^-20 < 1e-6 of the weight, for inputs of S <= 256 tokens.

Redundancy.  When r heads write the same variable into the same subspace, a reader sees votes: 0 ..
r in each dimension. A lookup counts a category as present from `needed` votes on: its other inputs
weigh r, so that u = sum - r (k - 1) is the number of votes if all others match and at most 0 if
not, and

    2 relu(u - needed + 3/4) - 2 relu(u - needed + 1/4)

is 0 for u <= needed - 3/4 and 1 for u >= needed - 1/4.

A head that matches on such a variable needs one vote: M is so large that a single one decides.

Shapes: d_model D, head width E, neurons N, categories n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from abstraction.ground_truth.program import Program
from abstraction.ground_truth.steps import (
    Attend,
    Combine,
    Lookup,
    Step,
    Switch,
    Threshold,
    category,
)

HARD = 20.0  # by how much a head's best score beats the next
LONGEST = 256  # inputs for which the stated leak of attention holds


@dataclass(frozen=True)
class Layout:
    """Which dimensions of the unrotated residual stream hold which variable."""

    dims: Mapping[str, range]
    junk: range
    constant: int | None  # the dimension that keeps the norm constant
    width: int

    def reader(self, variable: str) -> Float[Tensor, "n D"]:
        """One row per dimension of a variable."""
        return torch.eye(self.width, dtype=torch.float64)[list(self.dims[variable])]


@dataclass(frozen=True)
class Votes:
    """How many heads write the redundant variable, and how many of them its readers need."""

    variable: str | None = None
    copies: int = 1
    needed: int = 1


@dataclass(frozen=True)
class Head:
    """Weights of one head: q = W_q x + b_q, and so on; `o` maps the value back."""

    q: Float[Tensor, "E D"]
    q_bias: Float[Tensor, " E"]
    k: Float[Tensor, "E D"]
    v: Float[Tensor, "E D"]
    o: Float[Tensor, "D E"]


@dataclass(frozen=True)
class Neurons:
    """relu(W_in x + b_in) W_out + b_out, with rows for neurons."""

    into: Float[Tensor, "N D"]
    bias: Float[Tensor, " N"]
    out: Float[Tensor, "N D"]
    out_bias: Float[Tensor, " D"]


def head_width(program: Program, step: Attend) -> int:
    """Dimensions that a head needs for matching and, separately, for its value."""
    n_query, n_key = step.matches(program.sizes).shape
    value = 1 if program.sizes[step.name] is None else category(program.sizes, step.value)
    return max(min(n_query, n_key) * (step.key is not None) + (step.ties != "mean"), value)


def head(program: Program, step: Attend, layout: Layout, d_head: int) -> Head:
    """Returns the head that does an attention step."""
    q, k, v = (torch.zeros(d_head, layout.width, dtype=torch.float64) for _ in range(3))
    q_bias, o = torch.zeros_like(q[:, 0]), torch.zeros_like(q.T)
    scale = math.sqrt(d_head)  # the model divides scores by it
    row = 0
    if step.key is not None:
        matches = step.matches(program.sizes).double()  # [query, key]
        strength = 2 * HARD * scale * (1 if step.ties == "mean" else program.length)
        keys = layout.reader(step.key)
        row = min(matches.shape)
        if step.query is None:
            q_bias[0], k[:1] = strength, matches @ keys
        elif matches.shape[0] < matches.shape[1]:
            q[:row], k[:row] = strength * layout.reader(step.query), matches @ keys
        else:
            q[:row], k[:row] = strength * matches.T @ layout.reader(step.query), keys
    if step.ties != "mean":
        rising = torch.arange(program.length, dtype=torch.float64) @ layout.reader("position")
        q_bias[row], k[row] = HARD * scale, rising if step.ties == "last" else -rising
    value, written = layout.reader(step.value), list(layout.dims[step.name])
    if step.numbers is not None:
        value = torch.tensor([step.numbers], dtype=torch.float64) @ value
    v[: len(value)] = value
    o[written, torch.arange(len(written))] = 1.0
    return Head(q, q_bias, k, v, o)


def neurons(program: Program, step: Step, layout: Layout, votes: Votes) -> Neurons:
    """Returns the neurons that do a step in an MLP."""
    match step:
        case Lookup():
            return _lookup(program, step, layout, votes)
        case Threshold():
            return _threshold(step, layout)
        case Combine():
            return _combine(step, layout)
        case Switch():
            return _switch(step, layout)
    raise AssertionError(f"{step.name} is no MLP step")


def _lookup(program: Program, step: Lookup, layout: Layout, votes: Votes) -> Neurons:
    table = program.tables[step.name]
    key = torch.ones(table.shape).nonzero()  # [N, inputs]
    out = layout.reader(step.name)[table.flatten()]
    voted = votes.variable in step.inputs
    heaviest = float(votes.copies) if voted else 1.0
    into = torch.zeros_like(out)
    for column, name in enumerate(step.inputs):
        into += (1.0 if name == votes.variable else heaviest) * layout.reader(name)[key[:, column]]
    others = sum(heaviest for name in step.inputs if name != votes.variable)
    bias = torch.full((len(out),), -others if voted else 1.0 - others, dtype=torch.float64)
    nothing = torch.zeros(layout.width, dtype=torch.float64)
    if not voted:
        return Neurons(into, bias, out, nothing)
    biases = torch.cat([bias - votes.needed + 0.75, bias - votes.needed + 0.25])
    return Neurons(torch.cat([into, into]), biases, torch.cat([2 * out, -2 * out]), nothing)


def _threshold(step: Threshold, layout: Layout) -> Neurons:
    cuts, bins = torch.tensor(step.cuts, dtype=torch.float64), layout.reader(step.name)
    x = layout.reader(step.input) / step.gap
    rises = bins[1:] - bins[:-1]  # passing a cut takes from one bin to the next
    bias = torch.cat([0.5 - cuts / step.gap, -0.5 - cuts / step.gap])
    return Neurons(x.expand(2 * len(cuts), -1), bias, torch.cat([rises, -rises]), bins[0])


def _combine(step: Combine, layout: Layout) -> Neurons:
    weights = torch.tensor(step.weights, dtype=torch.float64)
    x = weights @ torch.cat([layout.reader(name) for name in step.inputs])
    bias, out = torch.tensor([step.bias, -step.bias], dtype=torch.float64), layout.reader(step.name)
    return Neurons(torch.stack([x, -x]), bias, torch.cat([out, -out]), torch.zeros_like(x))


def _switch(step: Switch, layout: Layout) -> Neurons:
    on, out = layout.reader(step.trigger)[1], layout.reader(step.name)
    into = torch.cat([layout.reader(step.normal) - on, layout.reader(step.other) + on])
    bias = torch.cat([torch.zeros(len(out)), -torch.ones(len(out))]).double()
    return Neurons(into, bias, torch.cat([out, out]), torch.zeros_like(on))
