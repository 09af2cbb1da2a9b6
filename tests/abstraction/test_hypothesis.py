"""Hypotheses as files, and what is wrong with them."""

from __future__ import annotations

import json

import pytest

from abstraction.hypothesis import Hypothesis
from circuits.graph import Graph

INDUCTION = """
name: induction
nodes:
  output: {at: logits, reads: {induction head: all}}
  induction head: {at: a1.h0, feature: answer, reads: {previous: k, last: q, tokens: v}}
  previous: {at: [a0.h2, a0.h3], feature: [parity, "token@0"], positions: [1, 2], reads: {}}
  last: {at: input, positions: [-1], feature: token@-1}
  tokens: {at: input, positions: [0, 1, 2]}
"""
GROUPED = Graph(2, 4, 2)


def test_a_hypothesis_is_the_same_after_a_round_trip(tmp_path):
    hypothesis = Hypothesis.parse(INDUCTION)
    for name, text in (("a.yaml", INDUCTION), ("a.json", json.dumps(hypothesis.to_json()))):
        (tmp_path / name).write_text(text)
        assert Hypothesis.load(tmp_path / name) == hypothesis
    assert hypothesis.root == "output" and hypothesis.order[-1] == "output"
    assert hypothesis.nodes["previous"].reads == {} and hypothesis.nodes["last"].reads is None
    assert hypothesis.nodes["tokens"].feature == ("exact",)
    hypothesis.check(Graph(2, 4))
    hypothesis.check(GROUPED)


def with_nodes(**nodes: str) -> str:
    lines = {
        "output": "{at: logits, reads: {head: all}}",
        "head": "{at: a1.h0}",
        **nodes,
    }
    return "nodes:\n" + "".join(f"  {name}: {text}\n" for name, text in lines.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodes: [", "line 1: no YAML or JSON"),
        ("[" * 3000, "no YAML or JSON"),
        ("!!python/object/apply:os.system [ls]", "no YAML or JSON: could not determine"),
        ("3", "a hypothesis is a mapping"),
        ("{nodes: {}}", "`nodes` must be a mapping"),
        ("{nodes: {a: {at: logits}}, edges: 3}", "a hypothesis has 'edges', but knows only"),
        ("nodes:\n  a: {at: logits}\n  a: {at: m0}", "line 3: .*'a' is given twice"),
        ("nodes: {no: {at: logits}}", "a node's name is False, which is no text"),
        ("nodes: {a: m0}", "node 'a' is 'm0', but it must say where it is"),
        ("nodes: {a: {reads: {}}}", "node 'a' does not say where it is"),
        ("nodes: {a: {at: logits, read: {}}}", "node 'a' has 'read', but knows only at, feature"),
        ("nodes: {a: {at: logits, reads: [b]}}", "reads=.*must be a mapping"),
        (with_nodes(head="{at: a1.h0, positions: 3}"), "positions=3, but they are a list"),
        (with_nodes(head="{at: [m0, m1]}"), "only heads can be one node together"),
        (with_nodes(output="{at: logits, reads: {head: w}}"), "through 'w', but the sides are q"),
        (with_nodes(output="{at: logits, reads: {hed: all}}"), "'hed', which is no node of this"),
        (with_nodes(second="{at: logits}"), "2 nodes are at logits"),
        ("nodes: {a: {at: m0}}", "0 nodes are at logits"),
        (with_nodes(lost="{at: m0}"), "node 'lost' is read by nothing that 'output' depends on"),
        (
            with_nodes(head="{at: a1.h0, reads: {b: q}}", b="{at: a0.h0, reads: {head: q}}"),
            "in a circle: head -> b -> head",
        ),
        (
            with_nodes(head="{at: a1.h0, reads: {b: q, c: k}}", b="{at: m0}", c="{at: m0}"),
            "nodes 'b' and 'c' are both at m0",
        ),
        (
            with_nodes(output="{at: logits, reads: {head: all, b: all}}", b="{at: a1.h0<q>}"),
            "node 'b' stands for what a1.h0 reads",
        ),
        (
            with_nodes(
                head="{at: a1.h0, reads: {b: all, c: k}}", b="{at: a1.h0<pattern>}", c="{at: m0}"
            ),
            "reads 'c' through k, for which 'b' stands altogether",
        ),
    ],
)  # fmt: skip
def test_what_is_no_hypothesis_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Hypothesis.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (with_nodes(head="{at: a5.h0}"), "'head' is at 'a5.h0', which this model lacks; it has 2"),
        (
            with_nodes(head="{at: m1, reads: {b: all}}", b="{at: m1<q>}"),
            "'m1<q>', which this model lacks",
        ),
        (
            with_nodes(head="{at: a0.h0, reads: {b: q}}", b="{at: m1}"),
            "node 'head' reads 'b', but m1 is computed after a0.h0<q> has been read",
        ),
        (
            with_nodes(head="{at: a1.h3, reads: {b: v}}", b="{at: a1.h0}"),
            "a1.h0 is computed after a1.kv1<v> has been read",
        ),
    ],
)  # fmt: skip
def test_what_a_model_lacks_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Hypothesis.parse(text).check(GROUPED)


def test_files_are_named_in_errors(tmp_path):
    with pytest.raises(ValueError, match=r"none.yaml is no file; give the path of a hypothesis"):
        Hypothesis.load(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"bad\.yaml: "):
        Hypothesis.load(tmp_path / "bad.yaml")
