"""Beside a peer: what is written for it, its process, and that the same work is compared.

The peer itself is not here.  A stand-in that knows only the folder and the requests answers by this
project's own engine, so that every figure of agreement has to be perfect.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from circuits.ablation import AblationConfig, fit_ablation
from circuits.discovery import ACDC, EAP, EAPIG, acdc, eap, eap_ig
from circuits.engine import Engine
from circuits.graph import Graph
from circuits.metrics import metric_named
from circuits.model.load import from_module
from circuits.objective import prepare
from circuits.prompts import Prompts, prompts_from_records
from mad.benchmark import peers
from mad.benchmark.peers import Comparison, compare_with_peer, table_rows
from mad.benchmark.peers_exchange import PeerProcess, peer_edges, write_exchange
from mad.benchmark.peers_side import in_order
from mad.benchmark.peers_work import circuits_agree, logits_agree, scores_agree
from mad.benchmark.speed import random_model, random_prompts
from mad.commands.main import main

SHAPE = replace(peers.SHAPE, layers=2, heads=2, width=16, vocabulary=20, batch=4, positions=5)


def own_name(edge: str) -> str:
    """The name here of an edge of the peer's, told apart by another way than the one tested."""
    edge = edge.replace("Resid Start", "input").replace("Resid End", "logits")
    edge = re.sub(r"MLP (\d+)", r"m\1", edge)
    edge = re.sub(r"A(\d+)\.(\d+)\.([QKV])", lambda m: f"a{m[1]}.h{m[2]}<{m[3].lower()}>", edge)
    return re.sub(r"A(\d+)\.(\d+)", r"a\1.h\2", edge)


class StandIn(PeerProcess):
    """Does what a peer is asked for, from nothing but what was written for it."""

    versions = {"auto-circuit": "a stand-in"}

    def __init__(self, python: str, folder: Path, *, threads: int) -> None:
        from transformers import GPT2LMHeadModel

        settings = json.loads((folder / "settings.json").read_text())
        records = json.loads((folder / "prompts.json").read_text())["prompts"]
        assert settings["threads"] == threads and settings["prompts"] == len(records)
        module = GPT2LMHeadModel.from_pretrained(folder / "model").eval()
        self.engine = Engine(from_module(module))
        self.prompts = prompts_from_records(records, vocabulary=module.config.vocab_size)
        self.edges = [self.engine.graph.edge_index(own_name(edge)) for edge in settings["edges"]]

    def close(self) -> None:
        pass

    def ask(self, work: str, **arguments):
        return {"seconds": 1.0, **getattr(self, work)(**arguments)}

    def objective(self, metric: str):
        ablation = fit_ablation(AblationConfig("counterfactual"), self.engine, self.prompts)
        return prepare(self.engine, self.prompts, metric_named(metric), ablation)

    def forward(self):
        return {"logits": (7.0 + self.engine.logits(self.prompts)[:, -1]).tolist()}

    def masked(self, kept):
        mask = torch.zeros(self.engine.graph.exists.shape)
        for edge, share in zip(self.edges, kept):
            mask[edge] = share
        (batch,) = self.objective("kl").batches
        return {"logits": self.engine.masked(self.prompts, mask, batch.ablated)[:, -1].tolist()}

    def scored(self, scores):
        return {"scores": [float(scores[edge]) for edge in self.edges]}

    def eap(self):
        return self.scored(eap(EAP(), self.objective("logit_diff")).scores)

    def integrated(self, steps):
        return self.scored(eap_ig(EAPIG(steps=steps), self.objective("logit_diff")).scores)

    def acdc(self, tau):
        return self.scored(acdc(ACDC(tau=tau), self.objective("kl")).kept)

    def training_step(self):
        return {}


def test_the_same_work_is_compared(monkeypatch):
    monkeypatch.setattr(peers, "PeerProcess", StandIn)
    versions, comparisons = compare_with_peer("python", replace(SHAPE, rounds=1), thresholds=[0.01])
    assert versions == StandIn.versions
    found = {each.work: each for each in comparisons}
    differences = [
        value
        for each in comparisons
        for name, value in each.agreement.items()
        if name == "log-probabilities differ by"
    ]
    assert len(differences) == 3 and max(differences) < 1e-5
    assert found["EAP, all edges"].agreement["rank correlation"] > 0.999
    assert found["EAP-IG, 5 steps"].agreement["rank correlation"] > 0.999
    sweep = found["ACDC, tau 0.01"].agreement
    assert 0 < sweep["edges"] == sweep["peer's edges"] < 100 and sweep["Jaccard"] == 1
    assert found["plain forward"].peer_forwards == found["plain forward"].bridge_forwards == 1
    bare = found["plain forward, bare module"]
    assert bare.peer_seconds is None and bare.ratio is None and bare.module_forwards == 1
    both = [each for each in comparisons if each.peer_seconds and each.seconds]
    assert len(both) == 7 and all(each.ratio == 1 / each.seconds for each in both)


def test_the_folder_holds_data_only(tmp_path):
    module, model = random_model(SHAPE, 0)
    prompts = random_prompts(SHAPE, 0)
    graph = Engine(model).graph
    write_exchange(tmp_path, module, prompts, graph, threads=3)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert weights and all(
        torch.equal(weights[name], module.state_dict()[name]) for name in weights
    )
    (first, *_) = json.loads((tmp_path / "prompts.json").read_text())["prompts"]
    assert prompts.corrupt is not None
    assert first["clean"] == prompts.clean[0].tolist()
    assert first["corrupt"] == prompts.corrupt[0].tolist()
    assert (first["answers"], first["wrong_answers"]) == ([1], [2])


def test_edges_are_named_one_for_one():
    graph = Graph(n_layers=3, n_heads=2)
    names = [own_name(edge) for edge in peer_edges(graph)]
    assert [graph.edge_index(name) for name in names] == graph.sweep_order()
    graph = Graph(n_layers=3, n_heads=2, attention_only=True)
    assert not any("MLP" in edge for edge in peer_edges(graph))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"clean": [3, 4, 5]}, {"clean": [3, 4]}], "prompts of one length"),
        ([{"clean": [3, 4, 5], "positions": [1], "answers": [[1]]}], "scored at the last token"),
        ([{"clean": [3, 4, 5]}], "the prompts have no corrupt"),
        ([{"clean": [3, 4, 5], "corrupt": [4, 4, 5]}], "the prompts have no answers"),
    ],
)
def test_what_the_peer_cannot_take_is_refused(tmp_path, records, message):
    module, model = random_model(SHAPE, 0)
    prompts: Prompts = prompts_from_records(records, vocabulary=SHAPE.vocabulary)
    with pytest.raises(ValueError, match=message):
        write_exchange(tmp_path, module, prompts, Engine(model).graph, threads=1)


def test_a_sides_edges_have_to_be_the_same():
    edges = [SimpleNamespace(name="A0.0->MLP 0"), SimpleNamespace(name="odd")]
    with pytest.raises(ValueError, match=r"2 edges, but 1 were named; they differ by \['odd'\]"):
        in_order(edges, ["A0.0->MLP 0"])


# ---- the process ---------------------------------------------------------------------------------

SIDE = """
import json, sys
print("a library's greeting", file=sys.stderr)
print(json.dumps({"versions": {"folder": sys.argv[1]}}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["work"] == "fail":
        raise KeyError("no such edge")
    print(json.dumps({"seconds": 0.5, **request}), flush=True)
"""


@pytest.fixture
def side(tmp_path) -> Path:
    path = tmp_path / "side.py"
    path.write_text(SIDE)
    return path


def test_requests_are_answered_in_turn(tmp_path, side):
    with PeerProcess(sys.executable, tmp_path, side=side) as peer:
        assert peer.versions == {"folder": str(tmp_path)}
        assert [peer.ask("acdc", tau=tau)["tau"] for tau in (0.5, 0.25)] == [0.5, 0.25]
    assert peer.process.returncode == 0


def test_a_peer_that_fails_is_told_by_its_last_words(tmp_path, side):
    with PeerProcess(sys.executable, tmp_path, side=side) as peer:
        with pytest.raises(OSError, match="ended with 1: KeyError: 'no such edge'"):
            peer.ask("fail")
        with pytest.raises(OSError, match="KeyError"):
            peer.ask("acdc", tau=0.5)


def test_an_environment_without_the_peers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No module named 'auto_circuit'.*make bench-peers"):
        PeerProcess(sys.executable, tmp_path)


def test_no_environment_is_refused_in_one_line(capsys):
    assert main(["bench", "suite=peers", "peers=no/such/python", "threads=1"]) == 1
    (line,) = capsys.readouterr().err.strip().split("\n")[-1:]
    assert "peers=no/such/python is no Python that can be run; `make bench-peers`" in line


# ---- agreement and the table ---------------------------------------------------------------------


def test_disagreement_is_told():
    ours = torch.tensor([[0.0, 1.0]])
    told = logits_agree({"logits": [[1.0, 0.0]]}, ours)["log-probabilities differ by"]
    assert told == pytest.approx(1.0)
    assert scores_agree({"scores": [3.0, 2.0, 1.0]}, torch.tensor([1.0, 2.0, 3.0])) == {
        "rank correlation": pytest.approx(-1.0)
    }
    shared = circuits_agree({"scores": [1.0, 0.0, 1.0]}, torch.tensor([1.0, 1.0, 0.0]))
    assert shared == {"edges": 2, "peer's edges": 2, "Jaccard": pytest.approx(1 / 3)}


def test_what_one_side_does_not_do_is_left_empty():
    (row,) = table_rows([Comparison("training", 0.08, None, 11.5, None, None)])
    assert row == ("training", "80.00", "", "", "11.50", "", "", "")
