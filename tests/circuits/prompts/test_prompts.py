"""Prompts: encoding of records, padding, selection, splits, and the file formats."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from circuits.model.load import load_model
from circuits.prompts import Prompts, collate, prompts_from_records
from circuits.prompts.encoding import encode_record


class Words:
    """A tokenizer in the manner of SentencePiece: a word takes the space before it, "ing" and "s"
    are cut off.
    """

    pieces = ["<unk>", "<s>", "▁", "▁so", "▁he", "▁she", "he", "▁play", "ing", "▁was", "▁it", ","]
    unk_token_id = 0

    def __init__(self, bos: int | None = 1, begins: bool = False) -> None:
        self.bos_token_id, self.begins = bos, begins

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        rest, tokens = "▁" + text.replace(" ", "▁") if text else "", []
        if add_special_tokens and self.begins:
            tokens.append(self.bos_token_id)
        while rest:
            piece = max((p for p in self.pieces[2:] if rest.startswith(p)), key=len, default=None)
            tokens.append(0 if piece is None else self.pieces.index(piece))
            rest = rest[1 if piece is None else len(piece) :]
        return tokens

    def decode(self, tokens: list[int], **_: object) -> str:
        return "".join(self.pieces[token] for token in tokens).replace("▁", " ").removeprefix(" ")

    def convert_tokens_to_ids(self, piece: str) -> int:
        return self.pieces.index(piece) if piece in self.pieces else 0

    def convert_ids_to_tokens(self, tokens: list[int]) -> list[str]:
        return [self.pieces[token] for token in tokens]


@pytest.fixture(scope="module")
def stories(cases):
    folder = cases / "stories260K"
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def gpt2(cases):
    folder = cases / "gpt2_tokenizer"
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


# --------------------------------------------------------------------------------------------------
# encoding a record


def test_text_gets_bos_once():
    assert encode_record({"clean": "so he"}, tokenizer=Words()).clean == (3, 4)
    assert encode_record({"clean": "so he"}, tokenizer=Words(), prepend_bos=True).clean == (1, 3, 4)
    assert encode_record({"clean": [1, 3, 4]}, tokenizer=Words(), prepend_bos=True).clean == (
        1,
        3,
        4,
    )


def test_bos_and_vocabulary_are_the_tokenizers_own_unless_said_otherwise():
    begins = Words(begins=True)
    assert encode_record({"clean": "so he"}, tokenizer=begins).clean == (1, 3, 4)
    assert encode_record({"clean": "so"}, tokenizer=begins, prepend_bos=False).clean == (3,)
    prompts = prompts_from_records([{"clean": "so he"}, {"clean": [1, 11]}], tokenizer=begins)
    assert prompts.sequences() == [(1, 3, 4), (1, 11)]
    with pytest.raises(ValueError, match="^record 1: clean begins with token 3.* begin with BOS"):
        prompts_from_records([{"clean": [3, 4]}], tokenizer=begins)
    with pytest.raises(ValueError, match="^record 1: clean holds token 12.* from 0 to 11$"):
        prompts_from_records([{"clean": [1, 12]}], tokenizer=begins)
    wider = prompts_from_records([{"clean": [1, 12]}], tokenizer=begins, vocabulary=16)
    assert wider.sequences() == [(1, 12)]


def test_a_model_and_its_tokenizer_alone_read_the_same(stories, cases):
    model = load_model(str(cases / "stories260K"))
    records = [{"clean": "The boy was sad, so", "answers": [" he"]}, {"clean": "She ran"}]
    for record in records:
        assert equal(
            model.prompts([record]), prompts_from_records([record], tokenizer=model.tokenizer)
        )
    with pytest.raises(ValueError, match="token ids run from 0 to 511"):
        prompts_from_records([{"clean": [1, 512]}], tokenizer=stories)


def test_answers_at_one_position_may_be_flat_and_wrong_answers_empty():
    for positions in ({}, {"positions": [0]}):
        for answers in ([5, 6], [[5, 6]] if positions else [5, 6]):
            encoded = encode_record({"clean": [1, 2], **positions, "answers": answers})
            assert encoded.answers == ((5, 6),)
    for empty in ([], [[]], [[], []]):
        record = {"clean": [1, 2], "positions": [0, 1], "answers": [[5], [6]]}
        encoded = encode_record({**record, "wrong_answers": empty})
        assert encoded.wrong_answers is None and encoded.answers == ((5,), (6,))


def test_clean_may_be_called_text_and_null_means_absent():
    nothing = dict.fromkeys(
        ("clean", "corrupt", "answers", "wrong_answers", "positions", "label", "id")
    )
    encoded = encode_record({**nothing, "text": [5, 6]}, default_id="line 9")
    assert encoded == encode_record({"clean": [5, 6]}, default_id="line 9")
    assert (encoded.corrupt, encoded.answers, encoded.wrong_answers, encoded.label) == (
        None,
        None,
        None,
        None,
    )
    assert (encoded.positions, encoded.id) == ((1,), "line 9")


@pytest.mark.parametrize(
    ("clean", "answer", "token"),
    [
        ("it was so", " he", 4),  # the usual case: the space belongs to the word
        ("it was so ", "he", 6),  # a space alone has been read already
        ("play", "ing", 8),
        ([10, 9, 3], " he", 4),
        ([10, 9, 3], 5, 5),
    ],
)
def test_an_answer_is_one_token_in_its_place(clean, answer, token):
    encoded = encode_record(
        {"clean": clean, "answers": [answer]}, tokenizer=Words(), prepend_bos=False
    )
    assert encoded.answers == ((token,),)


@pytest.mark.parametrize("answer", ["", " playing", " xylophone", "x", " he he"])
def test_other_answers_are_refused_by_name(answer):
    with pytest.raises(ValueError, match="answers holds " + repr(answer)):
        encode_record({"clean": "it was so ", "answers": [answer]}, tokenizer=Words())


def test_answers_at_positions_inside_the_text():
    record = {"clean": "it was so he", "positions": [-2, 0], "answers": [[" she", " he"], [5]]}
    encoded = encode_record(record, tokenizer=Words(), prepend_bos=True)
    assert encoded.clean == (1, 10, 9, 3, 4)
    assert encoded.positions == (3, 0)
    assert encoded.answers == ((5, 4), (5,))


def test_an_answer_named_twice_counts_once():
    assert encode_record({"clean": "so", "answers": [" he", 4]}, tokenizer=Words()).answers == (
        (4,),
    )


def test_answers_of_real_tokenizers(stories, gpt2):
    he = stories.convert_tokens_to_ids("▁he")
    record = {"clean": "The boy was sad, so", "corrupt": "The girl was sad, so", "answers": [" he"]}
    encoded = encode_record(record, tokenizer=stories, prepend_bos=True)
    assert encoded.answers == ((he,),) and encoded.clean[0] == stories.bos_token_id
    spaced = encode_record({"clean": "The boy was sad, so ", "answers": ["he"]}, tokenizer=stories)
    assert spaced.answers == ((stories.convert_tokens_to_ids("he"),),)
    with pytest.raises(ValueError, match="' elephant'"):
        encode_record({"clean": "The boy saw an", "answers": [" elephant"]}, tokenizer=stories)
    # " 1776" is one token of GPT-2, but after " 17" the model goes on with "76"
    years = encode_record(
        {"clean": "from the year 1732 to the year 17", "answers": ["76", "33"]}, tokenizer=gpt2
    )
    assert years.answers == ((gpt2.convert_tokens_to_ids("76"), gpt2.convert_tokens_to_ids("33")),)
    assert encode_record({"clean": "Hello world", "answers": ["!"]}, tokenizer=gpt2).clean == (
        15496,
        995,
    )


def nested(levels: int) -> list:
    """A list in a list in a list."""
    made: list = []
    for _ in range(levels):
        made = [made]
    return made


BAD_RECORDS = [
    (["clean"], {}, "no object"),
    ({}, {}, "clean is missing"),
    ({"corrupt": [1]}, {}, r"clean is missing among \['corrupt'\]; give clean or text"),
    (
        {"clean": [1], "text": [1]},
        {},
        "both clean and text are given, which mean the same; keep one",
    ),
    ({"clean": 7}, {}, "clean=7 is neither text nor a list of token ids"),
    ({"clean": [1], "corrupt": {}}, {}, "corrupt={} is neither text nor a list"),
    ({"clean": []}, {}, "clean is empty; give at least one token"),
    ({"clean": ""}, {"tokenizer": Words(), "prepend_bos": True}, "clean is empty"),
    ({"clean": [1], "corrupt": []}, {}, "corrupt is empty"),
    (
        {"clean": "so"},
        {},
        "clean='so' is text, but there is no tokenizer; give a tokenizer or token ids",
    ),
    ({"clean": "\ud800"}, {"tokenizer": Words()}, "no valid Unicode"),
    ({"clean": [1, 2.0]}, {}, "clean holds 2.0, which is no token id"),
    ({"clean": [True]}, {}, "clean holds True, which is no token id"),
    (
        {"clean": [3, 26]},
        {"vocabulary": 26},
        "clean holds token 26, but token ids run from 0 to 25",
    ),
    ({"clean": [-1]}, {}, "clean holds token -1, but token ids run from 0 to 2147483647"),
    ({"clean": [2**70]}, {}, "token ids run from 0 to 2147483647"),
    (
        {"clean": [1], "corrupt": [9]},
        {"vocabulary": 5},
        "corrupt holds token 9, but token ids run from 0 to 4",
    ),
    (
        {"clean": "so he"},
        {"tokenizer": Words(), "vocabulary": 4},
        "clean holds token 4, but token ids run from 0 to 3",
    ),
    (
        {"clean": [1], "answers": [9]},
        {"vocabulary": 5},
        "answers holds token 9, but token ids run from 0 to 4",
    ),
    (
        {"clean": [1, 2], "corrupt": [1]},
        {},
        "clean has 2 tokens and corrupt has 1; .*reword one of them",
    ),
    ({"clean": [1, 2, 3]}, {"max_length": 2}, "clean has 3 tokens, but max_length=2; shorten it"),
    (
        {"clean": "so he"},
        {"max_length": 2, "tokenizer": Words(), "prepend_bos": True},
        "clean has 3 tokens with BOS, but max_length=2",
    ),
    ({"clean": [1]}, {"prepend_bos": True}, "prepend_bos=True, but there is no tokenizer"),
    (
        {"clean": [1]},
        {"prepend_bos": True, "tokenizer": Words(bos=None)},
        "the tokenizer has no BOS token; set prepend_bos",
    ),
    (
        {"clean": [3, 4]},
        {"prepend_bos": True, "tokenizer": Words()},
        "clean begins with token 3, but prepend_bos=True and token ids are taken as they are; "
        "begin with BOS, 1",
    ),
    ({"clean": [1], "positions": 0}, {}, "positions=0 is no list of positions"),
    ({"clean": [1], "positions": []}, {}, r"positions=\[\] is no list of positions; leave it out"),
    ({"clean": [1], "positions": ["0"]}, {}, "positions holds '0'; positions are whole numbers"),
    (
        {"clean": [1, 2], "positions": [2]},
        {},
        "positions holds 2, but the prompt has 2 tokens; stay within -2 to 1",
    ),
    ({"clean": [1, 2], "positions": [-3]}, {}, "positions holds -3, but the prompt has 2 tokens"),
    (
        {"clean": [1, 2], "positions": [1, -1]},
        {},
        r"positions=\[1, -1\] names a token of this prompt twice",
    ),
    (
        {"clean": [1], "answers": 5},
        {},
        "answers=5 is no list of answers; list at least one, or leave answers out",
    ),
    ({"clean": [1], "answers": []}, {}, r"answers=\[\] is no list of answers"),
    ({"clean": [1], "wrong_answers": {}}, {}, "wrong_answers={} is no list of answers"),
    ({"clean": [1], "wrong_answers": "he"}, {}, "wrong_answers='he' is no list of answers"),
    ({"clean": [1], "answers": [[5]]}, {}, r"answers holds \[5\], which is no token id"),
    (
        {"clean": [1], "answers": [" he"]},
        {},
        "answers holds the text ' he', but there is no tokenizer",
    ),
    (
        {"clean": [1, 2], "positions": [0, 1], "answers": [[5]]},
        {},
        r"answers=\[\[5\]\] does not fit 2 positions",
    ),
    (
        {"clean": [1, 2], "positions": [0, 1], "answers": [5, 6]},
        {},
        r"answers=\[5, 6\] does not fit 2 positions",
    ),
    (
        {"clean": [1, 2], "positions": [0], "answers": [5, [6]]},
        {},
        r"answers=\[5, \[6\]\] does not fit 1 positions",
    ),
    (
        {"clean": [1, 2], "positions": [0, 1], "wrong_answers": [[], [5]]},
        {},
        r"wrong_answers=\[\[\], \[5\]\] does not fit 2 positions; .* not empty",
    ),
    ({"clean": [10**4000]}, {}, r"clean holds token 10{56}\.\.\., but token ids"),
    ({"clean": [1], "positions": [-(10**4000)]}, {}, r"positions holds -10{55}\.\.\., but"),
    ({"clean": [1], "id": nested(100_000)}, {}, "id=list too large to show is neither"),
    ({"clean": [12]}, {"tokenizer": Words()}, "token 12, but token ids run from 0 to 11"),
    (
        {"clean": [1, 2], "positions": [0], "answers": [[]]},
        {},
        r"answers=\[\[\]\] does not fit 1 positions",
    ),
    (
        {"clean": [1], "answers": [5], "wrong_answers": [6, 5]},
        {},
        "token 5 is in answers and in wrong_answers",
    ),
    ({"clean": [1], "label": 2}, {}, "label=2 is neither 0 .normal. nor 1 .anomalous."),
    ({"clean": [1], "label": True}, {}, "label=True is neither"),
    ({"clean": [1], "id": [1]}, {}, r"id=\[1\] is neither text nor a whole number"),
]


@pytest.mark.parametrize(("record", "options", "message"), BAD_RECORDS)
def test_bad_records_are_refused_in_one_line(record, options, message):
    with pytest.raises(ValueError, match=message) as refused:
        encode_record(record, **options)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_the_message_names_the_record():
    with pytest.raises(ValueError, match="^record 2: clean is missing"):
        prompts_from_records([{"clean": [1]}, {}])
    with pytest.raises(ValueError, match="^record 2, id 'x': clean is empty"):
        prompts_from_records([{"clean": [1]}, {"clean": [], "id": "x"}])


# --------------------------------------------------------------------------------------------------
# sets of prompts

tokens = st.lists(st.integers(0, 30), min_size=1, max_size=6)


@st.composite
def records(draw, fewest: int = 1):
    """Records that have the same fields, of ragged lengths."""
    corrupt, answers, labels, positions = (draw(st.booleans()) for _ in range(4))
    drawn = []
    for _ in range(draw(st.integers(fewest, 6))):
        record = {"clean": draw(tokens)}
        length = len(record["clean"])
        if corrupt:
            record["corrupt"] = draw(st.lists(st.integers(0, 30), min_size=length, max_size=length))
        if positions:
            absolute = draw(
                st.lists(st.integers(0, length - 1), min_size=1, max_size=3, unique=True)
            )
            record["positions"] = [p - length if draw(st.booleans()) else p for p in absolute]
        if answers:
            right = st.lists(st.integers(0, 15), min_size=1, max_size=3, unique=True)
            wrong = st.lists(st.integers(16, 30), min_size=1, max_size=3, unique=True)
            for field, choices in (("answers", right), ("wrong_answers", wrong)):
                record[field] = (
                    [draw(choices) for _ in record["positions"]] if positions else draw(choices)
                )
        if labels:
            record["label"] = draw(st.integers(0, 1))
        drawn.append(record)
    return drawn


def equal(first: Prompts, second: Prompts) -> bool:
    """Whether all fields are alike, padding included."""

    def same(a: object, b: object) -> bool:
        return (
            torch.equal(a, b)
            if isinstance(a, Tensor) and isinstance(b, Tensor)
            else a is b or a == b
        )

    return all(
        same(getattr(first, field.name), getattr(second, field.name)) for field in fields(Prompts)
    )


@given(records())
def test_prompts_hold_what_the_records_say(given_records):
    prompts = prompts_from_records(given_records, vocabulary=31)
    assert len(prompts) == len(given_records)
    for row, record in enumerate(given_records):
        length = len(record["clean"])
        assert prompts.key_mask[row].tolist() == [True] * length + [False] * (
            prompts.clean.shape[1] - length
        )
        assert prompts.clean[row, :length].tolist() == record["clean"]
        assert not prompts.clean[row, length:].any()
        if "corrupt" in record:
            assert prompts.corrupt[row, :length].tolist() == record["corrupt"]
            assert not prompts.corrupt[row, length:].any()
        positions = prompts.positions[row][prompts.positions[row] >= 0].tolist()
        assert positions == [p % length for p in record.get("positions", [-1])]
        for field in ("answers", "wrong_answers"):
            if field in record:
                expected = record[field] if "positions" in record else [record[field]]
                here = [
                    [a for a in place if a != -1] for place in getattr(prompts, field)[row].tolist()
                ]
                assert here == expected + [[]] * (len(here) - len(expected))
            else:
                assert getattr(prompts, field) is None
        assert prompts.labels is None or prompts.labels[row] == record["label"]
    assert prompts.ids == tuple(f"record {row}" for row in range(1, len(given_records) + 1))


@given(records(), st.data())
def test_select_is_collate_of_the_selected(given_records, data):
    encoded = [
        encode_record(record, default_id=str(row)) for row, record in enumerate(given_records)
    ]
    chosen = data.draw(st.lists(st.integers(0, len(encoded) - 1), min_size=1, max_size=8))
    prompts = collate(encoded)
    assert equal(prompts.select(chosen), collate([encoded[row] for row in chosen]))
    assert equal(prompts.select(torch.tensor(chosen)), prompts.select(chosen))
    mask = torch.zeros(len(encoded), dtype=torch.bool)
    mask[chosen] = True
    assert equal(prompts.select(mask), prompts.select(sorted(set(chosen))))


@given(records(), st.integers(1, 4))
def test_batches_are_the_prompts_in_order(given_records, size):
    prompts = prompts_from_records(given_records)
    batches = list(prompts.batches(size))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert [sequence for batch in batches for sequence in batch.sequences()] == prompts.sequences()
    assert all(batch.clean.shape[1] == batch.lengths.max() for batch in batches)


@given(records(), st.randoms())
def test_hash_ignores_order_ids_and_padding(given_records, random):
    prompts = prompts_from_records(given_records)
    order = list(range(len(prompts)))
    random.shuffle(order)
    assert prompts.select(order).hash() == prompts.hash()
    renamed = [{**given_records[row], "id": str(row)} for row in order]
    assert prompts_from_records(renamed + renamed[:1]).hash() == prompts.hash()


@pytest.mark.parametrize(
    "change",
    [
        {"clean": [1, 2, 4]},
        {"clean": [1, 2, 3, 0]},
        {"corrupt": [1, 2, 5]},
        {"positions": [0], "answers": [[7]], "wrong_answers": [[8]]},
        {"answers": [6]},
        {"wrong_answers": [9]},
        {"label": 1},
    ],
)
def test_hash_sees_every_content(change):
    record = {"clean": [1, 2, 3], "answers": [7], "wrong_answers": [8], "label": 0}
    assert (
        prompts_from_records([record]).hash() != prompts_from_records([{**record, **change}]).hash()
    )


def test_hash_is_the_same_tomorrow():
    assert (
        prompts_from_records([{"clean": [1, 2], "answers": [3]}])
        .hash()
        .startswith("e8b4932915dd24e6")
    )


def test_deduplicated_keeps_the_first_of_each_clean_sequence():
    prompts = prompts_from_records(
        [{"clean": c, "id": i} for i, c in enumerate([[1], [1, 0], [1], [2], [2]])]
    )
    assert prompts.deduplicated().ids == ("0", "1", "3")


def test_overlap_counts_shared_clean_sequences():
    first = prompts_from_records([{"clean": c} for c in ([1], [2], [2], [3, 0])])
    second = prompts_from_records([{"clean": c} for c in ([2], [3], [1], [1], [5, 5, 5])])
    assert first.overlap(second) == second.overlap(first) == 2


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=20)
def test_split_is_disjoint_and_repeatable(seed, first, second):
    prompts = prompts_from_records([{"clean": [n % 12, n % 12]} for n in range(24)])
    parts = prompts.split({"discovery": first, "calibration": second}, seed)
    assert {name: len(part) for name, part in parts.items()} == {
        "discovery": first,
        "calibration": second,
    }
    assert parts["discovery"].overlap(parts["calibration"]) == 0
    again = prompts.split({"discovery": first, "calibration": second}, seed)
    assert all(equal(parts[name], again[name]) for name in parts)


def test_split_shuffles():
    prompts = prompts_from_records([{"clean": [n]} for n in range(50)])
    orders = {prompts.split({"all": 50}, seed)["all"].ids for seed in range(3)} | {prompts.ids}
    assert len(orders) == 4


def test_sets_refuse_what_they_cannot_do():
    prompts = prompts_from_records([{"clean": [n % 5]} for n in range(8)])
    with pytest.raises(
        ValueError, match="a=3, b=3 make 6 prompts, but only 5 of 8 are different; lower the sizes"
    ):
        prompts.split({"a": 3, "b": 3}, seed=0)
    with pytest.raises(ValueError, match="a=0, but a part needs at least 1 prompt"):
        prompts.split({"a": 0}, seed=0)
    with pytest.raises(ValueError, match="size=0, but a batch needs at least 1 prompt"):
        prompts.batches(0)
    with pytest.raises(
        ValueError, match="indices from -1 to 8, but there are 8 prompts; stay within 0 to 7"
    ):
        prompts.select([-1, 8])
    with pytest.raises(ValueError, match=r"a mask of shape \(3,\), but there are 8 prompts"):
        prompts.select(torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="there are no prompts; give at least one"):
        prompts_from_records([])


def test_a_selection_of_nothing_is_empty():
    prompts = prompts_from_records([{"clean": [1, 2], "answers": [3]}])
    nothing = prompts.select([])
    assert (len(nothing), nothing.clean.shape, nothing.ids) == (0, (0, 0), ())
    assert list(nothing.batches(3)) == [] and nothing.overlap(prompts) == 0


@pytest.mark.parametrize(
    ("field", "value"), [("corrupt", [2]), ("answers", [5]), ("wrong_answers", [5]), ("label", 0)]
)
def test_all_or_none_have_a_field(field, value):
    given_records = [
        {"clean": [1], field: value},
        {"clean": [2], field: value},
        {"clean": [3], "id": "bare"},
    ]
    with pytest.raises(
        ValueError, match=f"'bare' has no {field}, which 2 of 3 prompts have; give {field} to all"
    ):
        prompts_from_records(given_records)


def test_to_moves_every_tensor():
    record = {"clean": [1], "corrupt": [2], "answers": [3], "wrong_answers": [4], "label": 0}
    moved = prompts_from_records([record]).to("meta")
    tensors = [
        getattr(moved, field.name)
        for field in fields(moved)
        if field.name not in ("ids", "features")
    ]
    assert len(tensors) == 7 and all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.key_mask.device.type == "meta"


def test_features_go_with_their_prompts():
    records = [{"clean": [1, 2], "features": {"kind": k, "size": n}} for n, k in enumerate("aba")]
    prompts = prompts_from_records(records)
    assert prompts.features == {"kind": ("a", "b", "a"), "size": (0, 1, 2)}
    assert prompts.select([2, 1]).features == {"kind": ("a", "b"), "size": (2, 1)}
    assert prompts_from_records([{"clean": [1]}]).features == {}
    for features, message in (
        ([1], "features=.* is no object"),
        ({"kind": 1.5}, "features: .*kind.* is 1.5, which is neither text nor a whole number"),
        ({"other": 1}, "'record 2' lacks the feature 'kind', unlike 'record 1'|has the feature"),
    ):
        with pytest.raises(ValueError, match=message):
            prompts_from_records([records[0], {"clean": [1, 2], "features": features}])
