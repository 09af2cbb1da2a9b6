"""Prompt files: every format that is read, and what is refused rather than guessed."""

from __future__ import annotations

import gzip
import json
import os
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.prompts import encode_record, prompts_from_records
from circuits.prompts.files import parse_line, read_records, write_jsonl


@pytest.fixture(scope="module")
def gpt2(cases):
    folder = cases / "gpt2_tokenizer"
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


text_records = st.dictionaries(
    st.sampled_from(["clean", "corrupt", "id"]),
    st.text(max_size=8) | st.lists(st.integers(0, 9)),
    min_size=1,
)


@given(st.lists(text_records, min_size=1, max_size=5))
@settings(max_examples=40)
def test_jsonl_round_trip(tmp_path_factory, given_records):
    path = tmp_path_factory.mktemp("jsonl") / "prompts.jsonl"
    write_jsonl(given_records, path)
    assert read_records(path) == given_records
    assert [parse_line(line) for line in path.read_text().splitlines()] == given_records


@pytest.mark.parametrize(
    "text",
    [
        '{"clean": [1]}\n{"clean": "a\u2028b"}\n\n \n',
        '\ufeff{"clean": [1]}\r\n{"clean": "a\u2028b"}\r\n',
        '[{"clean": [1]},\n {"clean": "a\u2028b"}]',
        '{"prompts": [{"clean": [1]}, {"clean": "a\u2028b"}], "seq_labels": ["x"], "word_idxs": '
        '{"x": 0}}',
    ],
)
def test_json_of_all_kinds(tmp_path, text):
    assert read_records(write(tmp_path / "p.json", text)) == [{"clean": [1]}, {"clean": "a\u2028b"}]


def test_one_record_over_several_lines(tmp_path):
    assert read_records(write(tmp_path / "p.json", '{\n "clean": [1]\n}\n')) == [{"clean": [1]}]


def test_feature_circuits_lines(tmp_path):
    line = {
        "clean_prefix": "The boy",
        "patch_prefix": "The boys",
        "clean_answer": " is",
        "patch_answer": " are",
    }
    path = write(tmp_path / "sva.json", json.dumps({**line, "case": "singular"}) + "\n")
    record = {
        "clean": "The boy",
        "corrupt": "The boys",
        "answers": [" is"],
        "wrong_answers": [" are"],
    }
    assert read_records(path) == [{**record, "case": "singular"}]


def test_csv_of_token_ids(tmp_path):
    text = 'clean,corrupted,correct_idx,incorrect_idx\n"a, b","a, c",5,"[6, 7]"\n'
    record = {"clean": "a, b", "corrupt": "a, c", "answers": [5], "wrong_answers": [6, 7]}
    assert read_records(write(tmp_path / "ioi.csv", text)) == [record]


def test_csv_of_years(tmp_path):
    (record,) = read_records(
        write(tmp_path / "years.csv", "clean,corrupted,label\n1796 to 17,1701 to 17,96\n")
    )
    assert record["answers"] == ["97", "98", "99"]
    assert (
        len(record["wrong_answers"]),
        record["wrong_answers"][0],
        record["wrong_answers"][-1],
    ) == (97, "00", "96")


BAD_FILES = [
    ("p.jsonl", "", "is empty; give at least one prompt"),
    ("p.jsonl", " \n\n", "is empty"),
    ("p.json", "[]", "holds no prompts; give at least one"),
    ("p.json", '{"prompts": []}', "holds no prompts"),
    ("p.json", '{"prompts": 5}', "prompts is no list; give a list of objects"),
    ("p.json", '{"prompts": [5]}', "prompt 1: no object"),
    (
        "p.jsonl",
        '{"clean": [1]}\n{"clean": [1}\n',
        r"line 2: no JSON at column 13 \(.*\); write one object a line",
    ),
    ("p.jsonl", '{"clean": [1]}\n\n{"clean": [1]}', "line 2: blank line; remove it"),
    ("p.jsonl", '{"clean": [1]}\n[1]\n', 'line 2: no object; write {"clean": ...}'),
    ("p.jsonl", "[" * 100_000, "line 1: (JSON nested too deeply|no JSON)"),
    (
        "p.csv",
        "clean,label\na,5\n",
        "columns 'clean, label'; EAP-IG's are clean, corrupted and either label or",
    ),
    ("p.csv", "clean,corrupted,correct_idx\na,b,5\n", "correct_idx and incorrect_idx"),
    ("p.csv", "clean,corrupted,label\n", "holds no prompts"),
    (
        "p.csv",
        "clean,corrupted,label\n1705,1701,5\n1799,1701,99\n",
        "row 2: label='99', but a year that others can follow",
    ),
    ("p.csv", "clean,corrupted,label\na,b\n", "row 1: no cell for column 'label'"),
    ("p.csv", "clean,corrupted,label\na,b,\n", "row 1: label='', but a year"),
    (
        "p.csv",
        "clean,corrupted,correct_idx,incorrect_idx\na,b,5,x\n",
        "row 1: incorrect_idx='x' is no token id",
    ),
    ("p.csv", "clean,corrupted,label\na,b," + "5" * 200_000 + "\n", "after line 1: no CSV"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD_FILES)
def test_bad_files_are_refused_in_one_line(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message) as refused:
        read_records(write(tmp_path / name, text))
    assert name in str(refused.value) and "\n" not in str(refused.value)


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "missing.jsonl"):
        with pytest.raises(ValueError, match="is no file; give the path of a prompt file"):
            read_records(path)
    with pytest.raises(ValueError, match="byte 11 is not UTF-8"):
        read_records(write(tmp_path / "latin.jsonl", '{"clean": "é"}', encoding="latin-1"))


def test_published_prompt_files(gpt2, cases):
    folder = cases / "prompts"
    years = read_records(folder / "eap_ig_greater_than_data.csv")
    assert (
        len(years) == 1000
        and len(years[0]["answers"]) == 47
        and years[0]["wrong_answers"][-1] == "52"
    )
    prompts = prompts_from_records(years[:20], tokenizer=gpt2)
    assert prompts.answers.shape[:2] == (20, 1) and prompts.corrupt is not None
    agreement = read_records(folder / "sva_simple_test.json")
    same_length = []
    for record in agreement:
        try:
            same_length.append(encode_record(record, tokenizer=gpt2))
        except ValueError as refused:
            assert "corrupt has" in str(refused)
    assert len(same_length) > len(agreement) / 2


# --------------------------------------------------------------------------------------------------
# what could be read in two ways

YEARS, IDS = "clean,corrupted,label", "clean,corrupted,correct_idx,incorrect_idx"
TWO_WAYS = [
    (f"{YEARS},answers", "1796,1701,1, he", "label would be read as .* but column 'answers'"),
    (f"{YEARS},wrong_answers", "1796,1701,96,x", "but column 'wrong_answers' beside it"),
    (f"{YEARS},correct_idx", "1796,1701,96,5", "but column 'correct_idx' beside it"),
    (f"{YEARS},country_idx", "1796,1701,96,5", "but column 'country_idx' beside it"),
    (f"{YEARS},clean_answer", "1796,1701,96,x", "but column 'clean_answer' beside it"),
    (YEARS, "a good film,a bad film,1", "row 1: label=1 .* clean='a good film' has no year .* 01"),
    (YEARS, "in 1796 they,in 1701 they,17", "row 1: label=17 is read .* no year that ends in 17"),
    (f"{IDS},answers", "a,b,5,6,7", "columns correct_idx and answers both hold answers"),
    (f"{IDS},label", "a,b,5,6,96", "row 1: label='96', but beside correct_idx it is 0"),
    (f"{IDS},text", "a,b,5,6,c", "columns clean and text mean the same; keep clean"),
    (f"{IDS},corrupt", "a,b,5,6,c", "columns corrupted and corrupt mean the same; keep corrupted"),
    (f"{IDS},positions", "a,b,5,6,[0]", "column positions is not read from CSV; write"),
    (f"{IDS},clean", "a,b,5,6,c", "column 'clean' is there twice; keep one"),
    (IDS, "so, he,b,5,6", "row 1: more cells than columns; put text that holds a comma in quotes"),
]


@pytest.mark.parametrize(("columns", "row", "message"), TWO_WAYS)
def test_columns_that_could_be_read_in_two_ways_are_refused_by_name(
    tmp_path, columns, row, message
):
    with pytest.raises(ValueError, match=message) as refused:
        read_records(write(tmp_path / "p.csv", f"{columns}\n{row}\n"))
    assert "\n" not in str(refused.value)


def test_beside_answer_columns_a_label_marks_anomalies(tmp_path):
    text = f"id,{IDS},label,note\nx,a,b,5,6,1,n\n,c,d,5,6,0,\n,e,f,5,6,,\n"
    records = read_records(write(tmp_path / "p.csv", text))
    assert [record.get("label") for record in records] == [1, 0, None]
    assert [record.get("id") for record in records] == ["x", None, None]
    assert all(record["answers"] == [5] and "note" not in record for record in records)


TWO_KEYS = [
    ('{"clean_prefix": "a", "clean": "b"}', "line 1: both clean_prefix and clean are given"),
    ('{"clean_prefix": "a", "patch_prefix": "b", "corrupt": "c"}', "both patch_prefix and corrupt"),
    ('{"clean_prefix": "a", "clean_answer": "b", "answers": ["c"]}', "both clean_answer and answ"),
    ('{"clean_prefix": "a", "patch_answer": "b", "wrong_answers": ["c"]}', "both patch_answer and"),
    ('{"prompts": [], "clean": [1]}', "prompts and clean stand side by side; keep one of them"),
    ('{"clean": [1], "clean": [2]}', "line 1: key 'clean' is given twice; keep one"),
    ('{"clean": [1]}\n{"clean": [1], "x": {"y": 1, "y": 1}}', "line 2: key 'y' is given twice"),
    ('[{"clean": [1],\n "clean": [2]}]', "p.jsonl, key 'clean' is given twice; keep one"),
]


@pytest.mark.parametrize(("text", "message"), TWO_KEYS)
def test_keys_that_could_be_read_in_two_ways_are_refused_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_records(write(tmp_path / "p.jsonl", text))


def test_null_beside_a_key_of_the_same_meaning_is_nothing(tmp_path):
    line = '{"clean_prefix": "a", "clean": null, "clean_answer": null, "patch_answer": "b"}'
    (record,) = read_records(write(tmp_path / "p.jsonl", line))
    assert record == {"clean": "a", "wrong_answers": ["b"]}


# --------------------------------------------------------------------------------------------------
# what files are made of

LINES = '{"clean": [1]}\n{"clean": "a\u2028b"}\n'


@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.jsonl"])
def test_gzip_is_unpacked_whatever_it_is_called(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(LINES.encode()))
    assert read_records(tmp_path / name) == [{"clean": [1]}, {"clean": "a\u2028b"}]
    (tmp_path / "p.CSV.gz").write_bytes(gzip.compress(f"{IDS}\na,b,5,6\n".encode()))
    assert read_records(tmp_path / "p.CSV.gz")[0]["wrong_answers"] == [6]


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b[:12] + b"x" * 9 + b[21:]])
def test_damaged_gzip_is_refused(tmp_path, damage):
    packed = gzip.compress(LINES.encode() * 50)
    (tmp_path / "p.jsonl").write_bytes(damage(packed))
    with pytest.raises(ValueError, match="p.jsonl is damaged gzip .*; pack it anew"):
        read_records(tmp_path / "p.jsonl")


def test_pipes_and_standard_input_are_read(tmp_path, monkeypatch):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(LINES,))
    writer.start()
    assert len(read_records(pipe)) == 2
    writer.join()
    with write(tmp_path / "p.jsonl", LINES).open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert len(read_records("-")) == 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le"])
def test_utf_16_is_refused_by_name(tmp_path, encoding):
    text = LINES if encoding == "utf-16" else "\ufeff" + LINES
    with pytest.raises(ValueError, match="p.jsonl is UTF-16; save the file as UTF-8"):
        read_records(write(tmp_path / "p.jsonl", text, encoding=encoding))
    (tmp_path / "p.gz").write_bytes(gzip.compress(text.encode(encoding)))
    with pytest.raises(ValueError, match="p.gz is UTF-16"):
        read_records(tmp_path / "p.gz")


def test_parquet_is_refused_by_name(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b"PAR1\x15\x04\x15\x80 rows \x00\x00PAR1")
    with pytest.raises(ValueError, match="p.jsonl is Parquet; write its rows as JSONL"):
        read_records(tmp_path / "p.jsonl")


def test_a_byte_order_mark_may_begin_any_line(tmp_path):
    text = '\ufeff{"clean": [1]}\n\ufeff{"clean": [2]}\n'
    assert read_records(write(tmp_path / "p.jsonl", text)) == [{"clean": [1]}, {"clean": [2]}]


BAD_LINES = [
    ('{"clean": [1]}\r{"clean": [2]}\r', "a carriage return without a newline ends no line"),
    ('{"clean": [1]}\x00', "no JSON at column 15"),
    ('{"clean": "a\x00b"}', "no JSON at column 13"),
    ('{"clean": [' + "1" * 5000 + "]}", "JSON with a number of thousands of digits"),
    ('{"id": ' + "[" * 5000 + "]" * 5000 + "}", "JSON nested too deeply"),
    ("\ufeff", "blank line"),
    ("PAR1\x15\x04", "no JSON at column 1"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_lines_are_refused_in_one_line(tmp_path, line, message):
    for text, place in ((line, ""), ('{"clean": [1]}\n' + line, "line 2: ")):
        if not text.strip("\ufeff"):
            continue
        with pytest.raises(ValueError, match=place + message) as refused:
            read_records(write(tmp_path / "p.jsonl", text))
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_carriage_returns_before_newlines_and_between_tokens_are_space(tmp_path):
    text = '{"clean":\r[1]}\r\n{"clean": [2]}\r\n'
    assert read_records(write(tmp_path / "p.jsonl", text)) == [{"clean": [1]}, {"clean": [2]}]


@given(
    st.binary(max_size=60) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "replace"))
)
@settings(max_examples=200)
def test_whatever_is_in_a_file_gives_records_or_one_line(tmp_path_factory, contents):
    for name in ("p.jsonl", "p.csv"):
        path = tmp_path_factory.getbasetemp() / name
        path.write_bytes(contents)
        try:
            records = read_records(path)
        except ValueError as refused:
            assert name in str(refused) and "\n" not in str(refused) and len(str(refused)) < 400
        else:
            assert records and all(isinstance(record, dict) for record in records)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
fields = ["clean", "text", "corrupt", "answers", "wrong_answers", "positions", "label", "id"]


@given(st.dictionaries(st.sampled_from([*fields, "clean_prefix", "patch_answer"]), json_values))
@settings(max_examples=100)
def test_whatever_is_in_a_line_gives_a_prompt_or_one_line(values):
    try:
        encode_record(parse_line(json.dumps(values)), vocabulary=10)
    except ValueError as refused:
        assert "\n" not in str(refused) and len(str(refused)) < 400
