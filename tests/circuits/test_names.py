"""The grammar of names: what is written is read back, and nothing else is a name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuits.names import (
    INPUT,
    INPUT_PARTS,
    LOGITS,
    EdgeName,
    Node,
    edge_name,
    head_name,
    key_value_name,
    mlp_name,
    parse_edge,
    parse_node,
    reader_name,
    split_reader,
)

numbers = st.integers(0, 200)
heads = st.builds(head_name, numbers, numbers)
mlps = st.builds(mlp_name, numbers)
writers = st.one_of(st.sampled_from([INPUT, *INPUT_PARTS]), heads, mlps)
readers = st.one_of(
    st.tuples(heads, st.sampled_from("qkv")),
    st.tuples(st.builds(key_value_name, numbers, numbers), st.sampled_from("kv")),
    st.tuples(st.one_of(mlps, st.just(LOGITS)), st.just("")),
)


@given(writers, readers, st.none() | numbers)
def test_edges_are_read_as_they_are_written(writer, reader, position):
    name = edge_name(writer, reader_name(*reader), position)
    edge = parse_edge(name)
    assert edge == EdgeName(writer, *reader, position)
    assert edge_name(edge.writer, edge.reader, edge.position) == name
    assert split_reader(edge.reader) == reader


def test_names_are_those_of_the_field():
    assert parse_edge("a0.h3->a1.h2<q>@5") == EdgeName("a0.h3", "a1.h2", "q", 5)
    assert parse_edge("input.token->a1.kv2<k>") == EdgeName("input.token", "a1.kv2", "k", None)
    assert parse_edge("m10->logits") == EdgeName("m10", "logits", "", None)


@pytest.mark.parametrize(
    ("name", "node"),
    [
        ("input", Node("input")),
        ("input.position", Node("input")),
        ("a3.h12", Node("head", 3, 12)),
        ("a3.kv1", Node("kv", 3, 1)),
        ("m7", Node("mlp", 7)),
        ("logits", Node("logits")),
    ],
)
def test_nodes(name, node):
    assert parse_node(name) == node


@pytest.mark.parametrize(
    "name", ["", "a1", "a1.h", "a01.h0", "m-1", "m1 ", "input.mask", "a0.h1<q>"]
)
def test_what_is_no_node_is_refused(name):
    with pytest.raises(ValueError, match=re.escape(f"{name!r} is no node")):
        parse_node(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", "input", "m0->", "->m0", "m0-m1", "m0->m1->m2", "logits->m0", "a0.kv1->m0"),
        *(
            "input->a0.h1",
            "input->a0.h1<w>",
            "input->a0.kv1<q>",
            "input->m0<q>",
            "input->logits<v>",
        ),
        *(
            "input->m0@",
            "input->m0@-1",
            "input->m0@01",
            "input->m0@1@2",
            "a0.h0<q>->m0",
            "m0->m1\n",
        ),
    ],
)
def test_what_is_no_edge_is_refused(name):
    with pytest.raises(ValueError, match="is not of the form writer->reader, such as a0.h3->"):
        parse_edge(name)


def test_names_need_no_torch():
    script = "import sys, circuits.names; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
