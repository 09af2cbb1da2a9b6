"""A circuit on disk and as a graph."""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from circuits.circuit import Circuit
from circuits.gates import OVER, gate_shapes
from circuits.graph import Graph
from circuits.mask_distribution import MaskDistribution

GRAPH = Graph(2, 2, 1)
KEPT = ["input->a0.h1<q>", "input->a0.kv0<v>", "a0.h1->m0", "m0->logits", "a0.h1->logits"]
ABOUT = {
    "model": {"path": "memory", "weight_hash": "00ff"},
    "method": {"name": "acdc", "tau": 0.01},
    "metric": "kl",
}


def circuit() -> Circuit:
    kept, scores = torch.zeros_like(GRAPH.exists), torch.zeros(GRAPH.exists.shape)
    for number, name in enumerate(KEPT):
        kept[GRAPH.edge_index(name)] = True
        scores[GRAPH.edge_index(name)] = (-1) ** number * (number + 1) / 7
    scores[GRAPH.edge_index("input->m1")] = 0.03  # judged, but not kept
    return Circuit(GRAPH, kept, scores, ABOUT)


def same(one: Circuit, other: Circuit) -> bool:
    tensors = torch.equal(one.kept, other.kept) and torch.equal(one.scores, other.scores)
    return tensors and one.graph == other.graph and dict(one.about) == dict(other.about)


# ---- round trip ----------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**31),
    share=st.floats(0, 1),
    exponent=st.floats(-30, 30),
    graph=st.sampled_from(
        [GRAPH, Graph(1, 1, attention_only=True), Graph(2, 2, parallel=True, split_input=True)]
    ),
)
def test_saved_and_loaded_is_the_same_to_the_bit(tmp_path_factory, seed, share, exponent, graph):
    folder = tmp_path_factory.mktemp("circuit")
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(graph.exists.shape, generator=generator) * 10**exponent * graph.exists
    kept = graph.exists & (torch.rand(graph.exists.shape, generator=generator) < share)
    saved = Circuit(graph, kept, scores, ABOUT)
    saved.save(folder)
    assert same(Circuit.load(folder), saved)
    assert same(Circuit.load(folder / "circuit.json"), saved)
    (
        folder / "scores.safetensors"
    ).unlink()  # the scores of kept edges are in the JSON as well, exactly
    assert same(Circuit.load(folder), Circuit(graph, kept, scores * kept, ABOUT))


def test_circuit_json_on_disk(tmp_path, file_regression):
    circuit().save(tmp_path)
    file_regression.check((tmp_path / "circuit.json").read_text(), extension=".json")


def test_a_folder_is_made_and_holds_no_pickle(tmp_path):
    folder = tmp_path / "runs" / "first"
    circuit().save(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["circuit.json", "scores.safetensors"]
    json.loads((folder / "circuit.json").read_text())
    assert list(load_file(folder / "scores.safetensors")) == ["scores"]
    for path in folder.iterdir():
        content = path.read_bytes()
        assert not zipfile.is_zipfile(path) and content[:1] != b"\x80", (
            "the two ways in which torch and pickle save"
        )


def test_scores_that_json_cannot_hold_are_refused(tmp_path):
    bad = circuit()
    bad.scores[GRAPH.edge_index(KEPT[0])] = math.nan
    with pytest.raises(ValueError, match="input->a0.h1<q>"):
        bad.save(tmp_path)
    assert not list(tmp_path.iterdir()), "half a circuit was written"


# ---- views ---------------------------------------------------------------------------------------


def test_edges_length_and_mask():
    ours = circuit()
    assert len(ours) == len(KEPT)
    assert [name for name, _ in ours.edges] == sorted(KEPT, key=GRAPH.edge_index)
    assert dict(ours.edges)["a0.h1->m0"] == pytest.approx(3 / 7)
    assert torch.equal(ours.mask, ours.kept.float())


def test_networkx_view_carries_the_scores():
    edges = {
        (writer, node, key): data["score"]
        for writer, node, key, data in circuit().networkx().edges(keys=True, data=True)
    }
    expected = {
        ("input", "a0.h1", "a0.h1<q>"): 1 / 7,
        ("input", "a0.h0", "a0.kv0<v>"): -2
        / 7,  # both query heads read through this key-value head
        ("input", "a0.h1", "a0.kv0<v>"): -2 / 7,
        ("a0.h1", "m0", "m0"): 3 / 7,
        ("m0", "logits", "logits"): -4 / 7,
        ("a0.h1", "logits", "logits"): 5 / 7,
    }
    assert edges == pytest.approx(expected)


def test_it_says_how_many_edges_it_keeps_and_how_they_were_found():
    assert repr(circuit()) == "Circuit(5 of 36 edges, method=acdc, metric=kl)"
    resampled = replace(circuit(), about={**ABOUT, "ablation": {"name": "resample", "seed": 0}})
    assert repr(resampled) == "Circuit(5 of 36 edges, method=acdc, metric=kl, ablation=resample)"
    assert repr(replace(circuit(), about={})) == "Circuit(5 of 36 edges)"


# ---- bad files -----------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A saved circuit, and a way to write a changed circuit.json."""
    circuit().save(tmp_path)
    data = json.loads((tmp_path / "circuit.json").read_text())

    def write(**changes):
        (tmp_path / "circuit.json").write_text(json.dumps({**data, **changes}))
        return tmp_path

    return write


def test_a_missing_circuit_says_how_to_make_one(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "circuit.json"):
        with pytest.raises(FileNotFoundError, match="no circuit at .*madcap extract"):
            Circuit.load(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", "{}", '"circuit"', '{"format": 1}', "\x80\x04K\x01."]
)
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "circuit.json").write_text(text)
    with pytest.raises(ValueError, match="is no circuit file that can be read"):
        Circuit.load(tmp_path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_formats_are_refused_by_number(saved, version):
    with pytest.raises(ValueError, match=f"has format {version}, but this version reads format 1"):
        Circuit.load(saved(format=version))


def test_a_later_format_is_named_even_where_its_layout_is_another(saved):
    with pytest.raises(ValueError, match="has format 2, but this version reads format 1"):
        Circuit.load(saved(format=2, graph={"layers": 2}))


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([{"edge": "input->a7.h0<q>", "score": 1.0}], "'input->a7.h0<q>' is not in this graph"),
        ([{"edge": "m1->m0", "score": 1.0}], "'m1->m0' runs backwards"),
        ([{"edge": "m0->logits"}], "is no circuit file that can be read"),
        ([{"score": 1.0}], "is no circuit file that can be read"),
        (["m0->logits"], "is no circuit file that can be read"),
        ([{"edge": "m0->logits", "score": None}], "is no circuit file that can be read"),
        ([{"edge": 3, "score": 1.0}], "is no circuit file that can be read"),
        (5, "is no circuit file that can be read"),
    ],
)
def test_edges_that_the_graph_lacks_and_broken_entries_are_refused(saved, edges, message):
    with pytest.raises(ValueError, match=message):
        Circuit.load(saved(edges=edges))


@pytest.mark.parametrize(
    "graph", [{}, {"n_layers": 2}, {"n_layers": 2, "n_heads": 2, "n_experts": 4}, "graph", None]
)
def test_another_graph_is_refused(saved, graph):
    with pytest.raises(ValueError, match="is no circuit file that can be read"):
        Circuit.load(saved(graph=graph))


def test_scores_of_another_shape_are_refused(tmp_path, saved):
    save_file({"scores": torch.zeros(3, 4)}, tmp_path / "scores.safetensors")
    with pytest.raises(ValueError, match=r"has shape \(3, 4\), but the graph of .* is \(11, 7\)"):
        Circuit.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"not tensors at all"])
def test_a_broken_scores_file_is_refused(tmp_path, saved, content):
    (tmp_path / "scores.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="scores.safetensors holds no scores"):
        Circuit.load(tmp_path)


def test_a_scores_file_without_scores_is_refused(tmp_path, saved):
    save_file({"other": torch.zeros(11, 7)}, tmp_path / "scores.safetensors")
    with pytest.raises(ValueError, match="scores.safetensors holds no scores"):
        Circuit.load(tmp_path)


# ---- edited and hostile files --------------------------------------------------------------------


def edited(path, **scores):
    """Changes scores of kept edges in circuit.json, as one does in an editor."""
    data = json.loads(path.read_text())
    for number, score in scores.items():
        data["edges"][int(number.removeprefix("edge"))]["score"] = score
    path.write_text(json.dumps(data))


def test_an_edited_score_is_refused_with_both_values_and_the_remedy(tmp_path):
    circuit().save(tmp_path)
    edited(tmp_path / "circuit.json", edge1=0.5)
    name = circuit().edges[1][0]
    with pytest.raises(ValueError) as error:
        Circuit.load(tmp_path)
    message = str(error.value)
    assert f"circuit.json says that {name} scores 0.5" in message
    assert "scores.safetensors says -0.285714 (1 of 5 kept edges differ)" in message
    assert "delete scores.safetensors" in message and "\n" not in message
    (tmp_path / "scores.safetensors").unlink()  # the remedy works
    again = Circuit.load(tmp_path)
    assert dict(again.edges)[name] == 0.5
    assert again.scores[GRAPH.edge_index("input->m1")] == 0


def test_an_edited_tensor_file_is_refused_as_well(tmp_path):
    circuit().save(tmp_path)
    scores = load_file(tmp_path / "scores.safetensors")["scores"]
    scores[GRAPH.edge_index("m0->logits")] += 1e-6
    save_file({"scores": scores}, tmp_path / "scores.safetensors")
    with pytest.raises(ValueError, match="says that m0->logits scores .*1 of 5 kept edges differ"):
        Circuit.load(tmp_path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e39", "1" + "0" * 400])
def test_scores_that_float32_cannot_hold_are_refused(saved, number):
    folder = saved(edges=[{"edge": "m0->logits", "score": "NUMBER"}])
    path = folder / "circuit.json"
    path.write_text(path.read_text().replace('"NUMBER"', number))
    with pytest.raises(ValueError, match="edge 'm0->logits' has score .*; scores must be finite"):
        Circuit.load(folder)


def test_an_edge_that_is_there_twice_is_refused(saved):
    edges = [{"edge": "m0->logits", "score": score} for score in (0.1, 0.2)]
    with pytest.raises(ValueError, match="edge 'm0->logits' is there twice"):
        Circuit.load(saved(edges=edges))


@pytest.mark.parametrize(
    "graph",
    [
        {"n_layers": 10**9, "n_heads": 10**9},
        {"n_layers": 1000, "n_heads": 64},
        {"n_layers": 2, "n_heads": 2, "n_positions": 10**9},
    ],
)
def test_a_graph_that_nobody_could_hold_is_refused_before_it_is_built(saved, graph):
    with pytest.raises(ValueError, match="more than the 2147483648 pairs that can be held"):
        Circuit.load(saved(graph=graph))


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ({"n_layers": "2", "n_heads": 2}, "graph.n_layers is '2', but it must be int"),
        ({"n_layers": 2.0, "n_heads": 2}, "graph.n_layers is 2.0, but it must be int"),
        ({"n_layers": 2, "n_heads": 2, "n_experts": 4}, "graph.n_experts is unknown"),
    ],
)
def test_a_graph_of_other_fields_is_refused_by_name(saved, graph, message):
    with pytest.raises(ValueError, match=message):
        Circuit.load(saved(graph=graph))


def test_deep_nesting_is_refused(tmp_path):
    (tmp_path / "circuit.json").write_text('{"format": 1, "graph": ' + "[" * 100_000)
    with pytest.raises(ValueError, match="nested too deep"):
        Circuit.load(tmp_path)


@pytest.mark.parametrize("name", ["circuit.json", "scores.safetensors"])
def test_a_file_that_is_a_link_out_of_the_folder_is_not_read(tmp_path, name):
    folder = tmp_path / "run"
    circuit().save(folder)
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a link to .*, which is not in the folder"):
        Circuit.load(folder)
    if name == "circuit.json":  # unless the user names it
        assert same(
            Circuit.load(tmp_path / name),
            replace(circuit(), scores=circuit().scores * circuit().kept),
        )


def test_without_room_for_all_scores_the_circuit_is_there(tmp_path, monkeypatch):
    import circuits.circuit as module

    def full(path, tensors):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(module, "write_tensors", full)
    with pytest.raises(OSError, match="No space left on device"):
        circuit().save(tmp_path)
    assert Circuit.load(tmp_path).edges == circuit().edges


# ---- trained masks -------------------------------------------------------------------------------


def learned(over: str = "edges_and_nodes") -> Circuit:
    generator = torch.Generator().manual_seed(0)
    gates = {
        name: torch.randn(shape, generator=generator) + 2
        for name, shape in gate_shapes(GRAPH, over).items()
    }
    return replace(circuit(), trained=MaskDistribution(GRAPH, "hard_concrete", over, gates))


@pytest.mark.parametrize("over", OVER)
def test_a_trained_mask_is_saved_and_loaded_to_the_bit(tmp_path, over):
    saved = learned(over)
    saved.save(tmp_path)
    again = Circuit.load(tmp_path)
    assert same(again, saved) and again.trained is not None and saved.trained is not None
    assert (again.trained.kind, again.trained.over) == ("hard_concrete", over)
    assert list(again.trained.gates) == list(saved.trained.gates)
    for name, theta in saved.trained.gates.items():
        assert torch.equal(again.trained.gates[name], theta)
    drawn, expected = again.sample(4, seed=1), saved.sample(4, seed=1)
    assert len({own.hash() for own in drawn}) > 1
    assert [own.hash() for own in drawn] == [own.hash() for own in expected]
    drawn[0].save(tmp_path / "drawn")
    assert Circuit.load(tmp_path / "drawn").about["sample"] == {"seed": 1, "draw": 0}


def test_a_circuit_without_trained_mask_has_nothing_to_draw_from(tmp_path):
    with pytest.raises(
        ValueError, match=r"no trained mask to draw from \(method='acdc'\): find it"
    ):
        circuit().sample(1, seed=0)
    learned().save(tmp_path)
    (tmp_path / "scores.safetensors").unlink()
    assert Circuit.load(tmp_path).trained is None


@pytest.mark.parametrize(
    "spoil",
    [
        {"log_alpha.edge": torch.zeros(3, 4)},
        {"log_alpha.edge": None},
        {"log_alpha.writer": torch.full((1, 7), math.inf)},
        {"log_alpha.writer": torch.zeros(1, 7, dtype=torch.int32)},
        {"log_alpha.neuron": torch.zeros(2)},
    ],
)
def test_a_tampered_mask_is_refused(tmp_path, spoil):
    learned().save(tmp_path)
    path = tmp_path / "scores.safetensors"
    tensors = {**load_file(path), **spoil}
    save_file({name: own for name, own in tensors.items() if own is not None}, path)
    with pytest.raises(
        ValueError, match="scores.safetensors holds no mask of trained_mask in"
    ) as told:
        Circuit.load(tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "mask",
    [
        None,
        3,
        [],
        {},
        {"kind": "window"},
        {"kind": "gauss", "over": "edges"},
        {"kind": ["window"], "over": "edges"},
        {"kind": "window", "over": {"a": 1}},
    ],
)
def test_a_tampered_description_of_a_mask_is_refused(tmp_path, mask):
    learned().save(tmp_path)
    path = tmp_path / "circuit.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "trained_mask": mask}))
    if mask is None:
        assert Circuit.load(tmp_path).trained is None
        return
    with pytest.raises(ValueError, match="holds no mask of trained_mask in"):
        Circuit.load(tmp_path)
