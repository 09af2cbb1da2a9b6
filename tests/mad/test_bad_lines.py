"""Whatever stands in a line: the good ones are scored as they are alone, the bad ones say why."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.engine import Engine
from circuits.model.load import LoadedModel, from_module
from mad.calibration import Calibrated, fit
from mad.detector import Context
from mad.detectors import MaxProbability
from mad.scoring import Scoring, score
from tests import tiny

LONGEST = 24  # tokens that fit into the model
DEEP = 5_000


def byte_tokenizer() -> Any:
    """One token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={byte: n for n, byte in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


MODULE = tiny.gpt2_module(n_positions=LONGEST, vocab_size=256, n_layer=1).double()
TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def fitted() -> tuple[LoadedModel, Calibrated]:
    model = from_module(MODULE, tokenizer=TOKENIZER)
    draw = Random(0)
    trusted = model.prompts({"clean": [draw.randrange(256) for _ in range(5)]} for _ in range(24))
    parts = trusted.split({"fit": 4, "calibration": 20}, seed=0)
    return model, fit(MaxProbability(), Context(Engine(model)), *parts.values())


# ---- lines ---------------------------------------------------------------------------------------


def tokens(draw: Random, vocabulary: int = 256) -> list[int]:
    return [draw.randrange(vocabulary) for _ in range(draw.randint(1, LONGEST))]


def good(draw: Random) -> tuple[bytes, Any, list[int]]:
    """A line, its id (None: the line's number) and its tokens."""
    record: dict[str, Any] = {"clean": tokens(draw)}
    if draw.random() < 0.5:
        text = "".join(
            draw.choice('aé\u2028\x00\r\n\ufeff {}"\\') for _ in range(draw.randint(1, 8))
        )
        record = {"text": text}
    found = record["clean"] if "clean" in record else TOKENIZER.encode(text)
    name = draw.choice([None, "same", "\ud800", draw.randrange(99), 10**3999])
    if name is not None or draw.random() < 0.5:
        record["id"] = name
    if draw.random() < 0.3:
        record["note"] = draw.choice([math.nan, [[[1]]], {"a": math.inf}, None])
    line = json.dumps(record, ensure_ascii=name == "\ud800" or draw.random() < 0.5).encode()
    before, after = draw.choice(
        [(b"", b"")] * 3 + [(b"\xef\xbb\xbf", b""), (b" ", b"\r"), (b"", b"\t")]
    )
    return before + line + after, name, found


def plain(draw: Random) -> bytes:
    return json.dumps({"clean": tokens(draw), "id": draw.randrange(99)}).encode()


def with_(field: str, *values: str) -> Callable[[Random], bytes]:
    """A good record but for one field."""

    def make(draw: Random) -> bytes:
        others = {"clean": "[1, 2]", "id": '"x"', field: draw.choice(values)}
        return (
            "{" + ", ".join(f'"{key}": {value}' for key, value in others.items()) + "}"
        ).encode()

    return make


def cut_short(draw: Random) -> bytes:
    line = plain(draw)
    return line[: draw.randrange(len(line))]


def noise(draw: Random) -> bytes:
    return b"\xff" + draw.randbytes(draw.randrange(40)).replace(b"\n", b" ")


def deep(brackets: str) -> str:
    opening, closing = brackets
    return opening * DEEP + closing * DEEP


KINDS: dict[str, Callable[[Random], bytes]] = {
    "blank": lambda draw: draw.choice([b"", b" \t", b"\r", b"\xef\xbb\xbf", b"\xef\xbb\xbf "]),
    "cut short": cut_short,
    "noise": noise,
    "utf-16": lambda draw: plain(draw).decode().encode(draw.choice(["utf-16", "utf-16-le"])),
    "latin-1": lambda draw: json.dumps(
        {"text": "é" * draw.randint(1, 9)}, ensure_ascii=False
    ).encode("latin-1"),
    "NUL": lambda draw: draw.choice(
        [b"\x00" + plain(draw), plain(draw) + b"\x00", b'{"text": "\x00"}']
    ),
    "carriage returns": lambda draw: plain(draw) + b"\r" + plain(draw),
    "gzip": lambda draw: gzip.compress(plain(draw)).replace(b"\n", b" "),
    "parquet": lambda draw: b"PAR1\x15" + draw.randbytes(20).replace(b"\n", b" ") + b"PAR1",
    "no object": lambda draw: draw.choice([b"1", b"null", b"[1, 2]", b'"text"', b"NaN", b"true"]),
    "two objects": lambda draw: plain(draw) + plain(draw),
    "duplicate key": lambda draw: plain(draw)[:-1] + b', "id": 3}',
    "surrogate": lambda draw: b'{"text": "a\\ud800"}',
    "deep": lambda draw: draw.choice(
        [deep("[]"), "[" * DEEP, '{"clean": ' + deep("[]") + "}"]
    ).encode(),
    "deep id": with_("id", deep("[]"), "[" * 100 + "]" * 100),
    "id": with_(
        "id", "NaN", "Infinity", "-Infinity", "1e999", "[NaN]", '{"a": Infinity}', "1.5", "true"
    ),
    "tokens": with_(
        "clean", "[NaN]", "[1e999]", "[1.0]", "[-1]", "[256]", "[]", "[true]", "[[1]]", "{}"
    ),
    "digits": with_("clean", f"[{'9' * 4000}]", f"[{'9' * 5000}]", "9" * 4000),
    "long": with_("clean", str([1] * (LONGEST + 1)), '"' + "a" * (LONGEST + 1) + '"', '""'),
    "positions": with_("positions", "[9]", "[-3]", "[0, 0]", "[]", "0", "[NaN]", f"[{'9' * 4000}]"),
    "nothing": lambda draw: b'{"id": 1, "answers": [2]}',
    "both": lambda draw: b'{"text": "a", "clean": [1]}',
    "two formats": lambda draw: b'{"clean_prefix": "a", "clean": "b"}',
}


# ---- the whole of it -----------------------------------------------------------------------------


def own_score(row: list[int]) -> float:
    """Minus the log-probability of the model's first choice after these tokens."""
    with torch.no_grad():
        return -MODULE(torch.tensor([row])).logits[0, -1].log_softmax(-1).max().item()


def strictly(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def check(fitted: tuple[LoadedModel, Calibrated], lines: list[bytes | tuple], folder: Path) -> None:
    """Scores lines, bad ones as bytes, good ones as `good` makes them."""
    model, calibrated = fitted
    lines = [good(Random(0)), *lines]  # a file that begins as gzip is gzip
    source, out = folder / "in.jsonl", folder / "out.jsonl"
    source.write_bytes(b"".join((x if isinstance(x, bytes) else x[0]) + b"\n" for x in lines))
    tally = score(source, out, calibrated, model, Scoring(alpha=0.1, chunk=32), overwrite=True)
    results = [strictly(line) for line in out.read_text().splitlines()]
    assert len(results) == tally.lines == len(lines)
    assert tally.errors == sum(isinstance(line, bytes) for line in lines)
    for number, (line, result) in enumerate(zip(lines, results, strict=True), start=1):
        if isinstance(line, bytes):
            assert result.keys() == {"id", "error"}, line
            message = result["error"]
            assert message.startswith(f"line {number}: ") and message.isprintable(), line
            assert len(message) < 300 and type(result["id"]) in (str, int)
        else:
            assert result["id"] == (number if line[1] is None else line[1])
            assert result["score"] == pytest.approx(own_score(line[2]), rel=1e-5), line[0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_bad_line_is_an_error_line(fitted, tmp_path, kind):
    draw = Random(kind)
    check(fitted, [x for _ in range(12) for x in (KINDS[kind](draw), good(draw))], tmp_path)


@given(st.lists(st.tuples(st.sampled_from([None, None, *KINDS]), st.integers(0, 99)), min_size=1))
@settings(max_examples=30)
def test_bad_lines_among_good_ones_change_nothing(fitted, tmp_path_factory, drawn):
    lines = [(KINDS[kind] if kind else good)(Random(seed)) for kind, seed in drawn]
    check(fitted, lines, tmp_path_factory.getbasetemp())


@given(st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")), min_size=1))
@settings(max_examples=30)
def test_any_bytes_are_bad_lines(fitted, tmp_path_factory, lines):
    check(fitted, [b"\xff" + line for line in lines], tmp_path_factory.getbasetemp())


@pytest.mark.slow
def test_ten_thousand_bad_lines_among_a_thousand_good_ones(fitted, tmp_path):
    draw = Random(0)
    kinds = list(KINDS.values())
    lines = [draw.choice(kinds)(draw) for _ in range(10_000)] + [good(draw) for _ in range(1_000)]
    draw.shuffle(lines)
    check(fitted, lines, tmp_path)
