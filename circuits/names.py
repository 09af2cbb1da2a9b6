"""One grammar of names, those of EAP-IG (Hanna et al. 2024, arXiv 2403.17806) and MIB.

    node     input, input.token, input.position, a0.h3, a1.kv2 (keys and values of a group of
             heads), m1, logits
    reader   a node's name, with a port where it reads more than once: a1.h2<q>, a1.kv2<k>, m1
    edge     writer->reader, and @position where positions are told apart: a0.h3->a1.h2<q>@5
    unit     what a mask may act on besides edges: a node that writes, or a part of one or of the
             residual stream: m1.n37 (a neuron), m1.f12, r3.f12 (features), r3.error; and @position

Which of these exist in a given model is the business of `circuits.graph`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

INPUT, LOGITS = "input", "logits"
INPUT_PARTS = ("input.token", "input.position")

Kind = Literal["input", "head", "kv", "mlp", "logits"]

_NUMBER = "(0|[1-9][0-9]*)"  # no leading zeros: one thing has one name
_NODES: dict[Kind, str] = {
    "input": r"input(?:\.token|\.position)?",
    "head": rf"a{_NUMBER}\.h{_NUMBER}",
    "kv": rf"a{_NUMBER}\.kv{_NUMBER}",
    "mlp": f"m{_NUMBER}",
    "logits": "logits",
}
_EDGE = re.compile(
    "(?P<writer>{input}|{head}|{mlp})->"
    "(?P<node>{head}(?=<)|{kv}(?=<[kv])|{mlp}(?!<)|{logits}(?!<))(?:<(?P<port>[qkv])>)?"
    "(?:@(?P<position>{number}))?".format(number=_NUMBER, **_NODES)
)
_UNIT = re.compile(
    "(?:(?P<input>input)|a(?P<block>{number})\\.h(?P<head>{number})|"
    "(?P<at>[mr])(?P<layer>{number})(?:\\.(?P<part>[nf])(?P<number>{number})|\\.(?P<error>error))?)"
    "(?:@(?P<position>{number}))?".format(number="(?:0|[1-9][0-9]*)")
)
UnitKind = Literal["input", "head", "mlp", "neuron", "feature", "error"]


@dataclass(frozen=True)
class Node:
    """What a node's name says; `layer` and `head` are 0 where it says nothing."""

    kind: Kind
    layer: int = 0
    head: int = 0


@dataclass(frozen=True)
class EdgeName:
    """An edge's name taken apart; `node` and `port` are its reader's."""

    writer: str
    node: str  # several readers, such as a head's q, k and v, share one
    port: str  # "q", "k", "v", or "" where a node reads once
    position: int | None

    @property
    def reader(self) -> str:
        return reader_name(self.node, self.port)


@dataclass(frozen=True)
class UnitName:
    """A unit's name taken apart; `layer` and `number` are 0 where it says nothing."""

    name: str  # without its position
    kind: UnitKind
    site: str  # a0, m1, r3 or input
    layer: int
    number: int  # of the head, neuron or feature
    position: int | None


def head_name(layer: int, head: int) -> str:
    """Return the name of an attention head, such as `a0.h3`."""
    return f"a{layer}.h{head}"


def key_value_name(layer: int, head: int) -> str:
    """Return the name of a key-value head that a group of query heads shares, such as `a1.kv2`."""
    return f"a{layer}.kv{head}"


def mlp_name(layer: int) -> str:
    """Return the name of an MLP, such as `m1`."""
    return f"m{layer}"


def reader_name(node: str, port: str = "") -> str:
    """Return the name of a node's reader at a port, such as `a1.h2<q>`."""
    return f"{node}<{port}>" if port else node


def edge_name(writer: str, reader: str, position: int | None = None) -> str:
    """Return the name of an edge, such as `a0.h3->a1.h2<q>@5`."""
    return f"{writer}->{reader}" + ("" if position is None else f"@{position}")


def parse_node(name: str) -> Node:
    """Return what a node's name says; raises ValueError for the name of none.

    >>> parse_node("a0.h3")
    Node(kind='head', layer=0, head=3)
    """
    for kind, pattern in _NODES.items():
        if match := re.fullmatch(pattern, name):
            return Node(kind, *map(int, match.groups()))
    raise ValueError(f"{name!r} is no node; nodes look like input, a0.h3, a0.kv1, m0 or logits")


def split_reader(reader: str) -> tuple[str, str]:
    """Return the node and the port of a reader: `a1.h2<q>` gives `a1.h2` and `q`, `m1` no port."""
    node, _, port = reader.partition("<")
    return node, port.removesuffix(">")


def parse_edge(name: str) -> EdgeName:
    """Return an edge's name taken apart; raises ValueError for one of another form.

    >>> parse_edge("a0.h3->a1.h2<q>@5")
    EdgeName(writer='a0.h3', node='a1.h2', port='q', position=5)
    """
    match = _EDGE.fullmatch(name)
    if match is None:
        raise ValueError(
            f"edge {name!r} is not of the form writer->reader, such as a0.h3->a1.h2<q> or "
            "m0->logits"
        )
    position = None if match["position"] is None else int(match["position"])
    return EdgeName(match["writer"], match["node"], match["port"] or "", position)


def parse_unit(name: str) -> UnitName:
    """Return a unit's name taken apart; raises ValueError for one of another form.

    >>> parse_unit("r3.f12@5")
    UnitName(name='r3.f12', kind='feature', site='r3', layer=3, number=12, position=5)
    """
    match = _UNIT.fullmatch(name)
    kind = None if match is None else _unit_kind(match)
    if match is None or kind is None or (kind == "neuron" and match["at"] == "r"):
        raise ValueError(
            f"{name!r} is no unit; units look like input, a0.h3, m1, m1.n37, m1.f12, r3.f12 or "
            "r3.error"
        )
    own, _, position = name.partition("@")
    layer = int(match["layer"] or match["block"] or 0)
    number = int(match["number"] or match["head"] or 0)
    site = own.partition(".")[0]
    return UnitName(own, kind, site, layer, number, int(position) if position else None)


def _unit_kind(match: re.Match[str]) -> UnitKind | None:
    """What a unit's name is the name of; None for a residual stream as a whole."""
    if match["input"] or match["block"]:
        return "input" if match["input"] else "head"
    if match["part"] or match["error"]:
        return "error" if match["error"] else "neuron" if match["part"] == "n" else "feature"
    return "mlp" if match["at"] == "m" else None
