"""What a scored file shows, against counts by hand; and from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sklearn.metrics import roc_auc_score

from mad.commands.main import main
from mad.scored import draw_scored, read_scored


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def scored(tmp_path) -> Path:
    """90 normal and 60 anomalous inputs, labelled in both ways; an error and three unlabelled."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.rand(153, generator=draw).tolist()
    labels = [("normal", 0, "anomaly", 1)[index % 2 + 2 * (index >= 90)] for index in range(150)]
    lines: list[dict] = [
        {"id": index, "score": score + (0.4 if label in ("anomaly", 1) else 0), "label": label}
        for index, (score, label) in enumerate(zip(scores[:150], labels, strict=True))
    ]
    lines += [{"id": "x", "score": score} for score in scores[150:]] + [{"id": 9, "error": "bad"}]
    for line in lines[:-1]:
        line["p_value"] = 1 - line["score"] / 1.5
    return write(tmp_path / "mine.jsonl", lines)


def test_figures_are_those_by_hand(scored):
    shown = read_scored(scored, alpha=0.5)
    lines = [json.loads(line) for line in scored.read_text().splitlines()[:-1]]
    normal, anomaly = (
        [line for line in lines if line.get("label") in names]
        for names in (("normal", 0), ("anomaly", 1))
    )
    assert (len(normal), len(anomaly)) == (90, 60)
    both = normal + anomaly
    expected = roc_auc_score([line in anomaly for line in both], [line["score"] for line in both])
    assert shown.auroc == pytest.approx(expected)
    for label, own in (("normal", normal), ("anomaly", anomaly)):
        share = sum(line["p_value"] <= 0.5 for line in own) / len(own)
        assert shown.flagged(label) == pytest.approx(share) and 0 < share < 1
    assert len(shown.scores["no label"]) == 3 and shown.errors == 1
    assert shown.summary().splitlines()[-2:] == [
        "without a score: 1 lines",
        f"AUROC of anomalies against normals: {expected:.3f}",
    ]


def test_flags_where_all_or_none_are_flagged(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"score": s, "p_value": 0.1, "label": 0} for s in (1, 2)])
    assert read_scored(path, 0.2).flagged("normal") == 1
    assert read_scored(path, 0.05).flagged("normal") == 0
    assert read_scored(path, 0.05).auroc is None
    assert [
        file.name for file in draw_scored(read_scored(path, 0.2), tmp_path / "new", ["svg"])
    ] == ["a.scores.svg"]


def test_the_command_draws_and_prints(scored, tmp_path, capsys):
    assert main(["plot", f"scored={scored}", "alpha=0.3", "formats=[svg,png]"]) == 0
    said = capsys.readouterr().out
    assert "AUROC of anomalies against normals: 0." in said and "at alpha 0.3" in said
    for name in ("scores.svg", "scores.png", "roc.svg", "roc.png"):
        assert (tmp_path / f"mine.{name}").stat().st_size > 1000
    assert 'id="curve::score"' in (tmp_path / "mine.roc.svg").read_text()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 1 is no result"),
        ('{"id": 1}', "line 1 is no result of `madcap score` .KeyError"),
        ('{"score": NaN, "p_value": 0.1}', "not finite"),
        ('{"score": 1, "p_value": 0.1, "label": [0]}', "unhashable"),
        ('{"error": "bad"}', "holds no scores"),
    ],
)
def test_what_is_no_scored_file_is_refused(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_scored(tmp_path / "a.jsonl", 0.01)


def test_what_to_draw_has_to_be_said(tmp_path, capsys):
    for words in ([], ["circuit=a", "scored=b"]):
        assert main(["plot", *words]) == 1
        assert "circuit=FOLDER or scored=FILE" in capsys.readouterr().err
    assert main(["plot", f"scored={tmp_path / 'none.jsonl'}"]) == 1
    assert "no scored file" in capsys.readouterr().err
