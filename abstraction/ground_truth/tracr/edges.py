"""Which edges of a Tracr program its weights make, and which of them matter.

Every dimension of the residual stream has a label and every weight is there for a reason, so the
edges can be read off the weights: one exists where what the writer can write meets what the reader
reads, on a path from an input to the logits,

    written[w] read[r] > tolerance

    written by   input    rows X of the embedding
                 head     X W_V W_O, with X all that is written before it
                 MLP      rows of W_out whose neuron reads something
    read by      q, k, v  W_Q W_K^T X^T, W_K W_Q^T X^T, W_V W_O
                 MLP      columns of W_in whose neuron writes something
                 logits   W_U

Keeping only these leaves every output as it is, whatever the others carry.  Some of them carry the
same on all inputs (a constant, a position, the length of prompts that are all equally long): then
an ablation that keeps what is the same cannot see them.  Which are left depends on inputs and
ablation; `effective_edges` asks.

Shapes: d_model D, readers R, writers W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from abstraction.ground_truth.effects import mask_of
from abstraction.ground_truth.tracr.program import TracrProgram, variable_of
from circuits.ablation import Ablation
from circuits.engine import Engine
from circuits.metrics import metric_named
from circuits.objective import Objective, prepare
from circuits.prompts import Prompts

TOLERANCE = 1e-6  # of weights, which are 0, 1 or larger
BOUND = 1e-4  # on outputs, which are 0, 1 or what the program says


def derived_edges(
    program: TracrProgram, engine: Engine, *, tolerance: float = TOLERANCE
) -> dict[str, tuple[str, ...]]:
    """Returns the edges that the weights make, in forward order, with the variables they carry.

    Raises:
        ValueError: the engine runs another model, or tells edges apart by position; the tolerance
            is not positive.
    """
    graph = engine.graph
    if engine.model is not program.model or graph.n_positions is not None:
        raise ValueError(
            f"the engine runs another model than {program.name}, or per position; use Engine(its "
            "model)"
        )
    if not tolerance > 0:
        raise ValueError(f"tolerance={tolerance}, but it must be above 0, or rounding makes edges")
    written, read = _spans(engine, tolerance)
    kept = torch.zeros_like(graph.exists)
    for reader, writer in graph.edges():
        kept[reader, writer] = bool(((written[writer] @ read[reader]).abs() > tolerance).any())
    found = {}
    for reader, writer in graph.without_dead_ends(kept).nonzero().tolist():
        is_written = (written[writer].abs() > tolerance).any(0)  # [D]
        is_read = (read[reader].abs() > tolerance).any(1)  # [D]
        shared = (is_written & is_read).nonzero()[:, 0].tolist()
        carried = dict.fromkeys(variable_of(program.labels[index]) for index in shared)
        found[graph.edge_name(reader, writer)] = tuple(carried)
    return found


def _spans(engine: Engine, tolerance: float) -> tuple[list[Tensor], list[Tensor]]:
    """What each writer can write, [rows, D], and what each reader reads, [D, columns]."""
    architecture, graph = engine.architecture, engine.graph
    modules: list[Any] = [architecture.token, architecture.position]
    written: list[Tensor] = [module.weight.double() for module in modules]
    if not graph.split_input:
        written = [torch.cat(written)]
    read: list[Tensor] = []
    for block in architecture.blocks:
        attention, rows = block.attention, torch.cat(written)
        weights = attention.q.weight, attention.k.weight, attention.v.weight, attention.o.weight.T
        heads = (-1, architecture.head_width)
        q, k, v, o = (weight.double().unflatten(0, heads) for weight in weights)  # each [H, E, D]
        read += [*(q.mT @ (k @ rows.T)), *(k.mT @ (q @ rows.T)), *(v.mT @ o)]
        for head in range(graph.n_heads):
            _, sizes, values = torch.linalg.svd(rows @ v[head].T, full_matrices=False)  # [E, E]
            written.append(values[sizes > tolerance] @ o[head])
        if block.mlp is not None:
            into, out = block.mlp.up.weight.double(), block.mlp.down.weight.double().T
            live = (torch.cat(written) @ into.T).abs().amax(0) > tolerance  # [neurons]
            written.append(out[live])
            read.append(into.T * (out.abs().amax(1) > tolerance))
    return written, [*read, architecture.unembed.weight.double().T]


@dataclass(frozen=True)
class Effect:
    """What removing one derived edge does."""

    edge: str
    effect: float  # largest change of an output at a scored position, when it alone is removed
    true: bool  # it is one of those that are enough together, none of which can go


def effective_edges(
    program: TracrProgram,
    engine: Engine,
    prompts: Prompts,
    ablation: Ablation,
    *,
    bound: float = BOUND,
) -> tuple[Effect, ...]:
    """Returns the derived edges, in forward order; the true ones are the truth on these prompts.

    Keeping only those changes no output by more than `bound`; removing any one of them then does.
    They are found by a sweep from the logits to the inputs.  Where two edges can stand in for each
    other it keeps one, whose effect alone is within the bound; where all true edges and no others
    have an effect alone, there is no such choice.

    Raises:
        ValueError: as `derived_edges`; the bound is not positive, or the prompts lack what the
            ablation needs.
    """
    if not bound > 0:
        raise ValueError(f"bound={bound}, but it must be above 0, or rounding counts")
    graph, derived = engine.graph, derived_edges(program, engine)
    objective = prepare(engine, prompts, metric_named("kl"), ablation)
    kept = mask_of(graph, derived)
    alone = {edge: _change(objective, kept & ~mask_of(graph, (edge,))) for edge in derived}
    if (change := _change(objective, kept)) > bound:
        raise ValueError(
            f"the derived edges alone change an output by {change:.2g}; bound={bound} is too low"
        )
    before = None
    while before is None or not torch.equal(before, kept):
        before = kept.clone()  # what could not go at first may be able to go once others have gone
        for index in (index for index in graph.sweep_order() if before[index]):
            kept[index] = False
            kept[index] = _change(objective, kept) > bound
    return tuple(Effect(edge, alone[edge], bool(kept[graph.edge_index(edge)])) for edge in derived)


def _change(objective: Objective, kept: Bool[Tensor, "R W"]) -> float:
    """The largest change of an output, over all prompts and scored positions."""
    worst = 0.0
    for batch in objective.batches:
        logits, scored = objective.logits(batch, kept), batch.prompts.positions >= 0
        worst = max(worst, (logits - batch.clean.logits).abs()[scored].max().item())
    return worst
