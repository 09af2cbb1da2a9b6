"""Tasks of text: sound prompts with the tokenizers that serve them, and why others do not."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from circuits.prompts import Prompts, prompts_from_records
from circuits.tasks import TASKS
from circuits.tasks.brackets import Brackets
from circuits.tasks.docstring import Docstring
from circuits.tasks.greater_than import GreaterThan
from circuits.tasks.ioi import NAMES, Ioi
from circuits.tasks.modular_addition import ModularAddition
from circuits.tasks.pronoun import Pronoun
from circuits.tasks.sva import Sva
from circuits.tasks.words import Lexicon

TEXTS = ("ioi", "greater_than", "sva", "docstring", "modular_addition", "brackets", "pronoun")


@pytest.fixture(scope="module")
def gpt2(cases):
    from transformers import GPT2Tokenizer

    folder = cases / "gpt2_tokenizer"
    return GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


@pytest.fixture(scope="module")
def stories(cases):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(cases / "stories260K")


def of_words(*words: str):
    """A tokenizer that knows these words, digits and punctuation."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(("[UNK]", *dict.fromkeys(words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def made(name: str, tokenizer, count: int = 40, **settings) -> tuple[list[dict], Prompts]:
    """Records that the tokenizer serves, and the same encoded, which checks twins and answers."""
    records = TASKS[name].records(TASKS[name].schema(**settings), count, 3, tokenizer)
    return records, prompts_from_records(records, tokenizer=tokenizer, prepend_bos=False)


@pytest.mark.parametrize("name", TEXTS)
def test_a_task_is_served_with_twins_of_equal_length_and_answers_of_one_token(name, gpt2):
    records, prompts = made(name, gpt2)
    assert len(prompts) == len({str(record["clean"]) for record in records}) == 40
    assert prompts.corrupt is not None and prompts.answers is not None
    assert prompts.wrong_answers is not None
    for record in records:
        assert record["clean"] != record["corrupt"]
        assert not set(record["answers"]) & set(record["wrong_answers"])
    again = TASKS[name].records(TASKS[name].schema(), 40, 3, gpt2)
    assert again == records


@pytest.mark.parametrize("name", ["ioi", "greater_than", "sva", "docstring", "pronoun"])
def test_a_model_without_a_tokenizer_has_no_text(name):
    with pytest.raises(ValueError, match=f"task={name} is made of text, but this model has no"):
        TASKS[name].records(TASKS[name].schema(), 4, 0, None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ioi", r"task=ioi needs at least 3 names of one token each.*0 of 28 are \(not Mary, John"),
        ("sva", r"at least 3 nouns of one token each, but .* 0 of 30 are \(not boy/boys"),
        ("docstring", r"at least 16 words of one token each, but .* 1 of 76 are .*in task.words"),
        (
            "modular_addition",
            r"numbers 0 to 112 as single tokens.*10 of 113 are, and 10 is not; lower task.modulus "
            "to 10, or use task.form=tokens",
        ),
        (
            "brackets",
            r"needs 3 kinds of brackets of one token each.*0 are \(none\); use another model, or "
            "use task.form=tokens",
        ),
    ],
)
def test_a_tokenizer_that_serves_no_task_is_told_why(name, message, stories):
    with pytest.raises(ValueError, match=message):
        made(name, stories)


def test_what_a_tokenizer_serves_of_a_task_is_told():
    tokenizer = of_words("=", *"()[]", "mod", "+", *(str(n) for n in range(2, 9)))
    with pytest.raises(ValueError, match=r"2 are \(\(\) \[\]\); lower task.kinds to 2, or use"):
        made("brackets", tokenizer)
    with pytest.raises(ValueError, match="and 0 is not; use another model, or use task.form"):
        made("modular_addition", tokenizer)


# ---- which words ---------------------------------------------------------------------------------


def test_only_words_of_one_token_are_used():
    frame = "When and went to the , gave a to After had been handed Then were at . decided give"
    tokenizer = of_words(*frame.split(), *NAMES[:4], "store", "ring", "It", "is")
    records, prompts = made("ioi", tokenizer)
    assert {record["answers"][0].strip() for record in records} == set(NAMES[:4])
    assert not (prompts.clean[prompts.key_mask] == tokenizer.unk_token_id).any()
    few = of_words(*frame.split(), *NAMES[:2], "store", "ring", "It", "is")
    with pytest.raises(ValueError, match=r"at least 3 names .* 2 of 28 are \(not Tom, James, Dan"):
        made("ioi", few)
    with pytest.raises(ValueError, match=r"at least 1 places .* 0 of 1 are \(not moon\)"):
        made("ioi", tokenizer, places=["moon"])


def test_a_word_is_one_token_only_in_its_place(gpt2):
    lexicon = Lexicon.of("mine", gpt2)
    assert lexicon.is_one(" Mary") and not lexicon.is_one(" Marystone")
    assert lexicon.is_one("ing", "It is") and not lexicon.is_one("ing", "It is walk")
    assert lexicon.kept("words", ["Mary", "Marystone"], 1) == ["Mary"]


def test_words_of_ones_own_are_checked_too(gpt2):
    records, _ = made("ioi", gpt2, names=["Mary", "John", "Tom", "Xzqwv"])
    assert {record["answers"][0] for record in records} == {" Mary", " John", " Tom"}
    with pytest.raises(ValueError, match="nouns holds 'keys', but words are given as singular/pl"):
        made("sva", gpt2, nouns=["keys", "dog/dogs", "cat/cats", "boy/boys"])


def test_induction_is_of_the_tokens_that_a_tokenizer_reads_in_a_text(stories):
    special = set(stories.all_special_ids)
    records, _ = made("induction", stories, count=200)
    prompts = prompts_from_records(records, tokenizer=stories, prepend_bos=True)
    assert prompts.corrupt is not None
    for whole in (prompts.clean, prompts.corrupt):
        assert (whole[:, 0] == stories.bos_token_id).all()
        seen = set(whole[:, 1:].unique().tolist())
        assert special and not special & seen and max(seen) > 400
    everywhere = made("induction", stories, count=200, vocabulary=12, without=[], bos=7)[1]
    assert (everywhere.clean[:, 0] == 7).all()
    assert set(everywhere.clean[:, 1:].unique().tolist()) == set(range(12))


def test_induction_without_a_tokenizer_has_26_ids():
    records = TASKS["induction"].records(TASKS["induction"].schema(), 40, 3, None)
    assert {token for record in records for token in record["clean"]} == set(range(26))


# ---- what each task asks -------------------------------------------------------------------------


@pytest.mark.parametrize("corrupt", ["third", "flip"])
def test_indirect_objects(corrupt, gpt2):
    for record in made("ioi", gpt2, corrupt=corrupt)[0]:
        answer, giver = record["answers"][0].strip(), record["wrong_answers"][0].strip()
        clean = [word for word in re.findall(r"\w+", record["clean"]) if word in NAMES]
        twin = [word for word in re.findall(r"\w+", record["corrupt"]) if word in NAMES]
        assert clean.count(answer) == 1 and clean.count(giver) == 2 and clean[-1] == giver
        assert clean[:2] == twin[:2]
        if corrupt == "flip":
            assert twin[-1] == answer
        else:
            assert twin[-1] not in clean


def test_greater_than_in_pairs(gpt2):
    for record in made("greater_than", gpt2)[0]:
        century, begin = re.search(r"year (\d\d)(\d\d) to the year \1\Z", record["clean"]).groups()
        assert record["corrupt"] == record["clean"].replace(century + begin, f"{century}01")
        assert {int(year) for year in record["answers"]} == set(range(int(begin) + 1, 100))
        assert {int(year) for year in record["wrong_answers"]} == set(range(int(begin) + 1))


def test_greater_than_in_digits(stories):
    """A digit that is the same says nothing yet."""
    assert GreaterThan().fitted(stories).form == "digits"
    for record in made("greater_than", stories)[0]:
        tens = int(re.search(r"year \d\d(\d)\d to", record["clean"]).group(1))
        assert 1 <= tens <= 8
        assert {int(digit) for digit in record["answers"]} == set(range(tens + 1, 10))
        assert {int(digit) for digit in record["wrong_answers"]} == set(range(tens))


def test_greater_than_takes_the_form_that_is_asked_for_or_none(gpt2, stories):
    assert GreaterThan().fitted(gpt2).form == "pairs"
    with pytest.raises(ValueError, match="last two digits are a token each, but .* 0 of 873 are"):
        GreaterThan(form="digits").fitted(gpt2)
    with pytest.raises(ValueError, match="last two digits are one token, but .* 0 of 873 are"):
        GreaterThan(form="pairs").fitted(stories)
    with pytest.raises(ValueError, match="last two digits are one token or a token each, but"):
        GreaterThan().fitted(of_words("The", "year", "the"))


@pytest.mark.parametrize("frames", ["plain", "attractor", "all"])
def test_subjects_and_verbs_agree(frames, gpt2):
    singular = {" is", " was", " has", " does"}
    seen = set()
    for record in made("sva", gpt2, frames=frames)[0]:
        words, twin = record["clean"].split(), record["corrupt"].split()
        differ = [place for place, pair in enumerate(zip(words, twin)) if len(set(pair)) > 1]
        assert len(words) == len(twin) and len(differ) == 1  # only the subject
        one, other = words[differ[0]], twin[differ[0]]
        assert {one, other} == {min(one, other, key=len), min(one, other, key=len) + "s"}
        number = "singular" if len(one) < len(other) else "plural"
        assert record["group"] == number
        assert (set(record["answers"]) == singular) == (number == "singular")
        assert (set(record["wrong_answers"]) == singular) == (number == "plural")
        seen.add(len(words) > differ[0] + 1)
    assert seen == {"plain": {False}, "attractor": {True}, "all": {False, True}}[frames]


def test_docstrings_name_the_next_argument(gpt2):
    for record in made("docstring", gpt2)[0]:
        head, *body = record["clean"].split("\n")
        other, *same = record["corrupt"].split("\n")
        arguments = re.search(r"\(self, (.*)\):", head).group(1).split(", ")
        others = re.search(r"\(self, (.*)\):", other).group(1).split(", ")
        assert body == same and not set(arguments) & set(others)
        told = re.findall(r":param (\w+):", record["clean"])
        assert told == arguments[:2] and record["answers"] == [f" {arguments[2]}"]
        wrong = {word.strip() for word in record["wrong_answers"]}
        assert wrong == set(arguments) - {arguments[2]}
        assert not set(others) & set(re.findall(r"\w+", record["clean"]))


@pytest.mark.parametrize(("kinds", "length"), [(3, 9), (2, 4), (4, 12)])
def test_brackets_close_the_innermost_that_is_open(kinds, length, gpt2):
    closes = dict(zip("([{<", ")]}>"))
    for record in made("brackets", gpt2, kinds=kinds, length=length, count=20)[0]:
        stacks = []
        for text in (record["clean"], record["corrupt"]):
            stack = []
            for bracket in text.removeprefix("=").split():
                if bracket in closes:
                    stack.append(bracket)
                else:
                    assert closes[stack.pop()] == bracket
            stacks.append(stack)
        clean, corrupt = stacks
        assert record["answers"] == [f" {closes[clean[-1]]}"]
        assert clean[:-1] == corrupt[:-1] and clean[-1] != corrupt[-1]
        assert len(record["wrong_answers"]) == kinds - 1


def test_brackets_in_tokens_are_those_in_text(gpt2):
    texts = made("brackets", gpt2)[0]
    tokens = TASKS["brackets"].records(Brackets(), 40, 3, None)
    for text, ids in zip(texts, tokens):
        names = [f"{pair[closes]}" for closes in (0, 1) for pair in ("()", "[]", "{}")]
        assert text["clean"] == "= " + " ".join(names[number] for number in ids["clean"])
        assert text["answers"] == [f" {names[ids['answers'][0]]}"]


@pytest.mark.parametrize("modulus", [7, 50])
def test_sums_in_text_and_in_tokens(modulus, gpt2):
    for record in made("modular_addition", gpt2, modulus=modulus, count=30)[0]:
        one, other, p = map(int, re.findall(r"\d+", record["clean"]))
        twin = int(re.findall(r"\d+", record["corrupt"])[1])
        assert p == modulus and record["answers"] == [f" {(one + other) % p}"]
        assert record["wrong_answers"] == [f" {(one + twin) % p}"] and twin != other
    for record in TASKS["modular_addition"].records(ModularAddition(modulus=modulus), 30, 0, None):
        one, other, equals = record["clean"]
        assert equals == modulus and record["answers"] == [(one + other) % modulus]


def test_sums_up_to_what_digits_allow(stories):
    served = ModularAddition(modulus=10).fitted(stories)
    assert (served.form, served.spaced) == ("text", False)
    records, prompts = made("modular_addition", stories, modulus=10, count=20)
    assert all(record["clean"].endswith("= ") for record in records) and len(prompts) == 20
    assert ModularAddition(form="tokens").fitted(stories).form == "tokens"


def test_pronouns_keep_pairs_of_equal_length(gpt2, stories):
    assert Pronoun(names="all").fitted(stories) == Pronoun(names="all")  # made for it
    served = Pronoun(names="all").fitted(gpt2)
    assert served.subjects and "The boy" in served.subjects
    for record in made("pronoun", gpt2, names="all", count=200)[0]:
        assert len(gpt2.encode(record["clean"])) == len(gpt2.encode(record["corrupt"]))
    out = {"Tim", "Max", "Leo", "Jimmy"} - set(served.subjects)
    for male in out:
        records = TASKS["pronoun"].generate(Pronoun(names="all", subjects=[male]), 20, 0)
        assert any(len(gpt2.encode(r["clean"])) != len(gpt2.encode(r["corrupt"])) for r in records)
    with pytest.raises(ValueError, match="needs he, she, He, She as one token each, but"):
        Pronoun().fitted(of_words("he", "she"))


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "count", "message"),
    [
        ("ioi", Ioi(corrupt="both"), 1, "corrupt='both' is none of third, flip"),
        ("ioi", Ioi(names=["Mary", "John"]), 1, "2 names, but at least 3 are needed"),
        (
            "ioi",
            Ioi(names=["Mary", "John", "Tom"], places=["store"], things=["ring"]),
            49,
            "count=49, but with 3 names only 48 different prompts were found",
        ),
        ("ioi", Ioi(), 0, "count=0, but with 28 names"),
        ("greater_than", GreaterThan(form="words"), 1, "form='words' is none of pairs, digits"),
        ("greater_than", GreaterThan(years=[1799]), 1, "none of 1 years ends in 02 to 98"),
        ("sva", Sva(frames="long"), 1, "frames='long' is none of plain, attractor, all"),
        ("sva", Sva(nouns=["key/keys"]), 1, "1 nouns, but at least 2 are needed"),
        ("docstring", Docstring(words=["one"]), 1, "1 different words, but a prompt needs 16"),
        ("brackets", Brackets(kinds=1), 1, "kinds=1, but form=None has 2 to"),
        ("brackets", Brackets(kinds=5, form="text"), 1, "kinds=5, but form=text has 2 to 4"),
        ("brackets", Brackets(length=0), 1, "length=0, but it must be at least 1"),
        ("brackets", Brackets(length=4, deepest=1), 1, "length=4 with deepest=1 leaves no bracket"),
        ("brackets", Brackets(form="words"), 1, "form='words' is none of text, tokens"),
        ("modular_addition", ModularAddition(modulus=1), 1, "modulus=1, but it must be at least 2"),
        (
            "modular_addition",
            ModularAddition(modulus=3),
            10,
            "count=10, but modulus=3 gives 1 to 9",
        ),
        ("modular_addition", ModularAddition(form="x"), 1, "form='x' is none of text, tokens"),
    ],
)
def test_settings_that_make_no_prompts_are_refused(name, config, count, message):
    with pytest.raises(ValueError, match=message):
        TASKS[name].generate(config, count, 0)


def test_every_prompt_there_is_can_be_drawn():
    config = Ioi(names=["Mary", "John", "Tom"], places=["store"], things=["ring"])
    records = TASKS["ioi"].generate(config, 48, 0)  # 4 frames, 6 pairs, either gives
    assert len({record["clean"] for record in records}) == 48
    everything = TASKS["modular_addition"].generate(ModularAddition(modulus=5), 25, 0)
    assert len({tuple(record["clean"]) for record in everything}) == 25


def test_a_form_that_is_set_is_kept(gpt2):
    assert Brackets(form="tokens").fitted(gpt2) == Brackets(form="tokens")
    assert replace(Brackets(), form="tokens") == Brackets().fitted(None)


def test_the_command_says_why_a_model_cannot_serve_a_task(cases, tmp_path, capsys):
    from mad.commands.main import main

    model = f"model={cases / 'stories260K'}"
    assert main(["extract", "task=ioi", model, f"out={tmp_path / 'run'}"]) == 1
    error = capsys.readouterr().err
    assert "task=ioi needs at least 3 names of one token each" in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()
    words = ["task=greater_than", "metric=prob_diff", "check=true", "splits.discovery=20"]
    assert main(["extract", model, *words, f"out={tmp_path / 'run'}"]) == 0
    assert "20 discovery" in capsys.readouterr().out
