"""What is read is what was left, and what cannot be read is refused by name."""

from __future__ import annotations

import pickle

import pytest
import torch

from mad.benchmark.results import Results, Scorer, read
from tests.mad.benchmark.made_up import STRATA, drawn, found, leave, subject

ALONE = subject({"a": drawn(0)})


def test_what_is_read_is_what_was_left(tmp_path):
    one, two = drawn(0), drawn(1)
    leave(tmp_path, subject({"a": one, found("b"): two}))
    leave(tmp_path, subject({"a": two}, seed=4))
    (tmp_path / "scores" / "recall_redirect-5.ready").write_text("of a run that goes on")
    results = read(tmp_path)
    assert [own.name for own in results.subjects] == ["recall_redirect-3", "recall_redirect-4"]
    assert results.scorers == (Scorer("a"), found("b"))
    assert results.subjects[0].strata == STRATA
    assert results.of([found("b")]).scorers == (found("b"),)
    for part, values in results.subjects[0].parts[found("b")].items():
        assert torch.equal(values, two[part])


def test_subjects_are_selected():
    results = Results((ALONE, subject({"a": drawn(1)}, task="shift_only")))
    assert results.select(["shift_only"]).subjects == results.subjects[1:]
    with pytest.raises(ValueError, match=r"tasks=\['x'\]; there are recall_redirect-3, shift"):
        results.select(["x"])


def test_nothing_or_half_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="scores holds no scores"):
        read(tmp_path)
    about = leave(tmp_path, ALONE)
    about.rename(tmp_path / "kept")
    with pytest.raises(
        FileNotFoundError, match=r"recall_redirect-3\.json is missing: the subject is unfinished"
    ):
        read(tmp_path)
    (tmp_path / "kept").rename(about)
    about.with_suffix(".safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"recall_redirect-3\.safetensors is missing"):
        read(tmp_path)


def test_pickles_are_refused(tmp_path):
    about = leave(tmp_path, ALONE)
    about.with_suffix(".safetensors").write_bytes(pickle.dumps({"a|none|calibration": [1.0]}))
    with pytest.raises(ValueError, match=r"recall_redirect-3\.safetensors is no safetensors file"):
        read(tmp_path)
    torch.save({}, tmp_path / "scores" / "more.pt")
    with pytest.raises(ValueError, match=r"more\.pt may hold code"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"recall_redirect-3\.json is no record of a subject"),
        ("[]", "is no record of a subject"),
        ('{"task": "recall_redirect", "seed": 3}', "is no record of a subject.*strata"),
        ('{"task": "recall_redirect", "seed": 4, "strata": {}}', "name it recall_redirect-4.json"),
        ('{"task": "recall_redirect", "seed": 3, "strata": {"new": []}}', "has a group 'new'"),
        (
            '{"task": "recall_redirect", "seed": 3, "strata": {"normal_iid": ["all"]}}',
            "0 prompts in normal_shift",
        ),
    ],
)
def test_broken_records_are_refused(tmp_path, text, message):
    leave(tmp_path, ALONE).write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a|none|elsewhere": torch.zeros(3)}, "has a tensor 'a|none|elsewhere'"),
        ({"a|none": torch.zeros(3)}, "names are DETECTOR"),
        ({"a|none|anomaly": torch.zeros(60, dtype=torch.float64)}, r"is torch\.float64 \(60,\)"),
        ({"a|none|anomaly": torch.zeros(60, 1)}, r"\(60, 1\); it must be a row of float32"),
        ({"a|none|anomaly": torch.zeros(59)}, "has 59 scores for 60 prompts"),
        ({"b|none|calibration": torch.zeros(7)}, "has 7 scores for 120 prompts"),
        (
            {"a|none|anomaly": torch.full((60,), torch.nan)},
            r"60 of 60 scores of 'a\|none\|anomaly' are not finite",
        ),
        ({"b|none|calibration": torch.zeros(120)}, r"has no b\|none\|normal_iid"),
    ],
)
def test_broken_tensors_are_refused(tmp_path, change, message):
    leave(tmp_path, ALONE, change)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)
