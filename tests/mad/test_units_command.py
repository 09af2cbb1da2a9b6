"""Circuits of units by the command line: extracted, drawn, refused where detectors are wanted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from circuits import EAPIG, ModelConfig
from circuits.parts import UnitCircuit, UnitsConfig
from circuits.tasks.recall import Recall
from mad import RunConfig, make_run, make_unit_run
from mad.commands.main import main
from tests import dictionaries

COMMAND = (
    "extract model=recall_redirect task=recall method=eap_ig splits.discovery=24 "
    "splits.evaluation=24 splits.fit=8 splits.calibration=120 random_draws=2 accept_worse=true"
).split()


def extracted(out: Path, *words: str) -> int:
    return main([*COMMAND, *words, f"out={out}"])


def dictionary(folder: Path, width: int = 64) -> str:
    weights = {name: one.float() for name, one in dictionaries.exact(width).items()}
    metadata = dictionaries.at("blocks.0.hook_resid_post")
    return str(dictionaries.saved(folder, weights, metadata=metadata))


def test_nodes_are_extracted_and_drawn(tmp_path, capsys):
    out = tmp_path / "run"
    assert extracted(out, "units=nodes", "selection.units=6") == 0
    told = capsys.readouterr().out
    assert "nodes kept" in told and "6 of 11 (54.5%)" in told
    assert "none: one needs units=edges" in told
    assert sorted(path.name for path in out.iterdir()) == [
        "circuit.json",
        "config.yaml",
        "metrics.json",
        "scores.safetensors",
        "splits.json",
    ]
    assert json.loads((out / "metrics.json").read_text())["units_kept"] == 6
    assert len(UnitCircuit.load(out)) == 6
    assert main(["plot", f"circuit={out}", "formats=[svg]"]) == 0
    assert sorted(path.name for path in out.glob("*.*g")) == [
        "circuit.svg",
        "curve.png",
        "curve.svg",
    ]
    svg = (out / "circuit.svg").read_text()
    assert svg.count('id="unit:') == 6 and 'id="label:' not in svg
    capsys.readouterr()
    assert main(["plot", f"circuit={out}", "edges=3"]) == 1
    assert "is of units; per_row=N draws the strongest N" in capsys.readouterr().err
    inputs = tmp_path / "inputs.jsonl"
    inputs.write_text("{}\n")
    for words in (
        ["score", f"inputs={inputs}", f"out={tmp_path}/scored.jsonl"],
        ["fit", f"trusted={inputs}", f"calibration={inputs}", "detector=fast"],
    ):
        words = [*words, f"circuit={out}"]
        assert main(words) == 1
        error = capsys.readouterr().err
        assert (
            "its circuit is of units, but this needs one of edges" in error
            and error.count("\n") == 1
        )


def test_neurons_with_nodes_by_position(tmp_path):
    out = tmp_path / "run"
    words = ["units=neurons", "units.nodes=true", "positions=true", "selection.units=60"]
    assert extracted(out, *words) == 0
    circuit = UnitCircuit.load(out)
    assert len(circuit) == 60 and all("@" in name for name, _ in circuit.units)
    assert main(["plot", f"circuit={out}", "formats=[svg]", "per_row=4"]) == 0
    # glyphs are paths, but each text stands in a comment
    assert "with summed scores" in (out / "circuit.svg").read_text()


def test_features_of_a_dictionary(tmp_path, capsys):
    folder, out = dictionary(tmp_path / "d"), tmp_path / "run"
    words = ["units=features", f"units.dictionaries=[{folder}]"]
    assert extracted(out, *words, "check=true") == 0
    assert "129 units" in capsys.readouterr().out and not out.exists()
    assert extracted(out, *words, "selection.units=20") == 0
    circuit = UnitCircuit.load(out)
    assert {name.partition(".")[0] for name, _ in circuit.units} == {"r1"}
    assert circuit.about["of"]["unexplained"]["r1"] < 1e-6


REFUSED = {
    "units=features needs units.dictionaries=[FOLDER,...]": ["units=features"],
    "selection.edges=9, but the circuit is of units (nodes); give selection.units=9": [
        "units=nodes",
        "selection.edges=9",
    ],
    "selection.units=9, but the circuit is of edges": ["selection.units=9"],
    "no nothing/cfg.json: a dictionary is a folder": [
        "units=features",
        "units.dictionaries=[nothing]",
    ],
    "units.layers has 7, but the model's blocks are 0 to 1": ["units=neurons", "units.layers=[7]"],
    "unknown units preset 'neuron'; did you mean 'neurons'?": ["units=neuron"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, capsys, message):
    assert extracted(tmp_path / "run", *REFUSED[message]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_mask_over_edges_and_writers_has_no_units(tmp_path, capsys):
    assert extracted(tmp_path / "run", "units=nodes", "method=edge_pruning") == 1
    error = capsys.readouterr().err
    assert "method=edge_pruning finds circuits of edges only; use units=edges, or" in error


def test_a_dictionary_for_another_width_is_refused(tmp_path, capsys):
    folder = dictionary(tmp_path / "d", 12)
    assert extracted(tmp_path / "run", "units=features", f"units.dictionaries=[{folder}]") == 1
    assert "is for values of 12 numbers, but the model's" in capsys.readouterr().err


def test_each_kind_of_run_says_which_the_other_is():
    config = RunConfig(ModelConfig("x"), Recall(), EAPIG(), out="x")
    with pytest.raises(ValueError, match="units=edges makes a circuit of edges; use make_run"):
        make_unit_run(config)
    config.units = UnitsConfig("nodes")
    with pytest.raises(ValueError, match="detectors read edges; use make_unit_run or units=edges"):
        make_run(config)
