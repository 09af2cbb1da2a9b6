"""Which work an edge mask leaves: the heads and MLPs that the logits still depend on.

Walking back from `logits`, a writer is alive when a living reader keeps an edge to it, and a reader
is alive when its node is.  With grouped queries a key-value reader is dead only when all of its
query heads are.

Shapes: writers W, readers R, candidate masks K; C living writers.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.graph import Graph


@dataclass(frozen=True)
class Layer:
    """What is alive in one block."""

    heads: list[int]  # living query heads
    kv_heads: list[int]  # the key-value heads that they read
    kv_of_head: list[int] | None  # each living head's place in kv_heads; None: in equal groups
    all_heads: bool
    readers: slice | list[int]  # rows of the mask: q of the heads, then k and v
    mlp: bool


@dataclass(frozen=True)
class LiveNodes:
    """Living writers, in order, and the work per block."""

    writers: Int[Tensor, "C"]
    all_writers: bool
    n_prefix: int  # living writers before the first block that is run
    layers: dict[int, Layer]

    def prefix_rows(self, device: torch.device) -> slice | Tensor:
        """Where the living ones are among the writers before the first block that is run."""
        if self.all_writers:
            return slice(0, self.n_prefix)
        return self.writers[: self.n_prefix].to(device)


def live_nodes(graph: Graph, masks: Float[Tensor, "K R W *S"], first_layer: int = 0) -> LiveNodes:
    """The work that masks leave from block `first_layer` on; all of it for their gradient."""
    edges = graph.exists if masks.requires_grad else (masks.detach() != 0).any(0)
    kept = (edges if graph.n_positions is None else edges.any(-1)).cpu().numpy()
    wanted = kept[-1].copy()
    layers = {}
    heads_range = np.arange(graph.n_heads)
    for layer in reversed(range(first_layer, graph.n_layers)):
        writer, reader = graph.first_writer(layer), graph.first_reader(layer)
        mlp = not graph.attention_only and bool(wanted[writer + graph.n_heads])
        if mlp:
            wanted |= kept[graph.first_reader(layer + 1) - 1]
        heads = heads_range[wanted[writer : writer + graph.n_heads]]
        kv_heads, kv_of_head = np.unique(heads // graph.kv_group, return_inverse=True)
        first_k, first_v = reader + graph.n_heads, reader + graph.n_heads + graph.kv_heads
        all_heads = len(heads) == graph.n_heads
        readers: slice | list[int] = slice(reader, reader + graph.n_heads + 2 * graph.kv_heads)
        if not all_heads:
            rows = (reader + heads, first_k + kv_heads, first_v + kv_heads)
            readers = np.concatenate(rows).tolist()
        if len(heads):
            wanted |= kept[readers].any(0)
        layers[layer] = Layer(
            heads=heads.tolist(),
            kv_heads=kv_heads.tolist(),
            kv_of_head=None if all_heads or graph.kv_group == 1 else kv_of_head.tolist(),
            all_heads=all_heads,
            readers=readers,
            mlp=mlp,
        )
    writers = torch.from_numpy(np.flatnonzero(wanted))
    n_prefix = int(wanted[: graph.first_writer(first_layer)].sum())
    return LiveNodes(writers, len(writers) == len(graph.writers), n_prefix, layers)


@dataclass(frozen=True)
class Needed:
    """Which writers the logits depend on, and which of them at other than the scored positions.

    What only the scored positions of later nodes read is needed at these alone: keys and values
    move, all else stays where it is.
    """

    anywhere: Bool[np.ndarray, "W"]
    everywhere: Bool[np.ndarray, "W"]


def needed(graph: Graph, kept: Bool[np.ndarray, "R W"], together: Container[int] = ()) -> Needed:
    """Returns what kept edges leave needed; heads of layers `together` are needed alike."""
    anywhere, everywhere = kept[-1].copy(), np.zeros_like(kept[-1])
    for layer in reversed(range(graph.n_layers)):
        writer, reader = graph.first_writer(layer), graph.first_reader(layer)
        if not graph.attention_only and anywhere[writer + graph.n_heads]:
            row = kept[graph.first_reader(layer + 1) - 1]
            anywhere |= row
            if everywhere[writer + graph.n_heads]:
                everywhere |= row
        heads = slice(writer, writer + graph.n_heads)
        if layer in together and everywhere[heads].any():
            everywhere[heads] = anywhere[heads]
        queries = kept[reader : reader + graph.n_heads]
        anywhere |= queries[anywhere[heads]].any(0)
        everywhere |= queries[everywhere[heads]].any(0)
        groups = anywhere[heads].reshape(graph.kv_heads, graph.kv_group).any(1)
        first = reader + graph.n_heads
        sides = kept[first : first + 2 * graph.kv_heads][np.tile(groups, 2)].any(0)
        anywhere |= sides
        everywhere |= sides
    return Needed(anywhere, everywhere)
