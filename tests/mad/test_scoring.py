"""Streaming: order, bad lines, resuming, refusals; and the whole way from extraction to a scored
file.
"""

from __future__ import annotations

import json

import pytest
import torch

import mad.scoring as scoring_module
from circuits.ablation import AblationConfig
from circuits.discovery import EAPIG
from circuits.engine.memory import footprint
from circuits.model.load import ModelConfig
from circuits.prompts import prompts_from_records
from circuits.selection import Selection
from circuits.tasks.file import File
from mad.attribution import explanation_bytes
from mad.calibration import fit
from mad.detector import Context
from mad.detectors import Deviation
from mad.folder import open_run
from mad.pipeline import RunConfig, make_run
from mad.scoring import Scoring, read_results, score
from mad.trusted import Splits
from tests import tiny

ALPHA = 0.2


def records(count: int, seed: int) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(29, (count, 2, 6), generator=generator).tolist()
    return [
        {"clean": c, "corrupt": x, "answers": [c[0]], "wrong_answers": [(c[0] + 1) % 29]}
        for c, x in rows
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tiny.gpt2_module().save_pretrained(folder / "model")
    (folder / "trusted.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records(60, 0)))
    config = RunConfig(
        model=ModelConfig(path=str(folder / "model")),
        task=File(path=str(folder / "trusted.jsonl")),
        method=EAPIG(),
        ablation=AblationConfig(),
        metric="kl",
        selection=Selection(edges=25),
        splits=Splits(16, 16, 8, 16),
        alpha=ALPHA,
        random_draws=2,
        out=str(folder / "run"),
    )
    make_run(config)
    return folder, config


def inputs(folder, count: int = 37):
    """A file with bad lines of every kind among good ones."""
    lines = [
        json.dumps({"clean": r["clean"], "id": f"n{i}"}) for i, r in enumerate(records(count, 1))
    ]
    lines[3] = "{not json"
    lines[5] = json.dumps({"clean": [1, 2, 99]})
    lines[8] = json.dumps({"clean": [1] * 17})
    lines[9] = json.dumps({"text": "no tokenizer here"})
    lines[10] = ""
    lines[11] = "[1, 2]"
    lines[20] = json.dumps({"clean": [1, 2], "id": 20, "answers": "ignored when scoring"})
    path = folder / "inputs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def opened(run):
    folder, config = run
    again = open_run(folder / "run")
    return again, again.detector("fast")


def test_a_file_is_scored_line_by_line_in_order(run, tmp_path):
    again, calibrated = opened(run)
    scoring = Scoring(alpha=ALPHA, chunk=8)
    tally = score(inputs(tmp_path), tmp_path / "out.jsonl", calibrated, again.model, scoring)
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert tally.lines == len(results) == 37 and tally.resumed == 0
    bad = {3: "JSON", 5: "token 99", 8: "17 tokens", 9: "no tokenizer", 10: "", 11: ""}
    for number, result in enumerate(results):
        if number in bad:
            assert f"line {number + 1}" in result["error"] and bad[number] in result["error"]
            assert "score" not in result
            continue
        assert result["id"] == (20 if number == 20 else f"n{number}")
        assert result["anomalous"] == (result["p_value"] <= ALPHA)
        assert ("because" in result) == result["anomalous"]
        if result["anomalous"]:
            assert abs(result["because_residual"]) < 0.5 and len(result["because"]) <= 8
            kept = {name for name, _ in again.circuit.edges}
            assert not kept & {part["edge"] for part in result["because"]}
    assert tally.errors == len(bad)
    assert tally.flagged == sum(r.get("anomalous", False) for r in results)
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_scores_equal_the_detectors_own(run, tmp_path):
    again, calibrated = opened(run)
    good = [{"clean": r["clean"], "id": str(i)} for i, r in enumerate(records(5, 2))]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in good))
    score(
        tmp_path / "in.jsonl", tmp_path / "out.jsonl", calibrated, again.model, Scoring(alpha=ALPHA)
    )
    scored = [
        json.loads(line)["score"] for line in (tmp_path / "out.jsonl").read_text().splitlines()
    ]
    assert scored == calibrated.detector.score(again.model.prompts(good)).tolist()


@pytest.mark.parametrize("broken_after", [0, pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("torn", [b"", b'{"id": "n'])
def test_an_interrupted_run_resumes_to_the_same_file(
    run, tmp_path, monkeypatch, broken_after, torn
):
    again, calibrated = opened(run)
    source, scoring = inputs(tmp_path), Scoring(alpha=ALPHA, chunk=8, explain="all")
    score(source, tmp_path / "whole.jsonl", calibrated, again.model, scoring)
    real, calls = scoring_module.score_lines, []

    def interrupted(*arguments):
        if len(calls) == broken_after:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(scoring_module, "score_lines", interrupted)
    out = tmp_path / "parts.jsonl"
    with pytest.raises(KeyboardInterrupt):
        score(source, out, calibrated, again.model, scoring)
    assert not out.exists()
    with (tmp_path / "parts.jsonl.partial").open("ab") as file:
        file.write(torn)
    monkeypatch.setattr(scoring_module, "score_lines", real)
    tally = score(source, out, calibrated, again.model, scoring)
    assert tally.resumed == 8 * broken_after
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_less_memory_gives_the_same_results_and_may_go_on_with_a_job(run, tmp_path, monkeypatch):
    again, calibrated = opened(run)
    source, scoring = inputs(tmp_path, 24), Scoring(alpha=ALPHA, chunk=8, explain="all")
    size = footprint(again.engine, tiny.prompts(1, shortest=6, longest=6))
    few = str(size.shared(False) + size.mask + 8 * (size.plain + explanation_bytes(size)))
    whole, parts, mixed = (tmp_path / f"{name}.jsonl" for name in ("whole", "parts", "mixed"))
    score(source, whole, calibrated, again.model, scoring)
    score(source, parts, calibrated, again.model, scoring, memory=few)
    real, calls = scoring_module.score_lines, []

    def interrupted(*arguments):
        calls.append(1)
        return real(*arguments) if len(calls) < 3 else 1 / 0

    monkeypatch.setattr(scoring_module, "score_lines", interrupted)
    with pytest.raises(ZeroDivisionError):
        score(source, mixed, calibrated, again.model, scoring)
    monkeypatch.undo()
    assert score(source, mixed, calibrated, again.model, scoring, memory=few).resumed == 16
    for ours in (parts, mixed):
        for result, expected in zip(read_results(ours), read_results(whole), strict=True):
            assert result.keys() == expected.keys()
            if "score" in expected:
                assert result["score"] == pytest.approx(expected["score"], rel=1e-4, abs=1e-6)
                assert result["p_value"] == expected["p_value"]


def test_a_line_that_does_not_fit_is_a_bad_one_and_an_explanation_that_does_not_is_left_out(
    run, tmp_path
):
    again, _ = opened(run)
    trusted, held_out = (prompts_from_records(records(16, seed)) for seed in (8, 9))
    calibrated = fit(Deviation(), Context(again.engine, again.circuit), trusted, held_out, used={})
    long = {"clean": [1, 2, 3] * 5, "id": "long"}
    good = [*({"clean": r["clean"]} for r in records(3, 5)), long]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in good))
    sizes = [
        footprint(again.engine, prompts_from_records([{"clean": [1] * length}]))
        for length in (6, 15)
    ]
    scores = [size.shared(False) + size.mask + size.plain + size.masked() for size in sizes]
    explanations = [
        size.shared(False) + size.mask + size.plain + explanation_bytes(size) for size in sizes
    ]

    def results(memory: int) -> list[dict]:
        score(
            tmp_path / "in.jsonl",
            tmp_path / "out.jsonl",
            calibrated,
            again.model,
            Scoring(alpha=ALPHA, explain="all"),
            memory=str(memory),
            overwrite=True,
        )
        return list(read_results(tmp_path / "out.jsonl"))

    *rest, last = results(max(scores[1], explanations[0]))
    assert all("because" in result for result in rest)
    assert last["id"] == "long" and "score" in last and "because" not in last
    assert "one prompt of 15 tokens takes up to" in last["because_error"]
    *rest, last = results(scores[0])
    assert all("because_error" in result for result in rest)
    assert "line 4: one prompt of 15 tokens takes up to" in last["error"] and "score" not in last


def test_partial_results_of_another_job_are_refused(run, tmp_path, monkeypatch):
    again, calibrated = opened(run)
    source, out = inputs(tmp_path), tmp_path / "out.jsonl"
    monkeypatch.setattr(scoring_module, "score_lines", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score(source, out, calibrated, again.model, Scoring(alpha=ALPHA))
    with pytest.raises(ValueError, match="beginning of another job"):
        score(source, out, calibrated, again.model, Scoring(alpha=0.3))


def test_refusals(run, tmp_path):
    again, calibrated = opened(run)
    source, out = inputs(tmp_path), tmp_path / "out.jsonl"

    def attempt(path=source, **changes):
        return score(path, out, calibrated, again.model, Scoring(**{"alpha": ALPHA, **changes}))

    with pytest.raises(
        ValueError, match="alpha=0.01 needs at least 99 calibration inputs, but there are"
    ):
        attempt(alpha=0.01)
    with pytest.raises(ValueError, match="explain='some'"):
        attempt(explain="some")
    with pytest.raises(FileNotFoundError):
        attempt(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        attempt(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match="chunk=0"):
        attempt(chunk=0)
    out.write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=true"):
        attempt()
    assert out.read_text() == "mine"


def test_other_inputs_under_the_same_name_are_another_job(run, tmp_path, monkeypatch):
    again, calibrated = opened(run)
    source, out, scoring = inputs(tmp_path), tmp_path / "out.jsonl", Scoring(alpha=ALPHA)
    monkeypatch.setattr(scoring_module, "score_lines", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score(source, out, calibrated, again.model, scoring)
    monkeypatch.undo()
    source.write_text("\n".join(reversed(source.read_text().splitlines())) + "\n")
    with pytest.raises(ValueError, match="beginning of another job"):
        score(source, out, calibrated, again.model, scoring)
    assert score(source, out, calibrated, again.model, scoring, overwrite=True).resumed == 0


def test_an_input_whose_numbers_overflow_is_one_error_line(run, tmp_path, monkeypatch):
    again, calibrated = opened(run)
    good = [{"clean": record["clean"]} for record in records(6, 5)]
    poisoned = good[2]["clean"]
    (tmp_path / "in.jsonl").write_text("\ufeff" + "".join(json.dumps(r) + "\n" for r in good))
    real = type(calibrated.detector).score

    def overflowing(self, prompts, *, memory):
        values = real(self, prompts, memory=memory)
        hit = [list(sequence) == poisoned for sequence in prompts.sequences()]
        return values.masked_fill(torch.tensor(hit), float("nan"))

    monkeypatch.setattr(type(calibrated.detector), "score", overflowing)
    score(
        tmp_path / "in.jsonl", tmp_path / "out.jsonl", calibrated, again.model, Scoring(alpha=ALPHA)
    )
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert ["error" in result for result in results] == [False, False, True, False, False, False]
    assert "line 3: the score is not finite" in results[2]["error"]


def test_a_fault_of_ours_is_no_fault_of_an_input(run, tmp_path, monkeypatch):
    again, calibrated = opened(run)

    def broken(self, prompts, *, memory):
        raise ValueError("shapes do not fit")

    monkeypatch.setattr(type(calibrated.detector), "score", broken)
    out = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="shapes do not fit"):
        score(inputs(tmp_path), out, calibrated, again.model, Scoring(alpha=ALPHA))
    assert not out.exists()


def test_the_command_takes_another_model_and_another_detector(run, tmp_path, capsys):
    from mad.commands.main import main

    folder, _ = run
    source = inputs(tmp_path)
    words = [f"circuit={folder / 'run'}", f"inputs={source}", "alpha=0.2"]
    tiny.scaled_up(tiny.gpt2_module(), seed=9).save_pretrained(tmp_path / "other, model")
    other = f"model={tmp_path / 'other, model'}"
    assert main(["score", *words, f"out={tmp_path / 'a.jsonl'}", other]) == 1
    assert "allow_other_weights=true" in capsys.readouterr().err
    assert (
        main(["score", *words, f"out={tmp_path / 'a.jsonl'}", other, "allow_other_weights=true"])
        == 3
    )
    (tmp_path / "trusted.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records(40, 77)))
    fit = [
        "fit",
        f"circuit={folder / 'run'}",
        f"trusted={tmp_path / 'trusted.jsonl'}",
        "detector=mahalanobis",
    ]
    assert main(fit) == 0
    assert main(["score", *words, f"out={tmp_path / 'b.jsonl'}", "detector=mahalanobis"]) == 3
    assert main(["score", *words, f"out={tmp_path / 'c.jsonl'}", "detector=none"]) == 1
    assert "detector=fast|mahalanobis" in capsys.readouterr().err
    assert main(["score", *words, f"out={source}", "overwrite=true"]) == 1
    assert "is the input file itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["deviation", "detector.circuits=2"],
        ["nodes", "detector.summary=max"],
        ["routing"],
        ["effects", "detector.summary=tails", "detector.steps=2"],
        ["mahalanobis", "detector.layers=1", "detector.tokens=all"],
        ["attribution_mahalanobis"],
        ["fine_tuned_kl", "detector.steps=2"],
        ["token_count"],
    ],
    ids=lambda words: words[0],
)
def test_every_detector_is_fitted_and_scores_from_the_command_line(run, tmp_path, words):
    from mad.commands.main import main

    folder, _ = run
    name, *settings = words
    trusted, source = tmp_path / "trusted.jsonl", tmp_path / "in.jsonl"
    trusted.write_text("".join(json.dumps(r) + "\n" for r in records(40, 77)))
    source.write_text("".join(json.dumps(r) + "\n" for r in records(3, 78)))
    circuit, detector = f"circuit={folder / 'run'}", f"detector={name}"
    fit = ["fit", circuit, f"trusted={trusted}", detector, *settings, "overwrite=true"]
    assert main(fit) == 0
    out = tmp_path / "out.jsonl"
    words = ["score", circuit, f"inputs={source}", f"out={out}", detector, "alpha=0.2"]
    assert main(words) == 0
    assert all(0 < result["p_value"] <= 1 for result in read_results(out))


# ---- rounding, labels, and harmless inputs of one's own ----------------------------------------


def test_a_score_of_rounding_is_not_shared_out(run, tmp_path, monkeypatch):
    again, calibrated = opened(run)
    detector, source = calibrated.detector, tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in records(6, 5)))
    scores = detector.score(again.model.prompts(records(6, 5)))
    between = scores.median().item() / 10  # of six, the three lowest are not ten times it
    monkeypatch.setattr(
        type(detector), "noise", lambda self, prompts, **_: torch.full((len(prompts),), between)
    )
    scoring = Scoring(alpha=ALPHA, explain="all", edges=10**6)
    score(source, tmp_path / "out.jsonl", calibrated, again.model, scoring)
    results = list(read_results(tmp_path / "out.jsonl"))
    for result in results:
        if result["score"] < 10 * between:
            assert "because" not in result and "because_residual" not in result
            assert "is not 10 times the rounding" in result["because_error"]
        else:
            parts = [abs(part["share"]) * result["score"] for part in result["because"]]
            assert parts and min(parts) > between and "because_error" not in result
    assert 0 < sum("because" in result for result in results) < 6


def test_labels_are_passed_on_for_the_picture(run, tmp_path):
    again, calibrated = opened(run)
    labels = [0, 1, "normal", "anomaly", None, "odd", [1]]
    lines = [{"clean": r["clean"], "label": label} for r, label in zip(records(7, 6), labels)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scoring = Scoring(alpha=ALPHA)
    score(tmp_path / "in.jsonl", tmp_path / "out.jsonl", calibrated, again.model, scoring)
    passed = [result.get("label") for result in read_results(tmp_path / "out.jsonl")]
    assert passed == [0, 1, "normal", "anomaly", None, None, None]


def test_harmless_inputs_of_ones_own_calibrate_too(run, tmp_path, capsys, caplog):
    from mad.commands.main import main

    folder, _ = run
    rows = {"trusted": records(40, 77), "hard": records(30, 78), "new": records(9, 79)}
    rows["hard"] = [
        {**row, "group": "near" if index % 2 else "far"} for index, row in enumerate(rows["hard"])
    ]
    del rows["hard"][0]["group"]
    for name, own in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in own))
    circuit, trusted = f"circuit={folder / 'run'}", f"trusted={tmp_path / 'trusted.jsonl'}"
    fitting = ["fit", circuit, trusted, "detector=max_probability", "overwrite=true"]
    fitting.append(f"calibration={tmp_path / 'hard.jsonl'}")
    assert main([*fitting, "alpha=0.2"]) == 1, "too few of one group"
    assert "there will be 1 (group harmless)" in capsys.readouterr().err
    assert main(fitting) == 0
    said = capsys.readouterr().out
    assert "and 1 of group harmless and 15 of group near and 14 of group far" in said
    assert "there will be 1 (group harmless)" in caplog.text
    again = open_run(folder / "run")
    calibrated = again.detector("max_probability")
    about = json.loads((folder / "run/detector/max_probability/detector.json").read_text())
    assert {name: own["prompts"] for name, own in about["harmless"].items()} == {
        "harmless": 1,
        "near": 15,
        "far": 14,
    }
    new = calibrated.detector.score(again.model.prompts(rows["new"])).tolist()
    held = {"far": [r for r in rows["hard"] if r.get("group") == "far"]}
    held["near"] = [r for r in rows["hard"] if r.get("group") == "near"]
    held["harmless"] = rows["hard"][:1]
    slow = [0.0] * 9
    for own in held.values():
        scores = calibrated.detector.score(again.model.prompts(own)).tolist()
        p = [(1 + sum(s >= value for s in scores)) / (len(scores) + 1) for value in new]
        slow = [max(pair) for pair in zip(slow, p, strict=True)]
    of_trusted = calibrated.calibration.groups["trusted"].tolist()
    assert len(of_trusted) == 20
    p = [(1 + sum(s >= value for s in of_trusted)) / 21 for value in new]
    found = calibrated.p_values(again.model.prompts(rows["new"])).tolist()
    assert found == pytest.approx([max(pair) for pair in zip(slow, p, strict=True)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 3}, "prompt 2: group=3, but the name of a group is text"),
        ({"group": "trusted"}, "called trusted, which names trusted ones"),
        ({"label": 1}, "group harmless: 1 of 3 trusted prompts are labelled anomalous"),
        ({"clean": records(40, 77)[0]["clean"]}, ""),
    ],
)
def test_harmless_inputs_that_cannot_calibrate_are_refused(run, tmp_path, capsys, change, message):
    from mad.commands.main import main

    folder, _ = run
    (tmp_path / "trusted.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records(40, 77)))
    hard = [{"clean": r["clean"], "label": 0} for r in records(3, 78)]
    if not message:  # one that the detector is fitted on, or one of both calibrations
        hard += [{"clean": r["clean"], "label": 0} for r in records(40, 77)]
        message = "prompts are in both the fit and the harmless split"
    else:
        hard[1] |= change
    (tmp_path / "hard.jsonl").write_text("".join(json.dumps(r) + "\n" for r in hard))
    words = [f"circuit={folder / 'run'}", f"trusted={tmp_path / 'trusted.jsonl'}"]
    words += ["detector=token_count", f"calibration={tmp_path / 'hard.jsonl'}", "overwrite=true"]
    assert main(["fit", *words]) == 1
    assert message in capsys.readouterr().err


def test_calibration_inputs_that_get_no_score_are_left_out_by_name(run, tmp_path, capsys, caplog):
    """One is longer than all that the means by position were taken from."""
    from mad.commands.main import main

    folder, _ = run
    long = [{"clean": [*range(9)], "id": "long"}, {"clean": [*range(1, 9)], "id": "longer"}]
    hard = [{"clean": r["clean"]} for r in records(4, 78)]
    files = {"trusted": records(40, 77), "hard": [*hard[:2], long[0], *hard[2:]], "all": long}
    for name, own in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in own))
    circuit, trusted = f"circuit={folder / 'run'}", f"trusted={tmp_path / 'trusted.jsonl'}"
    words = ["fit", circuit, trusted, "detector=deviation", "detector.ablation=positional_mean"]
    words += ["overwrite=true", "alpha=0.17"]
    there = (folder / "run/detector/deviation").exists()  # another test's
    assert main([*words, f"calibration={tmp_path / 'hard.jsonl'}"]) == 1
    error = capsys.readouterr().err
    assert "alpha=0.17 needs at least 5 calibration inputs, but there are 4 of group" in error
    (told,) = [record.message for record in caplog.records if "get no score" in record.message]
    assert told.startswith("1 of 5 harmless calibration inputs get no score from detector deviat")
    assert "'long': ablation=positional_mean: prompts reach position 8, but the means" in told
    assert (folder / "run/detector/deviation").exists() == there
    assert main([*words[:-1], f"calibration={tmp_path / 'hard.jsonl'}"]) == 0
    assert "calibrated on 20 and 4 of group harmless" in capsys.readouterr().out
    again = open_run(folder / "run")
    calibrated = again.detector("deviation")
    expected = calibrated.score(again.model.prompts(hard)).double().sort().values
    torch.testing.assert_close(calibrated.calibration.groups["harmless"], expected)
    assert calibrated.about["harmless"]["harmless"]["prompts"] == 4
    assert main([*words[:-1], f"calibration={tmp_path / 'all.jsonl'}"]) == 1, "none gets a score"
    assert "prompts reach position 8, but the means" in capsys.readouterr().err
