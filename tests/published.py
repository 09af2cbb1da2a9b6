"""What config.json of well-known checkpoints says, field by field, and the same at small sizes.

`published.json` has it as on the HuggingFace hub in 2025.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch

from tests import tiny

PUBLISHED: dict[str, dict] = json.loads(Path(__file__).with_suffix(".json").read_text())

# Sizes of a model of seconds: heads of 8, so that a quarter rotates in pairs; texts longer than
# windows.  Numbers of layers, and of heads that share keys, follow the published ones.
_SIZES = {
    "n_embd": 32,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "n_ctx": 16,
    "n_positions": 16,
    "max_position_embeddings": 16,
    "original_max_position_embeddings": 8,
    "intermediate_size": 20,
    "ffn_dim": 20,
    "n_layer": 2,
    "num_layers": 2,
    "num_hidden_layers": 2,
    "n_head": 4,
    "num_heads": 4,
    "num_attention_heads": 4,
    "head_dim": 6,
    "vocab_size": 29,
    "sliding_window": 4,
    "window_size": 4,
    "attention_types": [[["global", "local"], 1]],
    "attention_layers": ["global", "local"],
    "layer_types": ["sliding_attention", "full_attention"],
    "no_rope_layers": [1, 0],
    "no_rope_layer_interval": 2,
    "_sliding_window_pattern": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def small(fields: dict) -> dict:
    """The same fields, none added or left out, with sizes of a tiny model."""
    made = copy.deepcopy(fields)
    for name in made.keys() & _SIZES.keys():
        if made[name] is not None:
            made[name] = copy.deepcopy(_SIZES[name])
    if "num_key_value_heads" in made:
        made["num_key_value_heads"] = max(
            1, 4 * fields["num_key_value_heads"] // fields["num_attention_heads"]
        )
    if "sliding_attention" not in fields.get("layer_types", ["sliding_attention"]):
        made["layer_types"] = ["full_attention"] * 2
    if isinstance(scaling := made.get("rope_scaling"), dict):
        scaling["original_max_position_embeddings"] = 8
    return made


def write_checkpoint(folder: Path, fields: dict) -> None:
    """Random weights in the dtype that `fields` say, saved beside `fields` themselves."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    dtype = getattr(torch, fields.get("torch_dtype", "float32"))
    tiny.scaled_up(module).to(dtype).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(fields))  # not as this version writes it
    assert (folder / "model.safetensors").is_file()
