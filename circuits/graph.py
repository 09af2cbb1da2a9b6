"""The graph of a decoder: which component can write to which, by name and by index.

A residual-stream decoder is a sum.  *Writers* add to it: `input` (or `input.token` and
`input.position`), each head `a{layer}.h{head}`, each MLP `m{layer}`.  *Readers* take from it: each
head's `<q>`, `<k>`, `<v>`, each MLP, and `logits`.  An edge joins a writer to a later reader:
`a0.h3->a1.h2<q>`.  With grouped-query attention `<k>` and `<v>` are read once per key-value head:
`a1.kv2<k>`.  The names are those of `circuits.names`.

With L layers and H heads the number of edges is

    E = sum_l [3 H s_l + s_l + H] + s_end,    s_l = 1 + l (H + 1),    s_end = 1 + L (H + 1)

Both lists are in the order in which a forward pass reaches them, so that the writers upstream of a
reader are always the first `upstream[r]` ones.  Everything else follows from that.

For templated prompts, all of one length, a graph may tell edges apart by position:
`a0.h3->a1.h2<q>@5` is what the reader takes from the writer at token 5.  There are then S times as
many edges, and masks have one more axis.

Shapes: writers W, readers R, candidate masks K; `*S` positions, or nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from typing import ClassVar

import networkx as nx
import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.files import restored
from circuits.names import (
    INPUT,
    INPUT_PARTS,
    LOGITS,
    edge_name,
    head_name,
    key_value_name,
    mlp_name,
    parse_edge,
    parse_node,
    reader_name,
    split_reader,
)
from circuits.space import Space


@dataclass(frozen=True)
class Graph(Space):
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
    causal: bool = True  # a position is read by itself and later ones; else by all
    n_positions: int | None = None  # edges per position, for prompts of exactly this many tokens

    noun: ClassVar[str] = "edges"  # as parts of a mask

    def __post_init__(self) -> None:
        sizes = {"n_layers": self.n_layers, "n_heads": self.n_heads, "n_kv_heads": self.kv_heads}
        for field, value in sizes.items():
            if value < 1:
                raise ValueError(f"{field}={value}, but a graph needs at least 1")
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.kv_heads}"
            )
        if self.n_positions is not None and self.n_positions < 1:
            raise ValueError(
                f"n_positions={self.n_positions}, but edges per position need at least 1"
            )

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

    # ---- names -----------------------------------------------------------------------------------

    @cached_property
    def writers(self) -> tuple[str, ...]:
        """Writer names in forward order."""
        names = [*INPUT_PARTS] if self.split_input else [INPUT]
        for layer in range(self.n_layers):
            names += [head_name(layer, head) for head in range(self.n_heads)]
            names += [] if self.attention_only else [mlp_name(layer)]
        return tuple(names)

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """Reader names in forward order: per block q, k, v of all heads, the MLP; last `logits`."""
        key_value = head_name if self.kv_group == 1 else key_value_name
        names = []
        for layer in range(self.n_layers):
            names += [reader_name(head_name(layer, head), "q") for head in range(self.n_heads)]
            for port, head in product("kv", range(self.kv_heads)):
                names.append(reader_name(key_value(layer, head), port))
            names += [] if self.attention_only else [mlp_name(layer)]
        return (*names, LOGITS)

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
            if not self.attention_only:
                counts.append(before if self.parallel else before + self.n_heads)
        return (*counts, len(self.writers))

    def first_writer(self, layer: int) -> int:
        """Index of the first writer of block `layer`; that of `n_layers` is how many there are."""
        return self.n_inputs + layer * self.writers_per_block

    def first_reader(self, layer: int) -> int:
        """Index of the first reader of block `layer`; `layer = n_layers` gives that of `logits`."""
        return layer * self.readers_per_block

    # ---- edges -----------------------------------------------------------------------------------

    @cached_property
    def exists(self) -> Bool[Tensor, "R W *S"]:
        """True where writer w comes before reader r, so that the edge can exist."""
        before = torch.arange(len(self.writers)) < torch.tensor(self.upstream)[:, None]
        if self.n_positions is None:
            return before
        return before[..., None].repeat(1, 1, self.n_positions)

    @cached_property
    def n_edges(self) -> int:
        return sum(self.upstream) * (self.n_positions or 1)

    @property
    def n_parts(self) -> int:
        """How many edges there are: parts that a mask may keep."""
        return self.n_edges

    def part_name(self, *index: int) -> str:
        """The name of an edge by its indices."""
        return self.edge_name(*index)

    def edges(self) -> list[tuple[int, ...]]:
        """All edges as (reader, writer) or (reader, writer, position) indices, in forward order."""
        return [tuple(edge) for edge in self.exists.nonzero().tolist()]

    def edge_name(self, reader: int, writer: int, position: int | None = None) -> str:
        return edge_name(self.writers[writer], self.readers[reader], position)

    def edge_index(self, name: str) -> tuple[int, ...]:
        """The indices, as in `edges`, of an edge's name; ValueError for no edge of this graph."""
        positions = [None] if self.n_positions is None else range(self.n_positions)
        try:
            edge = parse_edge(name)
            reader, writer = self.reader_index[edge.reader], self.writer_index[edge.writer]
            if edge.position not in positions:
                raise KeyError(edge.position)
        except (ValueError, KeyError):
            example = self.edge_name(len(self.readers) - 1, 0, positions[0])
            tokens = f", per position of {self.n_positions} tokens" if self.n_positions else ""
            raise ValueError(
                f"edge {name!r} is not in this graph of {self.n_layers} layers, {self.n_heads} "
                f"heads and {self.kv_heads} key-value heads{tokens}; edges look like {example!r}"
            ) from None
        if writer >= self.upstream[reader]:
            raise ValueError(
                f"edge {name!r} runs backwards: {edge.writer} is computed after {edge.reader} has "
                "been read"
            )
        return (reader, writer) if edge.position is None else (reader, writer, edge.position)

    def reader_nodes(self, reader: int) -> tuple[str, ...]:
        """The nodes that a reader feeds: one, or the query heads that share a key-value head."""
        name, _ = split_reader(self.readers[reader])
        node = parse_node(name)
        if node.kind != "kv":
            return (name,)
        first = node.head * self.kv_group
        return tuple(head_name(node.layer, first + member) for member in range(self.kv_group))

    def reads_from(self, reader: int, position: int, n_positions: int) -> range:
        """The positions at which a reader's input bears on its node's output at `position`.

        Keys and values move; all else stays where it is.
        """
        _, port = split_reader(self.readers[reader])
        if port not in ("k", "v"):
            return range(position, position + 1)
        return range(position + 1) if self.causal else range(n_positions)

    def sweep_order(self) -> list[tuple[int, ...]]:
        """All edges from the output to the input, the order of a greedy sweep.

        Layer descending; logits > mlp > v > k > q; head, writer and position descending.
        """
        return self.edges()[::-1]

    def networkx(self, kept: Bool[Tensor, "R W *S"] | None = None) -> nx.MultiDiGraph:
        """The (kept) edges between nodes; parallel ones are keyed by reader (and position)."""
        view = nx.MultiDiGraph()
        view.add_nodes_from([*self.writers, LOGITS])
        for reader, writer, *position in (self.exists if kept is None else kept).nonzero().tolist():
            key = self.readers[reader] + "".join(f"@{p}" for p in position)
            for node in self.reader_nodes(reader):
                view.add_edge(self.writers[writer], node, key=key)
        return view

    # ---- what a circuit leaves connected ---------------------------------------------------------

    def without_dead_ends(self, kept: Bool[Tensor, "R W *S"]) -> Bool[Tensor, "R W *S"]:
        """The kept edges that lie on a path of kept edges from an input to `logits`."""
        writers, readers = self.read(kept[None])
        flat = self._with_positions(kept)
        return (flat & (writers[0] & self._reached(flat)) & readers[0][:, None]).view(kept.shape)

    def read(
        self, kept: Bool[Tensor, "K R W *S"]
    ) -> tuple[Bool[Tensor, "K W s"], Bool[Tensor, "K R s"]]:
        """Which writers, and which readers, the logits depend on under each mask.

        s is the number of positions, or 1 where the graph does not tell them apart.
        """
        kept = self._with_positions(kept)
        writers = kept[:, -1].clone()
        readers = torch.ones_like(kept[:, :, 0])
        for layer in reversed(range(self.n_layers)):
            writer, reader = self.first_writer(layer), self.first_reader(layer)
            after = self.first_reader(layer + 1)
            if not self.attention_only:
                readers[:, after - 1] = writers[:, writer + self.n_heads]
                writers |= kept[:, after - 1] & readers[:, [after - 1]]
            heads = writers[:, writer : writer + self.n_heads]
            moved = self._from_here(heads.unflatten(1, (self.kv_heads, self.kv_group)).any(2))
            sides = torch.cat((heads, moved, moved), 1)
            readers[:, reader : reader + sides.shape[1]] = sides
            writers |= (kept[:, reader : reader + sides.shape[1]] & sides[:, :, None]).any(1)
        return writers, readers

    def _reached(self, kept: Bool[Tensor, "R W S"]) -> Bool[Tensor, "W S"]:
        """Which writers depend on an input."""
        writers = torch.zeros_like(kept[0])
        writers[: self.n_inputs] = True
        for layer in range(self.n_layers):
            writer, reader = self.first_writer(layer), self.first_reader(layer)
            after = self.first_reader(layer + 1)
            fed = (kept[reader:after] & writers).any(1)  # [readers of the block, S]
            sides = (self.n_heads, self.kv_heads, self.kv_heads)
            q, k, v = fed[: sum(sides)].split(sides)
            moved = self._to_here(k | v).repeat_interleave(self.kv_group, 0)
            writers[writer : writer + self.n_heads] = q | moved
            if not self.attention_only:
                writers[writer + self.n_heads] = (kept[after - 1] & writers).any(0)
        return writers

    def _with_positions(self, kept: Tensor) -> Tensor:
        return kept if self.n_positions is not None else kept[..., None]

    def _from_here(self, later: Bool[Tensor, "*K S"]) -> Bool[Tensor, "*K S"]:
        """True where any position that can read this one is True."""
        return self._to_here(later.flip(-1)).flip(-1)

    def _to_here(self, earlier: Bool[Tensor, "*K S"]) -> Bool[Tensor, "*K S"]:
        """True where any position that this one can read is True."""
        if self.causal:
            return earlier.cumsum(-1) > 0
        return earlier.any(-1, keepdim=True).expand_as(earlier)

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping) -> Graph:
        """The graph that `to_json` told; ValueError, or TypeError where a size is missing."""
        return restored(cls, data, "graph")
