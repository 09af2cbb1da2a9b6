"""A circuit: the kept edges of a graph, the scores of all of them, and how they were found.

On disk a circuit is a folder: `circuit.json`, readable and diffable, with the kept edges; and
`scores.safetensors` with the scores of all edges and, of a learned mask, the parameters of its
gates (log_alpha).  Nothing in either can run code, and where the two disagree the circuit is
refused.

Shapes: writers W, readers R; `*S` positions, where the graph tells edges apart by position.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.circuit_files import (
    check_finite,
    circuit_file,
    drawn_masks,
    said,
    told_mask,
    with_stored,
)
from circuits.files import read_json, write_tensors, write_text
from circuits.foreign import EAP_IG, from_eap_ig, grouped, is_eap_ig
from circuits.graph import Graph
from circuits.mask_distribution import MaskDistribution
from circuits.names import edge_name

FORMAT = 1
MOST_CELLS = 2**31  # of a mask of readers by writers (by positions)
MOST_SCORE = torch.finfo(torch.float32).max


@dataclass(frozen=True, eq=False)
class Circuit:
    """Kept edges with their scores; `about` says which model, task, method, ... gave them.

    In a notebook it shows its picture.

    >>> graph = Graph(n_layers=1, n_heads=1)
    >>> circuit = Circuit(graph, kept=graph.exists, scores=graph.exists.float())
    >>> circuit, circuit.edges[0]
    (Circuit(8 of 8 edges), ('input->a0.h0<q>', 1.0))
    """

    graph: Graph
    kept: Bool[Tensor, "R W *S"]
    scores: Float[Tensor, "R W *S"]
    about: Mapping[str, Any] = field(default_factory=dict)
    trained: MaskDistribution | None = None  # the mask that it was taken from, if one was learned

    def __len__(self) -> int:
        """Number of kept edges."""
        return int(self.kept.sum())

    def __repr__(self) -> str:
        parts = [f"{len(self)} of {self.graph.n_edges} edges"]
        for field_name in ("method", "metric", "ablation"):
            name = self.says(field_name)
            parts += [f"{field_name}={name}"] if name else []
        return f"Circuit({', '.join(parts)})"

    def says(self, field_name: str) -> str:
        """The name of its task, method, metric or ablation; empty where it does not say."""
        return said(self.about, field_name)

    def draw(self, path: str | Path, *, edges: int | None = None) -> Path:
        """Draws it, or its `strongest(edges)`, into an .svg, .png or .pdf file.

        Raises:
            ValueError: as `circuits.draw_circuit` and, for `edges`, as `strongest`.
        """
        from circuits.plot.circuit import draw_circuit

        path, whole = Path(path), self.over_positions
        drawn = whole if edges is None else whole.strongest(edges)
        part = f"{len(drawn)} of {len(whole)} edges drawn, of " if len(drawn) < len(whole) else ""
        (file,) = draw_circuit(
            drawn.edges,
            path.parent,
            path.stem,
            formats=[path.suffix.removeprefix(".")],
            caption=part + repr(self),
            kv_group=self.graph.kv_group,
        )
        return file

    def strongest(self, edges: int) -> Circuit:
        """The strongest part of it that is connected and has at most so many edges.

        It grows from `logits` by the largest |score| among kept edges, as greedy selection does,
        and dead ends are dropped. A circuit that has no more edges comes back as it is.

        >>> graph = Graph(n_layers=1, n_heads=1)
        >>> scores = graph.exists.float()
        >>> scores[graph.edge_index("a0.h0->m0")] = 0.5
        >>> [name for name, _ in Circuit(graph, graph.exists, scores).strongest(7).edges][-3:]
        ['input->logits', 'a0.h0->logits', 'm0->logits']

        Raises:
            ValueError: no part with so few edges joins an input to the logits, or a score is not
                finite.
        """
        from circuits.selection import ranking

        if len(self) <= edges:
            return self
        # kept edges that score 0 come before those that are not kept
        tiny = torch.finfo(self.scores.dtype).tiny
        scores = self.scores.abs().clamp_min(tiny) * self.kept
        kept = ranking(self.graph, scores).within(edges)
        if not kept.any():
            raise ValueError(
                f"edges={edges}, but no part of the circuit with so few edges joins an input to "
                "the logits; raise edges"
            )
        return replace(self, kept=kept)

    def export(self, path: str | Path) -> Path:
        """Writes it for other programs: .json (EAP-IG, MIB), .dot or .graphml.

        >>> graph = Graph(n_layers=1, n_heads=1)
        >>> path = Circuit(graph, graph.exists, graph.exists.float()).export("circuit.graphml")
        >>> len(nx.read_graphml(path).edges)
        8

        Raises:
            ValueError: another suffix, or a graph that the format cannot say.
        """
        from circuits.export import export_circuit

        return export_circuit(self, path)

    def _repr_html_(self) -> str:
        from circuits.plot.notebook import circuit_html

        return circuit_html(self)

    def hash(self) -> str:
        """SHA-256 of the graph and the kept edges."""
        names = [name for name, _ in self.edges]
        return hashlib.sha256(json.dumps([self.graph.to_json(), names]).encode()).hexdigest()

    @property
    def edges(self) -> list[tuple[str, float]]:
        """Names and scores of the kept edges, in forward order."""
        names = (self.graph.edge_name(*edge) for edge in self.kept.nonzero().tolist())
        return list(zip(names, self.scores[self.kept].tolist(), strict=True))

    @property
    def over_positions(self) -> Circuit:
        """It without positions: each edge that is kept at any has the sum of its kept scores."""
        if self.graph.n_positions is None:
            return self
        kept, scores = self.kept.any(-1), (self.scores * self.kept).sum(-1)
        return replace(self, graph=replace(self.graph, n_positions=None), kept=kept, scores=scores)

    @property
    def edges_over_positions(self) -> list[tuple[str, float]]:
        """The kept edges without their positions, each with the sum of its kept scores."""
        return self.over_positions.edges

    @property
    def space(self) -> Graph:
        """What a mask is over: its graph."""
        return self.graph

    @property
    def mask(self) -> Float[Tensor, "R W *S"]:
        """1 where an edge is kept, else 0."""
        return self.kept.float()

    def sample(self, n: int, seed: int) -> list[Circuit]:
        """Draws circuits from the trained mask; all should do what this one does.

        >>> from circuits.mask_distribution import MaskDistribution
        >>> graph = Graph(n_layers=1, n_heads=1)
        >>> gates = {"edge": torch.zeros(graph.exists.shape)}  # each is open half of the time
        >>> trained = MaskDistribution(graph, "window", "edges", gates)
        >>> circuit = Circuit(graph, graph.exists, graph.exists.float(), trained=trained)
        >>> len(circuit.sample(5, seed=0))
        5

        Raises:
            ValueError: it was found by no learned mask, or n is under 1.
        """
        drawn = drawn_masks(self, n, seed)
        return [replace(self, kept=kept, about=about) for kept, about in drawn]

    def networkx(self) -> nx.MultiDiGraph:
        """The kept edges as a graph between nodes, keyed by reader, each with its `score`."""
        view = self.graph.networkx(self.kept)
        for writer, _, reader, data in view.edges(keys=True, data=True):
            data["score"] = self.scores[self.graph.edge_index(edge_name(writer, reader))].item()
        return view

    def save(self, folder: str | Path) -> None:
        """Writes a folder, made if need be; ValueError where a kept edge's score is not finite.

        `circuit.json` comes first: if there is no room for the other file, the circuit is there.
        """
        check_finite("edge", self.edges)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        mask, gates = told_mask(self.trained)
        data = {
            "format": FORMAT,
            **self.about,
            "graph": self.graph.to_json(),
            "edges": [{"edge": name, "score": score} for name, score in self.edges],
        } | {"format": FORMAT, **mask}  # whatever `about` says
        tensors = {"scores": self.scores, **gates}
        text = json.dumps(data, indent=1, allow_nan=False) + "\n"
        write_text(folder / "circuit.json", text)
        write_tensors(folder / "scores.safetensors", tensors)

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Reads a circuit from its folder or from its `circuit.json`; scores left out there are 0.

        A trained mask is in `scores.safetensors`; without that file there is none.

        A graph file of EAP-IG or MIB is read too; it names no model, so that it can be drawn and
        measured, but not opened with `mad.open_run`.

        Raises:
            FileNotFoundError: there is no circuit.json.
            ValueError: it is broken, of another format, names edges that its graph lacks, or
                `scores.safetensors` beside it has other scores, or no mask that fits.
        """
        path = circuit_file(path)
        try:
            data = read_json(path)
            foreign, circuit = is_eap_ig(data), cls._from_json(data)
        except KeyError as error:
            raise ValueError(
                f"{path} is no circuit file that can be read: it lacks {error}"
            ) from error
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no circuit file that can be read: {error}") from error
        return with_stored(circuit, path, scored=not foreign)

    @classmethod
    def _from_json(cls, data: Any) -> Circuit:
        if is_eap_ig(data):
            from circuits.regrouped import regrouped

            graph, entries = from_eap_ig(data)
            about = {"read_from": EAP_IG, "d_model": data["cfg"].get("d_model")}
            return regrouped(cls._of(graph, entries, about), grouped(data))
        if not isinstance(data, dict):
            raise TypeError("it holds no mapping")
        version = data.pop("format")
        if version != FORMAT:
            raise ValueError(f"it has format {version}, but this version reads format {FORMAT}")
        if "units" in data:
            raise ValueError(
                "its circuit is of units, but this needs one of edges; extract with units=edges, "
                "or read it with circuits.UnitCircuit"
            )
        graph = Graph.from_json(data.pop("graph"))
        entries = [(entry["edge"], entry["score"], True) for entry in data.pop("edges")]
        return cls._of(graph, entries, data)

    @classmethod
    def _of(
        cls, graph: Graph, entries: Iterable[tuple[str, float, bool]], about: Mapping[str, Any]
    ) -> Circuit:
        """A circuit from names, scores and whether they are kept."""
        _check_size(graph)
        kept, scores = torch.zeros_like(graph.exists), torch.zeros(graph.exists.shape)
        told = set()
        for name, score, keep in entries:
            index = graph.edge_index(name)
            if index in told:
                raise ValueError(f"edge {name!r} is there twice")
            if not abs(score) <= MOST_SCORE:
                raise ValueError(f"edge {name!r} has score {score!r}; scores must be finite")
            kept[index], scores[index] = keep, score
            told.add(index)
        return cls(graph, kept, scores, about)


def _check_size(graph: Graph) -> None:
    """Refuses a graph whose masks nobody could hold, before any is made."""
    writers = graph.first_writer(graph.n_layers)
    readers = graph.first_reader(graph.n_layers) + 1
    cells = writers * readers * (graph.n_positions or 1)
    if cells > MOST_CELLS:
        raise ValueError(
            f"its graph has {readers} readers and {writers} writers at {graph.n_positions or 1} "
            f"positions, more than the {MOST_CELLS} pairs that can be held"
        )
