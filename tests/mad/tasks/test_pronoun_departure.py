"""Pronouns that something else decides: the records read independently, and what the model makes of
them.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest

from circuits.prompts import prompts_from_records
from circuits.tasks import pronoun
from circuits.tasks.pronoun import Pronoun
from mad.tasks import ANOMALY_TASKS, TASKS, pronoun_departure
from mad.tasks.pronoun_departure import HOWS, PronounDeparture, generate, groups

SIZES = {"trusted": 2160, "normal_iid": 1000, "normal_shift": 1000, "anomaly": 1000, "seed": 0}
MEN = {"Tim", "Max", "Bob", "Jim", "Tommy", "Benny", "Roy", "Jack", "John"}
WOMEN = {"Lily", "Mia", "Sara", "Sally", "Lisa", "Lucy", "Ella", "Sarah", "Anna"}
NEW_WORDS = {"were", "It", "No", "no", "He", "She"}  # of the anomalies, as the module claims


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def read(text: str) -> tuple[str, str, str]:
    """What decides an anomaly's pronoun, the pronoun, and that of the person named first."""
    people = [word for word in words(text) if word in MEN | WOMEN]
    genders = ["he" if person in MEN else "she" for person in people]
    if re.search(r"\b(He|She)\b", text):
        return (
            "repeated",
            [word.lower() for word in words(text) if word in ("He", "She")][-1],
            genders[0],
        )
    if re.search(r"[A-Z]\w+ and [A-Z]\w+", text):
        return "two_people", "they", genders[0]
    return (
        "corrected" if re.search(r"\b([Nn]o|[Nn]ot|It)\b", text) else "two_people",
        genders[-1],
        genders[0],
    )


@pytest.fixture(scope="module")
def drawn():
    return groups(PronounDeparture(), **SIZES)


@pytest.fixture(scope="module")
def anomalies():
    return groups(PronounDeparture(), 0, 0, 0, 3000, 0)["anomaly"]


# --------------------------------------------------------------------------------------------------
# without the model


def test_no_prompt_occurs_twice(drawn):
    records = [record for group in drawn.values() for record in group]
    assert {group: len(members) for group, members in drawn.items()} == {
        "trusted": 2160,
        "normal_iid": 1000,
        "normal_shift": 1000,
        "anomaly": 1000,
    }
    assert (
        len({record["clean"] for record in records})
        == len({record["id"] for record in records})
        == len(records)
    )
    assert all(record["group"] == group for group, members in drawn.items() for record in members)
    assert all(record["label"] == int(record["group"] == "anomaly") for record in records)


def test_no_anomaly_is_a_normal_prompt():
    normal = {record["clean"] for record in pronoun.all_prompts()}
    everything = groups(PronounDeparture(), 0, 0, 0, 10530, 0)["anomaly"]
    clean = {record["clean"] for record in everything}
    assert len(clean) == len(everything) and not clean & normal


def test_normals_are_pronoun_prompts_of_their_groups(drawn):
    originals = {record["clean"]: record for record in pronoun.all_prompts()}
    for group in ("trusted", "normal_iid", "normal_shift"):
        for record in drawn[group]:
            original = originals[record["clean"]]
            novel = {field for field in ("names", "frames") if original[field] == "shifted"}
            expected = {"names": {"names"}, "frames": {"frames"}, "both": {"names", "frames"}}
            assert novel == expected.get(record.get("novelty"), set())
            assert (record["corrupt"], record["answers"]) == (
                original["corrupt"],
                original["answers"],
            )
            they = " They" if original["answers"][0][1].isupper() else " they"
            assert record["wrong_answers"] == [*original["wrong_answers"], they]


def test_parts_are_equal(drawn):
    assert Counter(record["novelty"] for record in drawn["normal_shift"]) == {
        "names": 334,
        "frames": 333,
        "both": 333,
    }
    assert Counter(record["how"] for record in drawn["anomaly"]) == {
        "two_people": 334,
        "corrected": 333,
        "repeated": 333,
    }
    kinds = Counter((record["how"], record["kind"]) for record in drawn["anomaly"])
    assert len(kinds) == 6 and min(kinds.values()) >= 50
    assert kinds["repeated", "agree"] > 3 * kinds["repeated", "disagree"]


def test_answers_follow_from_the_sentence(anomalies):
    for record in anomalies:
        how, answer, normal = read(record["clean"])
        case = str.capitalize if record["clean"].endswith(".") else str.lower
        assert record["how"] == how, record
        assert record["answers"] == [f" {case(answer)}"], record
        others = {"he", "she", "they"} - {answer}
        assert set(record["wrong_answers"]) == {f" {case(other)}" for other in others}
        assert record["normal_answers"] == [f" {case(normal)}"]
        assert record["kind"] == ("agree" if answer == normal else "disagree")


def test_corrupt_partner_turns_every_gender(anomalies):
    turned = {"he": "she", "she": "he", "they": "they"}
    for record in anomalies:
        clean, corrupt = words(record["clean"]), words(record["corrupt"])
        persons = MEN | WOMEN | {"He", "She"}
        assert [a if a in persons else b for a, b in zip(clean, corrupt, strict=True)] == clean
        assert read(record["corrupt"]) == (
            record["how"],
            *(turned[word] for word in read(record["clean"])[1:]),
        )


def test_vocabulary_is_the_trusted_one(anomalies):
    trusted = {
        word
        for record in pronoun.generate(Pronoun(), 3160, seed=0)
        for word in words(record["clean"])
    }
    assert {word for record in anomalies for word in words(record["clean"])} - trusted == NEW_WORDS


def test_draws_are_repeatable_and_differ_by_seed(drawn):
    sizes = {"trusted": 50, "normal_iid": 50, "normal_shift": 50, "anomaly": 50}
    first, other = (groups(PronounDeparture(), **sizes, seed=seed) for seed in (0, 1))
    assert first == groups(PronounDeparture(), **sizes, seed=0)
    for group in first:
        assert [record["clean"] for record in first[group]] != [
            record["clean"] for record in other[group]
        ]
    assert first["trusted"] == drawn["trusted"][:50] and first["anomaly"] == drawn["anomaly"][:50]
    assert generate(PronounDeparture(), 50, seed=1) == other["trusted"]


def test_one_sort_only():
    config = PronounDeparture(novelty="both", how="corrected")
    records = groups(config, 0, 0, 656, 3510, 0)
    assert {record["novelty"] for record in records["normal_shift"]} == {"both"}
    assert {record["how"] for record in records["anomaly"]} == {"corrected"}


@pytest.mark.parametrize(
    ("config", "sizes", "message"),
    [
        (
            {"novelty": "words"},
            {},
            "novelty='words' is none of names, frames, both, all; choose one of them",
        ),
        (
            {"how": "planted"},
            {},
            "how='planted' is none of two_people, corrected, repeated, all; choose one",
        ),
        ({}, {"trusted": 3161}, "trusted=3161, but there are 0 to 3160 prompts"),
        ({}, {"trusted": -1}, "trusted=-1, but there are 0 to 3160 prompts"),
        (
            {},
            {"trusted": 2000, "normal_iid": 1161},
            "normal_iid=1161, but there are 0 to 1160 prompts",
        ),
        ({}, {"normal_shift": 1969}, "normal_shift=1969, but there are 0 to 1968 prompts"),
        (
            {"novelty": "both"},
            {"normal_shift": 657},
            "normal_shift=657, but there are 0 to 656 prompts",
        ),
        (
            {},
            {"anomaly": 10531},
            "anomaly=10531, but there are 0 to 10530 prompts to draw from; choose a number",
        ),
    ],
)
def test_refuses(config, sizes, message):
    with pytest.raises(ValueError, match=message):
        groups(PronounDeparture(**config), **{**SIZES, **sizes})


def test_generate_refuses_no_prompts():
    with pytest.raises(ValueError, match="count=0, but there must be at least 1 prompt; raise it"):
        generate(PronounDeparture(), 0, seed=0)


def test_is_registered():
    task = ANOMALY_TASKS["pronoun_departure"]
    assert (task.schema, task.generate, task.groups) == (PronounDeparture, generate, groups)
    assert task.recipe is None and TASKS["pronoun_departure"] is task


# --------------------------------------------------------------------------------------------------
# with the model


@pytest.fixture(scope="module")
def stories(cases):
    folder = cases / "stories260K"
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def accuracy(stories, records: list[dict]) -> float:
    """The share of prompts whose first choice among answers and wrong answers is an answer."""
    import torch

    model, tokenizer = stories
    prompts = prompts_from_records(records, tokenizer=tokenizer, prepend_bos=True, vocabulary=512)
    with torch.no_grad():
        logits = model(prompts.clean, attention_mask=prompts.key_mask.long()).logits
    last = logits[torch.arange(len(prompts)), prompts.positions[:, 0]]  # n vocabulary
    assert prompts.answers is not None and prompts.wrong_answers is not None
    right = last.gather(1, prompts.answers[:, 0])  # n 1
    return (right > last.gather(1, prompts.wrong_answers[:, 0])).all(dim=1).float().mean().item()


def test_the_model_gives_the_expected_answers(stories):
    drawn = groups(PronounDeparture(), 200, 0, 200, 600, 5)
    assert accuracy(stories, drawn["trusted"]) == accuracy(stories, drawn["normal_shift"]) == 1
    for how in HOWS:
        records = [record for record in drawn["anomaly"] if record["how"] == how]
        assert accuracy(stories, records) >= 0.95, how


@pytest.mark.parametrize("kind", ["agree", "disagree"])
def test_the_later_name_wins_whoever_it_is(stories, anomalies, kind):
    for how in ("two_people", "corrected"):
        for answer in ("he", "she"):
            records = [
                record
                for record in anomalies
                if (record["how"], record["kind"]) == (how, kind)
                and record["answers"][0].strip().lower() == answer
            ]
            assert accuracy(stories, records[:100]) >= 0.95


def test_the_repeated_pronoun_outweighs_the_name(stories, anomalies):
    """The clean text with the names of its corrupt partner contradicts itself; the pronoun in the
    text is copied.
    """
    records = [
        record for record in anomalies if (record["how"], record["kind"]) == ("repeated", "agree")
    ]
    contradictory = []
    for record in records[:200]:
        pairs = zip(words(record["clean"]), words(record["corrupt"]), strict=True)
        text = " ".join(clean if clean in ("He", "She") else corrupt for clean, corrupt in pairs)
        text = re.sub(r" ([.,])", r"\1", text)
        contradictory.append({**record, "clean": text, "corrupt": record["clean"]})
    assert accuracy(stories, contradictory) >= 0.95


def test_they_fit_the_tokenizer(stories, drawn, anomalies):
    """Partners of unequal length and answers of two tokens would be refused."""
    options = {"tokenizer": stories[1], "prepend_bos": True, "vocabulary": 512}
    lengths = prompts_from_records(anomalies[:1500], **options).lengths
    trusted = prompts_from_records(drawn["trusted"][:1000], **options).lengths
    assert trusted.min() <= lengths.min() and lengths.max() <= trusted.max()


def test_module_needs_no_tokenizer():
    assert not {"torch", "transformers"} & set(vars(pronoun_departure))
