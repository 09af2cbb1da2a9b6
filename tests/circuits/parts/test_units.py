"""Units by name and by index, and circuits of them on disk."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from circuits.circuit import Circuit
from circuits.graph import Graph
from circuits.names import parse_unit
from circuits.parts import Site, UnitCircuit, Units, load_circuit

SITES = (
    Site("input"),
    Site("residual_features", 0, 2),
    Site("heads", 0, 3),
    Site("neurons", 0, 11),
    Site("heads", 1, 3),
    Site("mlp", 1),
    Site("residual_features", 2, 12),
    Site("mlp_features", 2, 5),
)
UNITS = {"plain": Units(SITES), "by position": Units(SITES, 4)}


@pytest.mark.parametrize("name", UNITS)
def test_every_unit_has_one_name(name):
    units = UNITS[name]
    names = [units.part_name(*index) for index in units.exists.nonzero().tolist()]
    assert len(set(names)) == len(names) == units.n_parts
    assert [units.index(one) for one in names] == [
        tuple(index) for index in units.exists.nonzero().tolist()
    ]
    assert [parse_unit(one).site for one in names if "error" in one][:1] == ["r0"]
    assert Units.from_json(json.loads(json.dumps(units.to_json()))) == units


STRANGERS = (
    "r0.f2 r0 r0.n0 a0.h3 a0 m0 m0.f0 m0.n11 m1.n0 m1.f0 m1.error m2 r1.f0 input.token m00.n1 "
    "m0.n01 a0.h0@0 A0.h0 m0.n1.f2 m0.error logits"
).split()


@pytest.mark.parametrize(
    "name", [*STRANGERS, "", " input", "m0.n1 ", "m0.n-1", "m0.n" + 5000 * "9"]
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError):
        UNITS["plain"].index(name)


@pytest.mark.parametrize("name", ["m0.n1", "m0.n1@4", "m0.n1@-1", "m0.n1@"])
def test_units_by_position_need_one_that_there_is(name):
    with pytest.raises(ValueError):
        UNITS["by position"].index(name)


MISSHAPEN = {
    "there is no site": lambda: Units(()),
    "n_positions=0, but units per position need": lambda: Units(SITES, 0),
    "m1 is divided twice": lambda: Units((Site("neurons", 1, 4), Site("mlp", 1))),
    "layer=-1 of heads": lambda: Site("heads", -1, 3),
    "count=0 of neurons": lambda: Site("neurons", 0, 0),
    "a site of kind 'edges', but they are input, heads": lambda: Site("edges"),  # type: ignore
    "units .at all positions., more than": lambda: Units((Site("neurons", 0, 2**27),), 4),
}


@pytest.mark.parametrize("message", [name for name in MISSHAPEN if "kind" not in name])
def test_misshapen_units_are_refused(message):
    with pytest.raises(ValueError, match=message):
        MISSHAPEN[message]()


# ---- circuits ------------------------------------------------------------------------------------


def circuit(name: str = "plain") -> UnitCircuit:
    units = UNITS[name]
    scores = torch.randn(units.shape, generator=torch.Generator().manual_seed(0))
    about = {"task": {"name": "pronoun"}, "method": {"name": "eap"}, "metric": "kl"}
    return UnitCircuit(units, scores > 0.5, scores, about)


@pytest.mark.parametrize("name", UNITS)
def test_a_circuit_comes_back_from_disk(tmp_path, name):
    ours = circuit(name)
    ours.save(tmp_path / "run")
    for read in (
        UnitCircuit.load(tmp_path / "run"),
        load_circuit(tmp_path / "run" / "circuit.json"),
    ):
        assert isinstance(read, UnitCircuit)
        assert (read.space, read.about, read.units) == (ours.space, ours.about, ours.units)
        assert torch.equal(read.kept, ours.kept) and torch.equal(read.scores, ours.scores)
    (tmp_path / "run" / "scores.safetensors").unlink()
    alone = UnitCircuit.load(tmp_path / "run")
    assert torch.equal(alone.scores, ours.scores * ours.kept)


def test_positions_are_summed_over():
    ours = circuit("by position")
    whole = ours.over_positions
    for unit, name in enumerate(whole.space.part_name(unit) for unit in range(whole.space.n_units)):
        kept = [score for one, score in ours.units if one.startswith(f"{name}@")]
        assert bool(whole.kept[unit]) == bool(kept)
        assert whole.scores[unit].item() == pytest.approx(sum(kept), abs=1e-6)


def test_circuits_of_edges_and_of_units_are_told_apart(tmp_path):
    circuit().save(tmp_path / "units")
    graph = Graph(1, 1)
    Circuit(graph, graph.exists, graph.exists.float()).save(tmp_path / "edges")
    assert isinstance(load_circuit(tmp_path / "edges"), Circuit)
    with pytest.raises(ValueError, match="its circuit is of units, but this needs one of edges"):
        Circuit.load(tmp_path / "units")
    with pytest.raises(ValueError, match="it lacks 'space'"):
        UnitCircuit.load(tmp_path / "edges")
    with pytest.raises(FileNotFoundError, match="no circuit at"):
        load_circuit(tmp_path / "nothing")
    (tmp_path / "units" / "circuit.json").write_text("{")
    with pytest.raises(ValueError, match="is no circuit file that can be read"):
        load_circuit(tmp_path / "units")


def test_scores_that_are_not_finite_are_not_saved(tmp_path):
    ours = circuit()
    ours.scores[ours.kept.nonzero()[0, 0]] = float("nan")
    with pytest.raises(ValueError, match="unit .* has score nan; scores must be finite"):
        ours.save(tmp_path / "run")


CHANGES = {
    "it has format 2": {"format": 2},
    "it lacks 'format'": {"format": None},
    "space tells no sites": {"space": []},
    "space.n_heads is unknown": {"space": {"sites": [], "n_heads": 3}},
    "space.n_positions is '4'": {"space": {"sites": [{"kind": "input"}], "n_positions": "4"}},
    r"space.sites\[0\].kind is 'x'": {"space": {"sites": [{"kind": "x"}]}},
    r"space.sites\[0\].count is 1.5": {"space": {"sites": [{"kind": "input", "count": 1.5}]}},
    "there is no site": {"space": {"sites": []}},
    "more than the 268435456": {"space": {"sites": [{"kind": "neurons", "count": 2**40}]}},
    "unit 'm7.n1' is none of the": {"units": [{"unit": "m7.n1", "score": 1.0}]},
    "unit 'input' is there twice": {"units": 2 * [{"unit": "input", "score": 1.0}]},
    "has score inf": {"units": [{"unit": "input", "score": float("inf")}]},
    "it lacks 'score'": {"units": [{"unit": "input"}]},
    "not subscriptable": {"units": [3]},
}


@pytest.mark.parametrize("message", CHANGES)
def test_broken_files_are_refused(tmp_path, message):
    circuit().save(tmp_path)
    told = json.loads((tmp_path / "circuit.json").read_text()) | CHANGES[message]
    told = {name: value for name, value in told.items() if value is not None}
    (tmp_path / "circuit.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=message) as refused:
        UnitCircuit.load(tmp_path)
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_scores_that_disagree_are_refused(tmp_path):
    ours = circuit()
    ours.save(tmp_path)
    first = ours.units[0][0]
    save_file({"scores": ours.scores + 1}, tmp_path / "scores.safetensors")
    with pytest.raises(ValueError, match=f"says that {first} scores .* kept units differ"):
        UnitCircuit.load(tmp_path)
    save_file({"scores": ours.scores[:3]}, tmp_path / "scores.safetensors")
    with pytest.raises(ValueError, match=r"has shape \(3,\)"):
        UnitCircuit.load(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from("sites kind layer count unit score".split()), inner)
    ),
    max_leaves=6,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.dictionaries(st.sampled_from(["format", "space", "units", "method"]), JSON))
def test_whatever_a_file_says_it_is_read_or_refused(tmp_path, changes):
    circuit().save(tmp_path)
    told = json.loads((tmp_path / "circuit.json").read_text())
    (tmp_path / "circuit.json").write_text(json.dumps({**told, **changes}))
    try:
        load_circuit(tmp_path)
    except ValueError as error:
        assert "\n" not in str(error)
