"""One plain run of the model, and the gradients at its readers.

Shapes: batch B, pos S, d_model D, head width E, writers W, scored positions P, vocabulary V,
readers r of one group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.model.architecture import Architecture, Block
from circuits.model.attention import attend
from circuits.prompts.prompts import Prompts

Sides = tuple[Tensor, Tensor, Tensor]  # queries, keys and values of one layer, [heads, B, S, E]

# What may change values on their way: (place, value, given) -> value.  The places are
#     input     what the input writers write, [B, S, D]
#     r{l}      the residual stream before block l, or after all L blocks (r{L}), [B, S, D]
#     a{l}.z    what the heads of block l have moved and their projection reads, [B, S, heads * E]
#     a{l}      what the attention of block l writes, [B, S, D]
#     m{l}.z    what the last projection of an MLP reads: its neurons, [B, S, F]
#     m{l}      what an MLP writes, [B, S, D]; `given` is the residual stream that its norm reads
# where `given` is otherwise the value itself.
Edit = Callable[[str, Tensor, Tensor], Tensor]


@dataclass
class Record:
    """What a plain run leaves behind, as far as there is room for it."""

    writers: Float[Tensor, "W B S D"] | None = None  # what every writer writes, to be filled
    sides: list[Sides] | None = None  # of each layer
    # of each reader group but the logits, in forward order: the residual that it reads, and the
    # tensors behind its norm and projections, at which gradients are taken
    taps: list[tuple[Tensor, tuple[Tensor, ...]]] | None = None


def residual_stream(
    architecture: Architecture,
    prompts: Prompts,
    embedded: Float[Tensor, "B S D"],
    record: Record | None = None,
    edit: Edit | None = None,
) -> Float[Tensor, "B P D"]:
    """Returns the residual stream before the final norm, at the scored positions."""
    graph, record = architecture.graph, record or Record()
    key_mask = None if graph.causal else prompts.key_mask
    residual = _edited(edit, "input", embedded)
    for layer, block in enumerate(architecture.blocks):
        before = residual = _edited(edit, f"r{layer}", residual)
        residual = residual + _attention(architecture, layer, before, key_mask, record, edit)
        if block.mlp is None or block.norm2 is None:
            continue
        mlp_input = before if graph.parallel else residual
        normed = block.norm2(mlp_input)
        if record.taps is not None:  # without a norm it is the residual itself, which others read
            normed = normed.view_as(normed)
            record.taps.append((mlp_input, (normed,)))
        written = block.feed_forward(normed, partial(_edited, edit, f"m{layer}.z"))
        written = _edited(edit, f"m{layer}", written, mlp_input)
        residual = residual + written
        if record.writers is not None:
            record.writers[graph.first_writer(layer) + graph.n_heads] = written
    return prompts.at_scored(_edited(edit, f"r{graph.n_layers}", residual))


def _edited(edit: Edit | None, place: str, value: Tensor, given: Tensor | None = None) -> Tensor:
    return value if edit is None else edit(place, value, value if given is None else given)


def _attention(
    architecture: Architecture,
    layer: int,
    residual: Float[Tensor, "B S D"],
    key_mask: Bool[Tensor, "B S"] | None,
    record: Record,
    edit: Edit | None,
) -> Float[Tensor, "B S D"]:
    """What the attention of a block adds to the residual stream."""
    graph, block = architecture.graph, architecture.blocks[layer]
    attention = block.attention
    sides = architecture.sides(attention, block.norm1(residual))
    if record.sides is not None:
        record.sides.append(sides)
    if record.taps is not None:
        record.taps.append((residual, sides))
    z = attend(architecture, attention, *sides, key_mask)
    if record.writers is None:
        written = attention.o(_edited(edit, f"a{layer}.z", z.movedim(0, -2).flatten(-2)))
        written = written if block.post_norm1 is None else block.post_norm1(written)
        return _edited(edit, f"a{layer}", written)
    first = graph.first_writer(layer)
    heads = record.writers[first : first + graph.n_heads]
    into = heads.view(len(heads), -1, heads.shape[-1])
    torch.bmm(z.flatten(1, 2), architecture.output_weight(attention), out=into)
    if block.post_norm1 is not None:
        heads.mul_(block.post_norm1.factor(heads.sum(0)))
    written = heads.sum(0)
    return written if attention.o.bias is None else written.add_(attention.o.bias)


def reader_gradients(
    architecture: Architecture,
    prompts: Prompts,
    embedded: Float[Tensor, "B S D"],
    scalar: Callable[[Float[Tensor, "B P V"]], Float[Tensor, ""]],
    edit: Edit | None = None,
) -> Iterator[tuple[int, Float[Tensor, "r B S D"]]]:
    """Yields (first reader, gradients of `scalar(logits)` at a group's inputs), logits first.

    Readers that `edit` cuts off from the logits get 0.
    """
    graph, taps = architecture.graph, []
    with torch.enable_grad():
        start = embedded.detach().requires_grad_()
        residual = residual_stream(architecture, prompts, start, Record(taps=taps), edit)
        normed = architecture.final_norm(residual)
        total = scalar(architecture.unembedded(normed))
        tensors = [tensor for _, behind in taps for tensor in behind]
        behind = [*tensors, normed]
        found = torch.autograd.grad(total, behind, materialize_grads=edit is not None)
        gradients = iter(found)
    groups = [(read, [next(gradients) for _ in behind]) for read, behind in taps]
    at_end = architecture.final_norm.pull_back(residual, next(gradients)[None])
    yield len(graph.readers) - 1, _scattered(at_end, prompts)
    for layer in reversed(range(graph.n_layers)):
        block, first = architecture.blocks[layer], graph.first_reader(layer)
        if block.norm2 is not None:
            residual, (gradient,) = groups.pop()
            yield graph.first_reader(layer + 1) - 1, block.norm2.pull_back(residual, gradient[None])
        residual, sides = groups.pop()
        at_norm = _through_projections(block, sides, residual)
        yield first, block.norm1.pull_back(residual, at_norm)


def _through_projections(
    block: Block, sides: list[Tensor], residual: Float[Tensor, "B S D"]
) -> Float[Tensor, "r B S D"]:
    """Takes gradients at queries, keys and values back to what is projected."""
    gradients = residual.new_empty(sum(map(len, sides)), *residual.shape)
    row, attention = 0, block.attention
    projections = (attention.q, attention.k, attention.v)
    behind = any(projection.norm is not None for projection in projections)
    inputs = block.norm1(residual) if behind else None  # nothing else depends on them
    for side, projection in zip(sides, projections, strict=True):
        projection.pull_back(side, inputs, gradients[row : row + len(side)])
        row += len(side)
    return gradients


def _scattered(values: Float[Tensor, "one B P D"], prompts: Prompts) -> Float[Tensor, "one B S D"]:
    """The adjoint of `Prompts.at_scored`; absent positions carry no gradient."""
    full = values.new_zeros(*values.shape[:2], prompts.clean.shape[1], values.shape[-1])
    index = prompts.positions.clamp(min=0)[None, ..., None].expand_as(values)
    return full.scatter_add_(2, index, values)
