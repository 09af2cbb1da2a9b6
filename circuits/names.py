"""One grammar of names, those of EAP-IG (Hanna et al. 2024, arXiv 2403.17806) and MIB.

    node     input, input.token, input.position, a0.h3, a1.kv2 (keys and values of a group of
             heads), m1, logits
    reader   a node's name, with a port where it reads more than once: a1.h2<q>, a1.kv2<k>, m1
    edge     writer->reader, and @position where positions are told apart: a0.h3->a1.h2<q>@5

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
