"""A circuit: the kept edges of a graph, the scores of all of them, and how they were found.

On disk a circuit is a folder: `circuit.json`, readable and diffable, with the kept edges; and
`scores.safetensors` with the scores of all edges.  Nothing in either can run code.

Shapes: writers W, readers R; `*S` positions, where the graph tells edges apart by position.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.graph import Graph
from circuits.names import edge_name

FORMAT = 1


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

    def __len__(self) -> int:
        """Number of kept edges."""
        return int(self.kept.sum())

    def __repr__(self) -> str:
        parts = [f"{len(self)} of {self.graph.n_edges} edges"]
        for field_name in ("method", "metric", "ablation"):
            value = self.about.get(field_name)
            name = value.get("name") if isinstance(value, Mapping) else value
            parts += [f"{field_name}={name}"] if name else []
        return f"Circuit({', '.join(parts)})"

    def draw(self, path: str | Path) -> Path:
        """Draws into an .svg, .png or .pdf file; ValueError as `circuits.draw_circuit`."""
        from circuits.plot.circuit import draw_circuit

        path = Path(path)
        (drawn,) = draw_circuit(
            self.edges_over_positions,
            path.parent,
            path.stem,
            formats=[path.suffix.removeprefix(".")],
            caption=repr(self),
            kv_group=self.graph.kv_group,
        )
        return drawn

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
        return self._named(self.kept, self.scores)

    @property
    def edges_over_positions(self) -> list[tuple[str, float]]:
        """The kept edges without their positions, each with the sum of its kept scores."""
        if self.graph.n_positions is None:
            return self.edges
        return self._named(self.kept.any(-1), (self.scores * self.kept).sum(-1))

    def _named(self, kept: Tensor, scores: Tensor) -> list[tuple[str, float]]:
        names = (self.graph.edge_name(*edge) for edge in kept.nonzero().tolist())
        return list(zip(names, scores[kept].tolist(), strict=True))

    @property
    def mask(self) -> Float[Tensor, "R W *S"]:
        """1 where an edge is kept, else 0."""
        return self.kept.float()

    def networkx(self) -> nx.MultiDiGraph:
        """The kept edges as a graph between nodes, keyed by reader, each with its `score`."""
        view = self.graph.networkx(self.kept)
        for writer, _, reader, data in view.edges(keys=True, data=True):
            data["score"] = self.scores[self.graph.edge_index(edge_name(writer, reader))].item()
        return view

    def save(self, folder: str | Path) -> None:
        """Writes a folder, made if need be; ValueError where a kept edge's score is not finite."""
        from safetensors.torch import save_file

        for name, score in self.edges:
            if not math.isfinite(score):
                raise ValueError(
                    f"edge {name} has score {score}; scores must be finite, so check metric and "
                    "weights"
                )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        data = {
            "format": FORMAT,
            **self.about,
            "graph": self.graph.to_json(),
            "edges": [{"edge": name, "score": score} for name, score in self.edges],
        } | {"format": FORMAT}  # whatever `about` says
        save_file({"scores": self.scores.contiguous()}, folder / "scores.safetensors")
        (folder / "circuit.json").write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Reads a circuit from its folder or from its `circuit.json`; scores left out there are 0.

        Raises:
            FileNotFoundError: there is no circuit.json.
            ValueError: it is broken, of another format, or names edges that its graph lacks.
        """
        path = Path(path)
        path = path / "circuit.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(
                f"no circuit at {path}: `madcap extract ... out=DIR` writes one"
            )
        try:
            circuit = cls._from_json(json.loads(path.read_text()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no circuit file that can be read: {error}") from error
        tensors = path.with_name("scores.safetensors")
        if not tensors.is_file():
            return circuit
        scores = _read_scores(tensors)
        if scores.shape != circuit.kept.shape:
            raise ValueError(
                f"{tensors} has shape {tuple(scores.shape)}, but the graph of {path} is "
                f"{tuple(circuit.kept.shape)}"
            )
        return replace(circuit, scores=scores)

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> Circuit:
        version = data.pop("format")
        if version != FORMAT:
            raise ValueError(f"it has format {version}, but this version reads format {FORMAT}")
        graph = Graph.from_json(data.pop("graph"))
        kept, scores = torch.zeros_like(graph.exists), torch.zeros(graph.exists.shape)
        for entry in data.pop("edges"):
            index = graph.edge_index(entry["edge"])
            kept[index], scores[index] = True, entry["score"]
        return cls(graph, kept, scores, data)


def _read_scores(path: Path) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)["scores"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} holds no scores: {error}") from error
