"""The circuit's picture: every edge, where dot put it, the same each run; bad input is refused."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuits.plot import draw_circuit
from circuits.plot.circuit import circuit_figure, edge_style
from circuits.plot.layout import lay_out, parse_edges, strengths

SMALL = [
    ("input->a0.h0<q>", 0.4),
    ("input->a0.h0<k>", -0.2),
    ("input->a0.h0<v>", 0.1),
    ("input->m0", 0.05),
    ("a0.h0->m0", -0.3),
    ("a0.h0->a1.h2<v>", 0.6),
    ("m0->a1.h2<q>", 0.02),
    ("a1.h2->logits", 0.9),
    ("m0->logits", -0.01),
]
BESIDE = [  # with SMALL: two heads side by side in both layers, and an edge that passes by
    ("input->a0.h1<v>", 0.3),
    ("a0.h1->a1.h2<k>", 0.5),
    ("a0.h0->a1.h3<q>", -0.1),
    ("a1.h3->logits", 0.2),
    ("input->logits", 0.2),
]
GROUPED = [
    ("input->a0.h5<q>", 0.5),
    ("input->a0.kv1<k>", 0.4),
    ("input->a0.kv1<v>", -0.4),
    ("input->a0.kv0<v>", 0.1),
    ("a0.h5->logits", 1.0),
]


def two_layer_circuit(heads: int, count: int) -> list[tuple[str, float]]:
    readers = [f"a1.h{head}<{port}>" for head in range(heads) for port in "qkv"] + ["m1", "logits"]
    names = [f"a0.h{head}->{reader}" for head in range(heads) for reader in readers]
    return [(name, math.sin(1 + index)) for index, name in enumerate(names[:count])]


def ids(svg: Path) -> set[str]:
    return {element.get("id", "") for element in ElementTree.parse(svg).iter()}


def test_every_edge_node_and_port_has_an_id(tmp_path):
    (svg,) = draw_circuit(
        SMALL, tmp_path, formats=["svg"], title="Induction", caption="9 of 110 edges"
    )
    found = ids(svg)
    assert {name for name in found if name.startswith("edge:")} == {
        f"edge:{name}" for name, _ in SMALL
    }
    nodes = {"input", "a0.h0", "m0", "a1.h2", "logits"}
    assert {name for name in found if name.startswith("node:")} == {
        f"node:{node}" for node in nodes
    }
    ports = {"a0.h0<q>", "a0.h0<k>", "a0.h0<v>", "a1.h2<q>", "a1.h2<v>"}
    assert {name for name in found if name.startswith("port:")} == {
        f"port:{port}" for port in ports
    }
    assert {f"row:{row}" for row in ("embed", "attn 0", "mlp 0", "attn 1", "logits")} <= found
    assert {"title", "caption"} <= found


def test_all_formats_are_the_same_bytes_again_whatever_the_order(tmp_path):
    first = draw_circuit(SMALL, tmp_path / "a", title="Induction", caption="9 of 110 edges")
    again = draw_circuit(SMALL[::-1], tmp_path / "b", title="Induction", caption="9 of 110 edges")
    assert [path.name for path in first] == ["circuit.svg", "circuit.png", "circuit.pdf"]
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.suffix
    assert first[0].read_bytes() != draw_circuit(SMALL[1:], tmp_path / "c")[0].read_bytes()


def test_the_callers_plot_style_neither_matters_nor_changes(tmp_path):
    import matplotlib

    plain = draw_circuit(SMALL, tmp_path / "plain", formats=["svg"])[0].read_bytes()
    with matplotlib.rc_context(
        {"lines.linewidth": 9, "font.size": 30, "axes.facecolor": "black", "savefig.dpi": 10}
    ):
        before = dict(matplotlib.rcParams)
        styled = draw_circuit(SMALL, tmp_path / "styled", formats=["svg"])[0].read_bytes()
        assert dict(matplotlib.rcParams) == before
    assert styled == plain


def test_importing_is_lazy_and_drawing_needs_no_pyplot(tmp_path):
    script = (
        "import sys; from pathlib import Path; import circuits.plot\n"
        "assert 'torch' not in sys.modules\n"
        "from circuits.plot import draw_circuit, draw_positions, draw_faithfulness_curve\n"
        "assert not {'matplotlib', 'pygraphviz'} & set(sys.modules)\n"
        f"draw_circuit([('input->logits', 1.0)], Path({str(tmp_path)!r}))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[3])


@pytest.mark.parametrize("count", [1, 12, 60, 150])
def test_sizes(tmp_path, count):
    edges = two_layer_circuit(8, count)
    (svg,) = draw_circuit(edges, tmp_path, formats=["svg"])
    assert {f"edge:{name}" for name, _ in edges} <= ids(svg)


def test_an_empty_circuit_shows_its_two_ends_and_says_so(tmp_path):
    svg, png, pdf = draw_circuit([], tmp_path, caption="0 of 110 edges")
    assert {"node:input", "node:logits"} <= ids(svg)
    assert "<!-- no edges kept -->" in svg.read_text()
    assert png.stat().st_size > 1000 and pdf.stat().st_size > 1000


def test_split_input_is_two_nodes(tmp_path):
    edges = [
        ("input.token->a0.h0<q>", 1.0),
        ("input.position->a0.h0<k>", 1.0),
        ("a0.h0->logits", 1.0),
    ]
    layout = lay_out(parse_edges(edges))
    assert {"input.token", "input.position"} <= set(layout.nodes) and "input" not in layout.nodes
    assert layout.nodes["input.token"][1] == layout.nodes["input.position"][1]


# --- layout ---------------------------------------------------------------------------------------


def test_layout_of_a_small_circuit(num_regression):
    layout = lay_out(parse_edges(SMALL + BESIDE))
    coordinates = {node: list(position) for node, position in layout.nodes.items()}
    # Other builds of Graphviz may round otherwise; half a point cannot be seen.
    num_regression.check(coordinates, default_tolerance={"atol": 0.5, "rtol": 0})


def test_rows_are_layers_from_input_to_logits():
    layout = lay_out(parse_edges(SMALL + GROUPED[1:3]), kv_group=4)
    assert list(layout.rows) == ["embed", "k v 0", "attn 0", "mlp 0", "attn 1", "logits"]
    assert list(layout.rows.values()) == sorted(layout.rows.values())
    for node, row in {
        "input": "embed",
        "a0.kv1": "k v 0",
        "a0.h0": "attn 0",
        "m0": "mlp 0",
        "logits": "logits",
    }.items():
        assert layout.nodes[node][1] == pytest.approx(layout.rows[row], abs=1e-6)


def test_curves_rise_from_writer_to_port_and_no_two_are_the_same():
    layout = lay_out(parse_edges(SMALL))
    assert len(set(layout.edges.values())) == len(SMALL)
    for edge in parse_edges(SMALL):
        points = layout.edges[edge.name]
        assert len(points) % 3 == 1
        assert (
            points[0][1] > layout.nodes[edge.writer][1]
            and points[-1][1] < layout.nodes[edge.node][1]
        )
    ends = [
        layout.edges[f"input->a0.h0<{port}>"][-1][0] - layout.nodes["a0.h0"][0] for port in "qkv"
    ]
    assert ends == pytest.approx([-14, 0, 14], abs=1e-3)


def test_the_layout_encloses_every_node_and_curve():
    layout = lay_out(parse_edges(two_layer_circuit(8, 150)))
    points = [point for curve in layout.edges.values() for point in curve] + list(
        layout.nodes.values()
    )
    assert all(-1e-6 <= x <= layout.width + 1e-6 for x, _ in points)
    assert all(0 <= y <= layout.height for _, y in layout.nodes.values())


# --- grouped queries ------------------------------------------------------------------------------


def test_key_value_heads_stand_below_the_query_heads_they_serve(tmp_path):
    layout = lay_out(parse_edges(GROUPED), kv_group=4)
    assert set(layout.links) == {
        ("a0.kv1", "a0.h5")
    }  # a0.kv0 serves h0..h3, and none is in the picture
    assert layout.nodes["a0.kv1"][1] < layout.nodes["a0.h5"][1]
    (svg,) = draw_circuit(GROUPED, tmp_path, formats=["svg"], kv_group=4)
    assert {"link:a0.kv1->a0.h5", "edge:input->a0.kv1<k>", "port:a0.kv1<v>", "node:a0.kv0"} <= ids(
        svg
    )


def test_key_value_heads_without_a_group_size_are_refused(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"a0\.kv0 is a key-value head, but kv_group=1; pass the model's query heads",
    ):
        draw_circuit(GROUPED, tmp_path)


# --- refusals -------------------------------------------------------------------------------------


def test_too_many_edges_are_refused_with_number_bound_and_remedy(tmp_path):
    message = (
        r"has 12 edges, .* maximum_edges=11; draw its strongest .*edges=300.*or raise maximum_edges"
    )
    with pytest.raises(ValueError, match=message):
        draw_circuit(two_layer_circuit(4, 12), tmp_path, maximum_edges=11)
    assert draw_circuit(two_layer_circuit(4, 12), tmp_path, maximum_edges=12, formats=["svg"])


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(tmp_path, score):
    with pytest.raises(ValueError, match=r"edge 'input->m0' has score (nan|-?inf).*must be finite"):
        draw_circuit([("input->m0", score)], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "input",
        "input->",
        "->m0",
        "a0.h0->a1.h1",
        "a0.h0->a1.h1<z>",
        "a0->m0",
        "input->m0<q>",
        "input->a0.kv1<q>",
    ]
    + [
        "logits->m0",
        "input->logits<q>",
        "input->a0.h0<q>x",
        "a0.h0<q>->m0",
        "a0.kv1->m0",
        "input->input",
    ],
)
def test_names_that_are_no_edge_are_refused(name):
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        parse_edges([(name, 1.0)])


@pytest.mark.parametrize("name", ["m0->a0.h1<q>", "a1.h0->a1.h1<q>", "a2.h0->m1", "m3->m3"])
def test_edges_that_do_not_run_upwards_are_refused(name):
    with pytest.raises(ValueError, match="does not run to a later layer"):
        parse_edges([(name, 1.0)])


def test_edges_of_one_position_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"'input->m0@3' is of one position.*edges_over_positions"):
        parse_edges([("input->m0@3", 1.0)])


def test_an_edge_given_twice_is_refused():
    with pytest.raises(ValueError, match="'input->m0' is given twice"):
        parse_edges([("input->m0", 1.0), ("input->m0", 2.0)])


def test_unknown_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'\.gif' is none of \.svg, \.png, \.pdf"):
        draw_circuit(SMALL, tmp_path, formats=["svg", "gif"])
    assert not list(tmp_path.iterdir())


# --- strength -------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=50))
def test_strengths_lie_in_the_unit_interval_and_keep_the_order(scores):
    strength, top = strengths(scores)
    assert all(0 <= size <= 1 for size in strength) and top <= max(map(abs, scores))
    ordered = sorted(zip(map(abs, scores), strength, strict=True))
    assert all(a[1] <= b[1] for a, b in pairwise(ordered))


def test_one_huge_edge_does_not_fade_the_others():
    calm, _ = strengths([1.0] * 20 + [2.0])
    robust, top = strengths([1.0] * 20 + [1e6])
    assert top == 10 and robust[-1] == 1
    assert robust[0] == pytest.approx(math.sqrt(0.1)) and calm[0] == pytest.approx(math.sqrt(0.5))


def test_strengths_without_contrast_are_middling():
    assert strengths([]) == ([], 0.0)
    assert strengths([0.0, 0.0]) == ([0.5, 0.5], 0.0)
    assert strengths([1.0, -1.0]) == ([0.5, 0.5], 1.0)


def test_colour_is_sign():
    colours = [edge_style(score, 0.5)["color"] for score in (3.0, 0.1, -0.1, -3.0, 0.0)]
    assert colours[0] == colours[1] and colours[2] == colours[3] and len(set(colours)) == 3


# ---- groups of nodes -----------------------------------------------------------------------------


def test_nodes_of_a_group_have_its_colour_and_all_others_that_of_their_kind(tmp_path):
    groups = {"a0.h0": "previous token", "a1.h2": "induction", "a9.h9": "not drawn"}
    drawn = parse_edges(SMALL)
    plain, grouped = (circuit_figure(drawn, lay_out(drawn), groups=own) for own in (None, groups))
    before, after = (
        {patch.get_gid(): patch.get_facecolor() for patch in figure.axes[0].patches}
        for figure in (plain, grouped)
    )
    changed = {name for name in before if name and before[name] != after[name]}
    assert changed == {"node:a0.h0", "node:a1.h2"}
    assert after["node:a0.h0"] != after["node:a1.h2"]
    told = {text.get_text() for text in grouped.axes[0].texts}
    assert {"previous token", "induction"} <= told and "not drawn" not in told
    assert told - {text.get_text() for text in plain.axes[0].texts} == set(groups.values()) & told


def test_more_groups_than_colours_are_refused(tmp_path):
    edges = [(f"a0.h{head}->logits", 1.0) for head in range(8)]
    groups = {f"a0.h{head}": f"role {head}" for head in range(8)}
    with pytest.raises(ValueError, match="8 groups, but there are 7 colours .* give fewer"):
        draw_circuit(edges, tmp_path, formats=["svg"], groups=groups)
