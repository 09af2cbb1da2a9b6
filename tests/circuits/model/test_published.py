"""Well-known checkpoints, as tiny models with all that their config.json says."""

from __future__ import annotations

import pytest
import torch

from circuits.engine import Engine
from circuits.model.load import load_model
from tests import tiny
from tests.published import PUBLISHED, small, write_checkpoint

TOKENS = torch.randint(29, (3, 14), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_computed_as_huggingface_does(name, tmp_path):
    from transformers import AutoModelForCausalLM

    fields = small(PUBLISHED[name])
    assert fields.keys() == PUBLISHED[name].keys()
    write_checkpoint(tmp_path, fields)
    engine = Engine(load_model(tmp_path))
    module = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = module(TOKENS).logits
    assert theirs.std() > 0.3
    prompts = tiny.from_tokens(TOKENS)
    clean = engine.clean(prompts)
    kept = engine.masked(prompts, engine.graph.exists, engine.ablated(clean.writers * 0))
    for ours in (clean.logits, kept):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_phi_3_of_128k_is_refused_for_its_rotary_scaling(kind, tmp_path):
    factors = {"long_factor": [1.1] * 4, "short_factor": [1.0] * 4}
    factors["original_max_position_embeddings"] = 8
    fields = small(PUBLISHED["Phi-3-mini-4k-instruct"]) | {
        "rope_scaling": {"type": kind, **factors}
    }
    write_checkpoint(tmp_path, fields)
    with pytest.raises(ValueError, match="Phi-3: rope_type='longrope' depends on the length"):
        Engine(load_model(tmp_path))


def test_opt_350m_is_refused_for_its_norms(tmp_path):
    fields = small(PUBLISHED["opt-125m"])
    write_checkpoint(tmp_path, fields | {"do_layer_norm_before": False, "word_embed_proj_dim": 20})
    with pytest.raises(ValueError, match="do_layer_norm_before=False, word_embed_proj_dim=20 "):
        Engine(load_model(tmp_path))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("stablelm-2-1_6b", {"qk_layernorm": True}),
        ("OLMo-2-0425-1B", {"attention_bias": True}),
        ("gemma-3-270m", {"attention_bias": True}),
        ("gemma-3-270m", {"attn_logit_softcapping": 50.0}),
        ("gemma-3-270m", {"use_bidirectional_attention": True}),
        ("opt-125m", {"_remove_final_layer_norm": True}),
    ],
)
def test_what_a_family_reads_and_the_engine_does_not_is_refused_by_name(name, changes, tmp_path):
    write_checkpoint(tmp_path, small(PUBLISHED[name]) | changes)
    (field,) = changes
    with pytest.raises(ValueError, match=f"field {field}=.* is not honoured by the engine"):
        Engine(load_model(tmp_path))
