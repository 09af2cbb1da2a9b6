"""Configuration fields: what a model's own code reads is honoured or refused, the rest is noted."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from circuits.engine import Engine
from circuits.model.config_reads import fields_read
from circuits.model.load import ModelConfig, from_module, load_model
from tests import modules, tiny

TOKENS = torch.randint(29, (2, 9), generator=torch.Generator().manual_seed(4))
# Fields of published configurations that no code of the family reads.
UNREAD = {
    "gpt2-medium": ("gpt2", {"n_special": 0, "predict_special_tokens": True}),
    "SmolLM2": ("llama", {"is_llama_config": True, "rope_interleaved": False}),
    "SmolLM2-Instruct": ("llama", {"transformers.js_config": {"kv_cache_dtype": {"fp16": "f"}}}),
    "a foreign switch": ("mistral", {"use_flash_attn": True, "rope_interleaved": True}),
}
# As transformers 4.46 to 4.57 save a Pythia.
RESAVED = {"partial_rotary_factor": 0.5, "rope_theta": 10000, "rope_scaling": None}


def folder(path, module, **fields):
    """A HuggingFace folder with these fields added to its config.json."""
    module.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))
    return path


def engine(path) -> Engine:
    return Engine(load_model(ModelConfig(path=str(path))))


def same_logits(engine: Engine, module) -> None:
    with torch.no_grad():
        theirs = module(TOKENS).logits
    torch.testing.assert_close(
        engine.logits(tiny.from_tokens(TOKENS)), theirs, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", tiny.HUGGINGFACE)
def test_of_every_family_the_fields_that_shape_it_are_seen_to_be_read(name):
    config = tiny.HUGGINGFACE[name]().config
    config.of_another_program = 1
    read = fields_read(config)
    heads = "num_heads" if name == "gptneo" else "num_attention_heads"
    assert {"hidden_size", "num_hidden_layers", heads, "vocab_size"} <= read
    assert "of_another_program" not in read
    assert config.of_another_program == 1 and type(config).__name__ != "Watched"


def test_a_field_counts_by_its_own_name_and_by_another_that_stands_for_it():
    assert {"n_embd", "hidden_size", "attn_pdrop"} <= fields_read(tiny.gpt2_module().config)


@pytest.mark.parametrize("name", UNREAD)
def test_fields_that_nothing_reads_are_accepted_with_one_note(tmp_path, caplog, name):
    family, fields = UNREAD[name]
    module = tiny.HUGGINGFACE[family]()
    with caplog.at_level(logging.WARNING, logger="circuits"):
        made = engine(folder(tmp_path, module, **fields))
    same_logits(made, module)
    (note,) = [record.getMessage() for record in caplog.records if record.name.startswith("circ")]
    assert "the model's code does not read these configuration fields" in note
    set_ = [field for field, value in fields.items() if value is not False]
    assert all(field in note for field in set_ if field != "predict_special_tokens")


def test_no_note_without_such_a_field(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="circuits"):
        engine(folder(tmp_path, tiny.llama_module()))
    assert not [record for record in caplog.records if record.name.startswith("circuits")]


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("llama", "num_experts", 4),  # nothing reads these, but the weights are of another model
        ("llama", "use_alibi", True),
        ("llama", "moe_intermediate_size", 8),
        ("gpt2", "add_cross_attention", True),
        ("gemma2", "use_bidirectional_attention", True),
        ("gemma2", "attention_bias", True),
    ],
)
def test_fields_that_change_the_function_stay_refused_by_name(family, field, value):
    module = tiny.HUGGINGFACE[family]()
    config = module.config
    setattr(config, field, value)
    with pytest.raises(ValueError, match=f"configuration field {field}={value} is not honoured"):
        Engine(from_module(module))


def test_a_pythia_as_it_is_saved_today_loads(tmp_path):
    module = modules.neox_module()
    same_logits(engine(folder(tmp_path, module, **RESAVED)), module)


def test_rounding_in_another_order_is_no_other_function(tmp_path):
    module = tiny.gpt2_module(reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True)
    same_logits(engine(folder(tmp_path, module)), module)


def test_configurations_as_three_versions_of_transformers_saved_them(tmp_path, cases):
    """Each with its sizes as they are: they are those of tiny models."""
    from transformers import AutoConfig, AutoModelForCausalLM

    saved = sorted((cases / "public" / "pythia_saved_by_446_457").glob("configs_saved/*/*"))
    assert len(saved) > 8
    for at, path in enumerate(saved):
        config = AutoConfig.from_pretrained(path)
        config.vocab_size = min(config.vocab_size, 512)
        module = tiny.scaled_up(AutoModelForCausalLM.from_config(config).float().eval(), size=0.1)
        made = folder(tmp_path / str(at), module)
        fields = json.loads((path / "config.json").read_text())
        fields["vocab_size"] = config.vocab_size
        (made / "config.json").write_text(json.dumps(fields))
        same_logits(engine(made), module)
