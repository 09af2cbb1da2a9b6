"""`madcap evaluate`: the prompts of a run made again, its figures on disk, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest

from circuits.circuit import Circuit
from circuits.files import read_json
from circuits.graph import Graph
from circuits.prompts import write_jsonl
from mad.commands.main import main
from mad.folder import open_run
from mad.known_models import known_models
from mad.run_prompts import run_prompts
from mad.trusted import load_trusted
from tests.mad.test_scoring import records, run  # noqa: F401

LITTLE = ("random_draws=2", "knockouts=1", "minimality=2", "redraws=1")


@pytest.fixture
def own(run, tmp_path):  # noqa: F811
    """A copy of a run folder."""
    return shutil.copytree(run[0] / "run", tmp_path / "own")


def evaluate(folder, *words: str) -> int:
    return main(["evaluate", f"circuit={folder}", *LITTLE, *words])


def refused(capsys, folder, *words: str) -> str:
    capsys.readouterr()
    assert evaluate(folder, *words) in (1, 2)
    error = capsys.readouterr().err
    errors = [line for line in error.splitlines() if line.startswith("madcap evaluate: error: ")]
    assert len(errors) == 1
    return errors[0]


def test_an_evaluation_is_measured_on_the_runs_own_prompts_and_written_beside_them(own, capsys):
    assert evaluate(own) == 0
    told, metrics = read_json(own / "evaluation.json"), read_json(own / "metrics.json")
    assert told["faithfulness"] == pytest.approx(metrics["faithfulness"])
    assert told["areas"]["cpr"]["value"] == pytest.approx(metrics["areas"]["cpr"]["value"])
    about = read_json(own / "circuit.json")
    assert told["prompts"] == about["splits"]["evaluation"] and about["metric"] == told["metric"]
    assert told["stability"]["redraws"] == 1
    assert all((own / f"evaluation.{form}").stat().st_size > 1000 for form in ("png", "svg"))
    shown = capsys.readouterr().out
    for figure in ("faithfulness", "NDF", "CPR", "CMD over log size", "Jaccard", "below noise"):
        assert figure in shown


def test_an_evaluation_is_not_overwritten_unless_that_is_wanted(own, capsys):
    (own / "evaluation.json").write_text("mine")
    assert "overwrite=true replaces it" in refused(capsys, own)
    assert (own / "evaluation.json").read_text() == "mine"
    assert evaluate(own, "overwrite=true") == 0
    assert read_json(own / "evaluation.json")["metric"] == "kl"


def test_other_prompts_leave_out_those_that_the_circuit_was_found_on(own, run, tmp_path, caplog):  # noqa: F811
    opened = open_run(own)
    discovery = run_prompts(opened).discovery
    assert discovery is not None and len(discovery) == 16
    file = tmp_path / "others.jsonl"
    write_jsonl([*records(60, 0), *records(10, 7)], file)
    both = run_prompts(opened, str(file))
    assert len(both.evaluation) == 54 and not both.evaluation.overlap(discovery)
    assert both.discovery is not None and both.discovery.hash() == discovery.hash()
    assert f"16 prompts of {file} are left out: the circuit was found on them" in caplog.text
    write_jsonl(records(10, 7), file)
    others = run_prompts(opened, str(file))
    assert len(others.evaluation) == 10 and others.discovery is not None
    assert others.discovery.hash() == discovery.hash()  # made again from the task


def test_a_known_circuit_is_a_run_or_a_graph_file(own, tmp_path, capsys):
    assert evaluate(own, f"against={own}", "redraws=0") == 0
    told = read_json(own / "evaluation.json")["against"]
    assert told["edges"]["precision"] == told["edges"]["recall"] == 1
    other = Graph(3, 2)
    Circuit(other, other.exists, other.exists.float()).save(tmp_path / "known")
    error = refused(capsys, own, f"against={tmp_path / 'known'}", "overwrite=true")
    assert f"against={tmp_path / 'known'}: the circuit is of another graph: 3 layers" in error
    assert "no circuit at" in refused(capsys, own, "against=nowhere", "overwrite=true")


def test_one_prompt_is_too_few(own, tmp_path, capsys):
    write_jsonl(records(1, 7), tmp_path / "one.jsonl")
    error = refused(capsys, own, f"trusted={tmp_path / 'one.jsonl'}")
    assert "1 prompts to evaluate on, but standard errors need at least 2" in error


def test_prompts_without_corrupt_ones_are_refused(own, tmp_path, capsys):
    write_jsonl([{"clean": r["clean"]} for r in records(9, 7)], tmp_path / "bare.jsonl")
    assert "corrupt" in refused(capsys, own, f"trusted={tmp_path / 'bare.jsonl'}")


def test_only_prompts_that_found_the_circuit_are_refused(own, tmp_path, capsys):
    opened = open_run(own)
    discovery = run_prompts(opened).discovery
    assert discovery is not None
    found_on = {sequence for sequence in discovery.sequences()}
    same = [record for record in records(60, 0) if tuple(record["clean"]) in found_on]
    write_jsonl(same, tmp_path / "same.jsonl")
    error = refused(capsys, own, f"trusted={tmp_path / 'same.jsonl'}")
    assert "the circuit was found on all 16 prompts of" in error


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "splits.json").unlink(), "splits.json"),
        (lambda folder: (folder / "splits.json").write_text("[1]"), "cannot be read"),
        (lambda folder: changed(folder, task=None), "names no task that its prompts could be"),
        (lambda folder: changed(folder, seed="x"), "seed is 'x', but it must be a whole number"),
        (lambda folder: changed(folder, metric="none"), "metric='none', but the metrics are"),
    ],
)
def test_a_run_folder_that_does_not_say_on_what_is_refused(own, capsys, break_it, message):
    break_it(own)
    assert message in refused(capsys, own)
    assert not (own / "evaluation.json").exists()


def changed(folder, **fields) -> None:
    data = read_json(folder / "circuit.json") | fields
    (folder / "circuit.json").write_text(json.dumps(data))


def test_prompts_that_are_gone_are_told_and_others_can_stand_in(own, run, tmp_path, capsys):  # noqa: F811
    few = tmp_path / "few.jsonl"
    write_jsonl(records(60, 0)[:20], few)
    changed(own, task={"name": "file", "path": str(few)})
    with known_models().open("a") as sink:
        sink.write(json.dumps(str(few)) + "\n")
    error = refused(capsys, own)
    assert "can be made again from its task; give trusted=FILE" in error
    write_jsonl(records(10, 7), tmp_path / "others.jsonl")
    others = f"trusted={tmp_path / 'others.jsonl'}"
    assert "redraws=1 needs the prompts that the circuit was found on" in refused(
        capsys, own, others
    )
    assert evaluate(own, others, "redraws=0") == 0
    assert read_json(own / "evaluation.json")["stability"] is None


def test_a_prompt_file_that_the_user_has_not_named_is_not_read(own, tmp_path, capsys):
    secret = tmp_path / "secret.jsonl"
    secret.write_text("not for others\n")
    changed(own, task={"name": "file", "path": str(secret)})
    error = refused(capsys, own)
    assert "which has not been given to madcap on this machine" in error and "not for" not in error


def test_prompts_with_other_twins_are_warned_of(own, run, tmp_path, caplog):  # noqa: F811
    other = tmp_path / "twins.jsonl"
    write_jsonl([{**r, "corrupt": r["corrupt"][::-1]} for r in records(60, 0)], other)
    changed(own, task={"name": "file", "path": str(other)})
    with known_models().open("a") as sink:
        sink.write(json.dumps(str(other)) + "\n")
    assert len(run_prompts(open_run(own)).evaluation) == 16
    assert "have other corrupt twins, answers or labels than when" in caplog.text


def test_a_circuit_file_alone_names_no_prompts(own, capsys):
    assert "give the run folder that" in refused(capsys, own / "circuit.json")


def test_all_prompts_of_the_run_are_those_it_says(run):  # noqa: F811
    opened = open_run(run[0] / "run")
    prompts = run_prompts(opened)
    everything = load_trusted(records(60, 0), opened.model)
    assert prompts.discovery is not None
    assert len(prompts.evaluation) == len(prompts.discovery) == 16
    assert not prompts.evaluation.overlap(prompts.discovery)
    assert everything.overlap(prompts.evaluation) == 16
