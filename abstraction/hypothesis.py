"""A hypothesis: which nodes of a model matter, for what, and what of the input each one carries.

A hypothesis is a set of named nodes that read each other, up to the one at `logits` (Chan et al.
2022, causal scrubbing: the interpretation graph with its correspondence).  A node says

    at         what it is in the model: a head `a1.h2`, an MLP `m0`, `input` or `logits`; several
               heads that do the same; or what a head reads through one side, `a1.h2<q>`, `<k>`,
               `<v>`, or through both of `<pattern>`
    feature    what of the input it depends on: inputs that agree in it may be exchanged for one
               another (`abstraction.features`)
    positions  tokens at which what it writes matters, counted from the end where negative; left
               out: all of them
    reads      the nodes that it depends on, each with the sides through which a head reads it:
               q, k, v, pattern (q and k) or all.  Left out: a leaf, whose own inputs are whatever
               they are.  Empty: nothing that it reads matters

and what is not named does not matter.  As a file, in YAML or JSON:

    name: induction
    nodes:
      output: {at: logits, reads: {induction head: all}}
      induction head: {at: a1.h0, feature: answer, reads: {previous: k, last: q, tokens: v}}
      previous: {at: a0.h3, feature: tokens}
      last: {at: input, positions: [-1], feature: token@-1}
      tokens: {at: input, feature: tokens}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx
import yaml

from circuits.graph import Graph
from circuits.names import LOGITS, parse_node, reader_name, split_reader

PORTS = {"q": "q", "k": "k", "v": "v", "pattern": "qk", "all": "qkv"}


@dataclass(frozen=True)
class Claim:
    """What a hypothesis says of one of its nodes."""

    at: tuple[str, ...]
    feature: tuple[str, ...] = ("exact",)  # several: all of them together
    positions: tuple[int, ...] | None = None
    # the nodes that it reads, with the ports of a head through which it does; None: a leaf
    reads: Mapping[str, str] | None = None

    @property
    def half(self) -> str:
        """The ports of a head that this stands for; "" where it stands for whole nodes."""
        _, port = split_reader(self.at[0])
        return PORTS.get(port, "")


@dataclass(frozen=True)
class Hypothesis:
    """Named claims about the nodes of a model.

    >>> text = "nodes: {output: {at: logits, reads: {copy: all}}, copy: {at: a1.h0}}"
    >>> Hypothesis.parse(text).root
    'output'

    Raises:
        ValueError: no node or several at `logits`, a node that nothing reads, a cycle, a node that
            reads what is not there, or one part of the model twice.
    """

    name: str
    nodes: Mapping[str, Claim]

    def __post_init__(self) -> None:
        for name, claim in self.nodes.items():
            if unknown := [child for child in claim.reads or () if child not in self.nodes]:
                raise ValueError(
                    f"node {name!r} reads {unknown[0]!r}, which is no node of this hypothesis; its "
                    f"nodes are {', '.join(self.nodes)}"
                )
        roots = [name for name, claim in self.nodes.items() if claim.at == (LOGITS,)]
        if len(roots) != 1:
            raise ValueError(
                f"{len(roots)} nodes are at logits ({', '.join(roots) or 'none'}), but a "
                "hypothesis has one root, which is there"
            )
        self._check_reading(roots[0])
        self._check_halves()
        self._check_overlap()

    def _check_reading(self, root: str) -> None:
        try:
            cycle = nx.find_cycle(self.reading)
        except nx.NetworkXNoCycle:
            pass
        else:
            around = " -> ".join([*(reader for reader, _ in cycle), cycle[0][0]])
            raise ValueError(f"nodes read each other in a circle: {around}")
        unread = set(self.nodes) - nx.descendants(self.reading, root) - {root}
        if unread:
            first = next(name for name in self.nodes if name in unread)
            raise ValueError(
                f"node {first!r} is read by nothing that {root!r} depends on; add it to the "
                "`reads` of another, or leave it out"
            )

    def _check_halves(self) -> None:
        for name, claim in self.nodes.items():
            sides: dict[str, str] = {}  # port -> by which child
            for child, ports in (claim.reads or {}).items():
                other = self.nodes[child]
                if not other.half:
                    continue
                head, _ = split_reader(other.at[0])
                if claim.at != (head,) or ports not in ("qkv", other.half):
                    raise ValueError(
                        f"node {child!r} stands for what {head} reads ({other.at[0]}), so that "
                        f"only a node at {head} can read it, as {child}: all"
                    )
                sides.update(dict.fromkeys(other.half, child))
            for child, ports in (claim.reads or {}).items():
                own = self.nodes[child].half or ports
                if clash := [port for port in own if sides.get(port, child) != child]:
                    raise ValueError(
                        f"node {name!r} reads {child!r} through {clash[0]}, for which "
                        f"{sides[clash[0]]!r} stands altogether; let that one read it"
                    )

    def _check_overlap(self) -> None:
        """Refuses two nodes that are one part of the model."""
        taken: list[tuple[str, str, tuple[int, ...] | None]] = []
        for name, claim in self.nodes.items():
            for part in _parts(claim):
                for other, theirs, positions in taken:
                    apart = None not in (claim.positions, positions) and not set(
                        claim.positions or ()
                    ) & set(positions or ())
                    if theirs == part and not apart:
                        raise ValueError(
                            f"nodes {other!r} and {name!r} are both at {part}; one part of the "
                            "model belongs to one node, or to several at different positions"
                        )
                taken.append((name, part, claim.positions))

    @cached_property
    def reading(self) -> nx.DiGraph:
        """Which node reads which."""
        graph = nx.DiGraph()
        graph.add_nodes_from(self.nodes)
        graph.add_edges_from(
            (name, child) for name, claim in self.nodes.items() for child in claim.reads or ()
        )
        return graph

    @property
    def root(self) -> str:
        """The node at `logits`."""
        return next(name for name, claim in self.nodes.items() if claim.at == (LOGITS,))

    @cached_property
    def order(self) -> tuple[str, ...]:
        """The nodes, each after all that it reads."""
        return tuple(reversed(list(nx.topological_sort(self.reading))))

    def check(self, graph: Graph) -> None:
        """Raises ValueError where a model lacks a node, or a way from one to another."""
        for name, claim in self.nodes.items():
            for place in claim.at:
                _check_place(name, place, graph)
        for name, claim in self.nodes.items():
            for child, ports in (claim.reads or {}).items():
                for reader in _readers(claim, ports, graph):
                    for writer in self.nodes[child].at:
                        if "<" not in writer:
                            _check_way(name, child, writer, reader, graph)

    # ---- files -----------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> Hypothesis:
        """Reads a YAML or JSON file; ValueError, with the file's name, for what is wrong in it."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path} is no file; give the path of a hypothesis, in YAML or JSON")
        try:
            return cls.parse(path.read_text(encoding="utf-8-sig"), name=path.stem)
        except ValueError as error:  # UnicodeDecodeError is one
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def parse(cls, text: str, name: str = "hypothesis") -> Hypothesis:
        """Reads YAML or JSON; ValueError for what is wrong in it."""
        try:
            data = yaml.load(text, _Loader)
        except (yaml.YAMLError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f"line {mark.line + 1}: " if mark else ""
            problem = getattr(error, "problem", None) or "it is nested too deeply"
            raise ValueError(f"{where}no YAML or JSON: {problem}") from None
        if not isinstance(data, Mapping):
            raise ValueError(
                "a hypothesis is a mapping with `nodes`: {name: {at: ..., reads: ...}}"
            )
        return cls.from_json(data, name)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], name: str = "hypothesis") -> Hypothesis:
        """The hypothesis that `to_json` told."""
        _known("a hypothesis", data, ("name", "nodes"))
        nodes = data.get("nodes")
        if not isinstance(nodes, Mapping) or not nodes:
            raise ValueError("`nodes` must be a mapping {name: {at: ..., reads: ...}}")
        own = data.get("name", name)
        if not isinstance(own, str):
            raise ValueError(f"name={own!r} is no text")
        return cls(own, {_text(key, "a node's name"): _claim(key, nodes[key]) for key in nodes})

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which `from_json` makes it again."""
        names = {ports: name for name, ports in PORTS.items()}
        nodes = {}
        for name, claim in self.nodes.items():
            nodes[name] = {"at": list(claim.at), "feature": list(claim.feature)}
            if claim.positions is not None:
                nodes[name]["positions"] = list(claim.positions)
            if claim.reads is not None:
                reads = {key: names.get(ports, list(ports)) for key, ports in claim.reads.items()}
                nodes[name]["reads"] = reads
        return {"name": self.name, "nodes": nodes}


class _Loader(yaml.SafeLoader):
    """Plain YAML, with keys given twice refused."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key, _ in node.value:
        if (name := loader.construct_object(key)) in seen:  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(
                None, None, f"{name!r} is given twice", key.start_mark
            )
        seen.add(name)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _claim(name: str, data: Any) -> Claim:
    if not isinstance(data, Mapping):
        raise ValueError(f"node {name!r} is {data!r}, but it must say where it is: {{at: a1.h2}}")
    _known(f"node {name!r}", data, ("at", "feature", "positions", "reads"))
    if "at" not in data:
        raise ValueError(f"node {name!r} does not say where it is; give at=a1.h2, m0 or input")
    at = _texts(data["at"], f"node {name!r}: at")
    if len(at) > 1 and (others := [place for place in at if not _is_head(place)]):
        raise ValueError(
            f"node {name!r} is at {', '.join(at)}, but only heads can be one node together; give "
            f"{others[0]} a node of its own"
        )
    positions = data.get("positions")
    if positions is not None and (
        not isinstance(positions, Sequence)
        or not positions
        or any(type(position) is not int for position in positions)
    ):
        raise ValueError(
            f"node {name!r}: positions={positions!r}, but they are a list of whole numbers"
        )
    reads = data.get("reads")
    if reads is not None:
        if not isinstance(reads, Mapping):
            raise ValueError(
                f"node {name!r}: reads={reads!r}, but it must be a mapping {{node: all}} or "
                "{node: q}; {} says that nothing it reads matters"
            )
        reads = {
            _text(child, f"node {name!r}: reads"): _ports(name, reads[child]) for child in reads
        }
    feature = _texts(data.get("feature", "exact"), f"node {name!r}: feature")
    return Claim(at, feature, None if positions is None else tuple(positions), reads)


def _ports(name: str, given: Any) -> str:
    """The ports of a head, in order, that words name."""
    words = _texts(given, f"node {name!r}: reads")
    if unknown := [word for word in words if word not in PORTS]:
        raise ValueError(
            f"node {name!r} reads through {unknown[0]!r}, but the sides are {', '.join(PORTS)}"
        )
    ports = "".join(PORTS[word] for word in words)
    return "".join(port for port in "qkv" if port in ports)


def _known(what: str, data: Mapping, keys: tuple[str, ...]) -> None:
    if unknown := [key for key in data if key not in keys]:
        raise ValueError(f"{what} has {unknown[0]!r}, but knows only {', '.join(keys)}")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{what} is {value!r}, which is no text; put it in quotes")
    return value


def _texts(value: Any, what: str) -> tuple[str, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise ValueError(f"{what} is empty")
        return tuple(_text(part, what) for part in value)
    return (_text(value, what),)


def _is_head(place: str) -> bool:
    try:
        return parse_node(place).kind == "head"
    except ValueError:
        return False


def _parts(claim: Claim) -> list[str]:
    """What of the model a claim is about, a part for each port of a half."""
    if not claim.half:
        return list(claim.at)
    head, _ = split_reader(claim.at[0])
    return [reader_name(head, port) for port in claim.half]


def _check_place(name: str, place: str, graph: Graph) -> None:
    node, port = split_reader(place)
    known = node in graph.writer_index or place == LOGITS
    if known and (not port or (port in PORTS and port != "all" and _is_head(node))):
        return
    heads = f"{graph.n_layers} layers of {graph.n_heads} heads"
    mlps = "" if graph.attention_only else f", MLPs m0 to m{graph.n_layers - 1}"
    inputs = ", ".join(graph.writers[: graph.n_inputs])
    raise ValueError(
        f"node {name!r} is at {place!r}, which this model lacks; it has {heads}, such as a0.h0 and "
        f"a0.h0<q>{mlps}, {inputs} and logits"
    )


def _readers(claim: Claim, ports: str, graph: Graph) -> list[str]:
    """The readers through which a claim reads a child."""
    readers = []
    for place in claim.at:
        node, port = split_reader(place)
        if not _is_head(node):
            readers.append(node)
            continue
        head = parse_node(node)
        for side in PORTS[port] if port else ports:
            shared = side != "q" and graph.kv_group > 1
            own = f"a{head.layer}.kv{head.head // graph.kv_group}" if shared else node
            readers.append(reader_name(own, side))
    return readers


def _check_way(name: str, child: str, writer: str, reader: str, graph: Graph) -> None:
    if writer == LOGITS or (
        graph.writer_index[writer] >= graph.upstream[graph.reader_index[reader]]
    ):
        raise ValueError(
            f"node {name!r} reads {child!r}, but {writer} is computed after {reader} has been read"
        )
