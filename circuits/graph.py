"""The graph of a decoder: which component can write to which, by name and by index.

A residual-stream decoder is a sum.  *Writers* add to it: `input` (or `input.token` and
`input.position`), each head `a{layer}.h{head}`, each MLP `m{layer}`.  *Readers* take from it: each
head's `<q>`, `<k>`, `<v>`, each MLP, and `logits`.  An edge joins a writer to a later reader:
`a0.h3->a1.h2<q>`.  With grouped-query attention `<k>` and `<v>` are read once per key-value head:
`a1.kv2<k>`.  The names are those of EAP-IG (Hanna et al. 2024, arXiv 2403.17806) and MIB
(Mueller et al. 2025, arXiv 2504.13151).

With L layers and H heads the number of edges is

    E = sum_l [3 H s_l + s_l + H] + s_end,    s_l = 1 + l (H + 1),    s_end = 1 + L (H + 1)

Both lists are in the order in which a forward pass reaches them, so that the writers upstream of a
reader are always the first `upstream[r]` ones.  Everything else follows from that.

Shapes: writers W, readers R.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

import networkx as nx
import torch
from jaxtyping import Bool
from torch import Tensor

_HEAD_READER = re.compile(r"^a(\d+)\.(?:h|kv)(\d+)<([qkv])>$")


@dataclass(frozen=True)
class Graph:
    """The edges that can exist in a decoder of a given shape.

    >>> graph = Graph(n_layers=2, n_heads=4)
    >>> len(graph.writers), len(graph.readers), graph.n_edges
    (11, 27, 110)
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int | None = None  # None: as many as there are heads
    attention_only: bool = False  # no MLPs
    parallel: bool = False  # attention and MLP of a block read the same residual
    split_input: bool = False  # the input as two writers, token and position

    def __post_init__(self) -> None:
        for field, value in (("n_layers", self.n_layers), ("n_heads", self.n_heads), ("n_kv_heads", self.kv_heads)):
            if value < 1:
                raise ValueError(f"{field}={value}, but a graph needs at least 1")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.kv_heads}")

    @property
    def kv_heads(self) -> int:
        """Key-value heads per layer."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def kv_group(self) -> int:
        """Query heads that share one key-value head."""
        return self.n_heads // self.kv_heads

    @property
    def n_inputs(self) -> int:
        """Input writers: 1, or 2 when token and position are apart."""
        return 2 if self.split_input else 1

    @property
    def writers_per_block(self) -> int:
        return self.n_heads + (not self.attention_only)

    @property
    def readers_per_block(self) -> int:
        return self.n_heads + 2 * self.kv_heads + (not self.attention_only)

    # ---- names ----------------------------------------------------------------------------------

    @cached_property
    def writers(self) -> tuple[str, ...]:
        """Writer names in forward order."""
        names = ["input.token", "input.position"] if self.split_input else ["input"]
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}" for head in range(self.n_heads)]
            names += [] if self.attention_only else [f"m{layer}"]
        return tuple(names)

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """Reader names in forward order: per block q, k, v of all heads, then the MLP; last `logits`."""
        kv = "h" if self.kv_heads == self.n_heads else "kv"
        names = []
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}<q>" for head in range(self.n_heads)]
            names += [f"a{layer}.{kv}{head}<{side}>" for side in "kv" for head in range(self.kv_heads)]
            names += [] if self.attention_only else [f"m{layer}"]
        return (*names, "logits")

    @cached_property
    def writer_index(self) -> Mapping[str, int]:
        return {name: index for index, name in enumerate(self.writers)}

    @cached_property
    def reader_index(self) -> Mapping[str, int]:
        return {name: index for index, name in enumerate(self.readers)}

    @cached_property
    def upstream(self) -> tuple[int, ...]:
        """For each reader, how many writers come before it (they are the first so many)."""
        counts = []
        for layer in range(self.n_layers):
            before = self.first_writer(layer)
            counts += [before] * (self.n_heads + 2 * self.kv_heads)
            counts += [] if self.attention_only else [before if self.parallel else before + self.n_heads]
        return (*counts, len(self.writers))

    def first_writer(self, layer: int) -> int:
        """Index of the first writer of block `layer`; `layer = n_layers` gives the number of writers."""
        return self.n_inputs + layer * self.writers_per_block

    def first_reader(self, layer: int) -> int:
        """Index of the first reader of block `layer`; `layer = n_layers` gives that of `logits`."""
        return layer * self.readers_per_block

    # ---- edges ----------------------------------------------------------------------------------

    @cached_property
    def exists(self) -> Bool[Tensor, "R W"]:
        """True where writer w comes before reader r, so that the edge can exist."""
        return torch.arange(len(self.writers)) < torch.tensor(self.upstream)[:, None]

    @cached_property
    def n_edges(self) -> int:
        return sum(self.upstream)

    def edges(self) -> Iterator[tuple[int, int]]:
        """All edges as (reader, writer) indices, in forward order."""
        for reader, count in enumerate(self.upstream):
            for writer in range(count):
                yield reader, writer

    def edge_name(self, reader: int, writer: int) -> str:
        return f"{self.writers[writer]}->{self.readers[reader]}"

    def edge_index(self, name: str) -> tuple[int, int]:
        """(reader, writer) indices of an edge's name.

        Raises:
            ValueError: the name is no edge of this graph.
        """
        writer, arrow, reader = name.partition("->")
        if not arrow or writer not in self.writer_index or reader not in self.reader_index:
            raise ValueError(
                f"edge {name!r} is not in this graph of {self.n_layers} layers, {self.n_heads} heads and "
                f"{self.kv_heads} key-value heads; edges look like {self.edge_name(len(self.readers) - 1, 0)!r}"
            )
        indices = self.reader_index[reader], self.writer_index[writer]
        if not self.exists[indices]:
            raise ValueError(f"edge {name!r} runs backwards: {writer} is computed after {reader} has been read")
        return indices

    def reader_nodes(self, reader: int) -> tuple[str, ...]:
        """The nodes that reader `reader` feeds: one node, or the query heads that share a key-value head."""
        name = self.readers[reader]
        match = _HEAD_READER.match(name)
        if match is None:
            return (name,)
        layer, head, side = int(match[1]), int(match[2]), match[3]
        if side == "q" or self.kv_group == 1:
            return (f"a{layer}.h{head}",)
        return tuple(f"a{layer}.h{head * self.kv_group + member}" for member in range(self.kv_group))

    def sweep_order(self) -> list[tuple[int, int]]:
        """All edges from the output to the input, the order of a greedy sweep: total and deterministic.

        Layer descending; logits > mlp > v > k > q; head descending; writer descending.
        """
        return [(r, w) for r in reversed(range(len(self.readers))) for w in reversed(range(self.upstream[r]))]

    def networkx(self, kept: Bool[Tensor, "R W"] | None = None) -> nx.MultiDiGraph:
        """The (kept) edges between nodes; parallel edges are keyed by the reader's name."""
        view = nx.MultiDiGraph()
        view.add_nodes_from([*self.writers, "logits"])
        for reader, writer in (self.exists if kept is None else kept).nonzero().tolist():
            for node in self.reader_nodes(reader):
                view.add_edge(self.writers[writer], node, key=self.readers[reader])
        return view

    def without_dead_ends(self, kept: Bool[Tensor, "R W"]) -> Bool[Tensor, "R W"]:
        """The kept edges that lie on a path of kept edges from an input to `logits`."""
        view = self.networkx(kept)
        reaches = nx.ancestors(view, "logits") | {"logits"}
        inputs = self.writers[: self.n_inputs]
        reached = set(inputs).union(*(nx.descendants(view, name) for name in inputs))
        writer_alive = torch.tensor([name in reaches and name in reached for name in self.writers])
        reader_alive = torch.tensor([any(n in reaches for n in self.reader_nodes(r)) for r in range(len(self.readers))])
        return kept & writer_alive & reader_alive[:, None]

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping) -> Graph:
        return cls(**data)
