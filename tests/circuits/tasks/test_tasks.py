"""Task generators: right schema, repeatable, distinct, and right for the models that they are made
for.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import MISSING, fields
from math import perm
from pathlib import Path

import pytest
import torch

from circuits.prompts import prompts_from_records
from circuits.tasks import TASKS, induction, pronoun
from circuits.tasks.induction import Induction
from circuits.tasks.pronoun import Pronoun

GENERATED = [name for name in TASKS if name != "file"]  # `file` reads what the user brings


@pytest.fixture(scope="module")
def stories(cases):
    folder = cases / "stories260K"
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


# ---------------------------------------------------------------------------------------------- all
# tasks


@pytest.mark.parametrize("name", GENERATED)
def test_config_is_a_structured_config(name):
    omegaconf = pytest.importorskip("omegaconf")
    config_type = TASKS[name].schema
    first = fields(config_type)[0]
    assert (first.name, first.default) == ("name", name)
    assert all(field.default is not MISSING for field in fields(config_type))
    merged = omegaconf.OmegaConf.merge(omegaconf.OmegaConf.structured(config_type), {"name": name})
    assert omegaconf.OmegaConf.to_object(merged) == config_type()


@pytest.mark.parametrize("name", GENERATED)
def test_records_are_distinct_repeatable_and_differ_by_seed(name):
    config_type, generate = TASKS[name].schema, TASKS[name].generate
    records = generate(config_type(), 40, seed=3)
    assert (
        len({str(record["clean"]) for record in records})
        == len({record["id"] for record in records})
        == 40
    )
    assert generate(config_type(), 40, seed=3) == records
    assert generate(config_type(), 40, seed=4) != records


def test_tasks_do_not_import_torch():
    code = "import sys, circuits.tasks; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[3]
        ).returncode
        == 0
    )


# --------------------------------------------------------------------------------------------------
# induction


@pytest.mark.parametrize("length", [4, 5, 8, 11])
def test_one_repeat(length):
    config = Induction(form="one_repeat", length=length)
    for record in induction.generate(config, 30, seed=0):
        clean, corrupt = record["clean"], record["corrupt"]
        earlier = clean.index(clean[-1])
        assert len(clean) == len(corrupt) == length and len(set(clean)) == length - 1
        assert 1 <= earlier <= length - 3
        assert record["answers"] == [clean[earlier + 1]]
        assert set(record["wrong_answers"]) == set(clean) - {clean[-1], clean[earlier + 1]} != set()
        assert [a == b for a, b in zip(clean, corrupt)].count(False) == 1
        assert corrupt[earlier] not in clean and len(set(corrupt)) == length


@pytest.mark.parametrize("length", [5, 6, 8, 9])
def test_block(length):
    block = (length + 1) // 2
    for record in induction.generate(Induction(form="block", length=length), 30, seed=0):
        clean, corrupt = record["clean"], record["corrupt"]
        assert len(clean) == len(corrupt) == length and len(set(clean)) == block
        assert clean[block:] == clean[: length - block]
        assert record["answers"] == [clean[length - block]]
        assert set(record["wrong_answers"]) == set(clean) - {clean[-1], *record["answers"]} != set()
        assert corrupt[length - block :] == clean[length - block :]
        assert not set(corrupt[: length - block]) & set(clean) and len(set(corrupt)) == length


def test_induction_gives_every_prompt_there_is():
    config = Induction(vocabulary=5, length=5)
    everything = induction.generate(config, perm(5, 4) * 2, seed=0)
    assert len({tuple(record["clean"]) for record in everything}) == 240
    with pytest.raises(
        ValueError,
        match="count=241, but form=one_repeat with vocabulary=5 and length=5 gives 1 to 240",
    ):
        induction.generate(config, 241, seed=0)
    assert (
        len(induction.generate(Induction(form="block", vocabulary=5, length=5), 60, seed=0)) == 60
    )


@pytest.mark.parametrize(
    ("config", "count", "message"),
    [
        (Induction(), 0, "count=0, but form=one_repeat"),
        (
            Induction(form="twice"),
            1,
            "form='twice' is none of one_repeat, block; choose one of them",
        ),
        (Induction(length=3), 1, "length=3, but form=one_repeat needs at least 4; raise length"),
        (Induction(form="block", length=4), 1, "length=4, but form=block needs at least 5"),
        (
            Induction(vocabulary=7),
            1,
            "vocabulary=7, but form=one_repeat with length=8 needs 8 different tokens",
        ),
        (Induction(vocabulary=-2), 1, "vocabulary=-2, but"),
        (
            Induction(vocabulary=9, without=[0, 5]),
            1,
            r"vocabulary=9 leaves 7 without \[0, 5\], but form=one_repeat with length=8 needs 8",
        ),
    ],
)
def test_induction_refuses(config, count, message):
    with pytest.raises(ValueError, match=message):
        induction.generate(config, count, seed=0)


def attention_only_logits(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Logits at the last token of the 2-layer, 1-head model without norms or MLPs, written out."""
    length = tokens.shape[1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    residual = weights["embed.W_E"][tokens] + weights["pos_embed.W_pos"][:length]
    for layer in range(2):
        w = {
            name: weights[f"blocks.{layer}.attn.{name}"]
            for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
        }
        q, k, v = (residual @ w[f"W_{part}"][0] + w[f"b_{part}"][0] for part in "QKV")
        pattern = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf).softmax(-1)
        residual = residual + pattern @ v @ w["W_O"][0] + w["b_O"]
    return residual[:, -1] @ weights["unembed.W_U"] + weights["unembed.b_U"]


def logit_difference(logits: torch.Tensor, prompts) -> torch.Tensor:
    right, wrong = prompts.answers[:, 0], prompts.wrong_answers[:, 0]
    return logits.gather(1, right).mean(1) - logits.gather(1, wrong).mean(1)


@pytest.mark.parametrize(("form", "corrupt_spread"), [("one_repeat", 5), ("block", 40)])
def test_trained_induction_model_tells_clean_from_corrupt(form, corrupt_spread, cases):
    path = cases / "gbmi_induction_2L1H" / "indhead_l_2_2.pt"
    weights = torch.load(path, weights_only=True, map_location="cpu")
    prompts = prompts_from_records(
        induction.generate(Induction(form=form), 200, seed=0), vocabulary=26, max_length=8
    )
    clean = attention_only_logits(weights, prompts.clean)
    corrupt = logit_difference(attention_only_logits(weights, prompts.corrupt), prompts)
    assert (clean.argmax(1) == prompts.answers[:, 0, 0]).all()
    assert logit_difference(clean, prompts).min() > 90
    assert corrupt.mean().abs() < corrupt_spread


# --------------------------------------------------------------------------------------------------
# pronouns


def test_pronoun_groups_and_their_sizes():
    everything = pronoun.all_prompts()
    assert (
        len({record["clean"] for record in everything})
        == len({record["id"] for record in everything})
        == 6700
    )
    assert len(pronoun.generate(Pronoun(), 3160, seed=0)) == 3160
    for names in ("trusted", "shifted"):
        for frames in ("trusted", "shifted"):
            records = pronoun.generate(Pronoun(names=names, frames=frames), 600, seed=1)
            assert {(record["names"], record["frames"]) for record in records} == {(names, frames)}
    assert len(pronoun.generate(Pronoun(names="all", frames="all"), 6700, seed=0)) == 6700


def test_pronoun_partner_is_the_other_gender():
    everything = {record["clean"]: record for record in pronoun.all_prompts()}
    for clean, record in everything.items():
        partner = everything[record["corrupt"]]
        assert (
            partner["corrupt"] == clean
            and partner["answers"] == record["wrong_answers"] != record["answers"]
        )
        assert not set("{}") & set(clean)
    assert everything["The boy was sad, but"]["answers"] == [" he"]
    assert everything["One day, the girl went to the park."]["answers"] == [" She"]
    assert everything["Once upon a time, there was a little boy named Tim."]["answers"] == [" He"]


@pytest.mark.parametrize(
    ("config", "count", "message"),
    [
        (
            Pronoun(),
            3161,
            "count=3161, but names=trusted with frames=trusted give 1 to 3160 prompts",
        ),
        (Pronoun(), 0, "count=0, but"),
        (
            Pronoun(names="other"),
            1,
            "names='other' is none of trusted, shifted, all; choose one of them",
        ),
        (Pronoun(frames="other"), 1, "frames='other' is none of"),
    ],
)
def test_pronoun_refuses(config, count, message):
    with pytest.raises(ValueError, match=message):
        pronoun.generate(config, count, seed=0)


def test_every_pronoun_prompt_fits_the_tokenizer(stories):
    _, tokenizer = stories
    prompts = prompts_from_records(
        pronoun.all_prompts(), tokenizer=tokenizer, prepend_bos=True, vocabulary=512
    )
    assert (
        prompts.corrupt is not None and len(prompts) == 6700
    )  # unequal lengths and answers of two tokens are refused


def test_the_model_prefers_the_right_pronoun(stories):
    model, tokenizer = stories
    records = pronoun.generate(Pronoun(names="all", frames="all"), 400, seed=0)
    prompts = prompts_from_records(records, tokenizer=tokenizer, prepend_bos=True)
    with torch.no_grad():
        logits = model(prompts.clean, attention_mask=prompts.key_mask.long()).logits
    last = logits[torch.arange(len(prompts)), prompts.positions[:, 0]]
    difference = logit_difference(last, prompts)
    assert difference.min() > 0 and difference.mean() > 3
