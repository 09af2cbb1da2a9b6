"""TransformerLens checkpoints by HookedTransformer's names, against its definition written out."""

from __future__ import annotations

import json
import math

import pytest
import torch

from circuits.engine import Engine
from circuits.model.load import ModelConfig, from_bridge, load_model, weight_hash
from circuits.model.state_dicts import DTYPES
from tests import tiny

TOKENS = torch.randint(29, (2, 9), generator=torch.Generator().manual_seed(2))
SIZES = {"n_layers": 2, "d_model": 12, "n_ctx": 10, "d_head": 4, "n_heads": 4, "d_vocab": 29}
# What HookedTransformerConfig of TransformerLens 2 to 3 holds beside the sizes, at its defaults.
DEFAULTS = {
    "d_mlp": 20,
    "act_fn": "gelu",
    "d_vocab_out": 29,
    "eps": 1e-2,
    "use_attn_scale": True,
    "attn_scale": -1.0,
    "scale_attn_by_inverse_layer_idx": False,
    "attention_dir": "causal",
    "attn_only": False,
    "normalization_type": "LN",
    "final_rms": False,
    "gated_mlp": False,
    "n_key_value_heads": None,
    "attn_scores_soft_cap": -1.0,
    "output_logits_soft_cap": -1.0,
    "positional_embedding_type": "standard",
}
# The rest of such a configuration as TransformerLens 3 saves it; none of it changes the function.
AS_SAVED = {
    "model_name": "custom",
    "device": "cuda",
    "dtype": "torch.float32",
    "n_devices": 1,
    "seed": 0,
    "init_mode": "xavier_uniform",
    "init_weights": True,
    "initializer_range": 0.2,
    "use_attn_result": False,
    "use_split_qkv_input": False,
    "use_hook_mlp_in": False,
    "use_attn_in": False,
    "use_local_attn": False,
    "window_size": 256,
    "attn_types": ["global", "local"],
    "ungroup_grouped_query_attention": True,
    "use_NTK_by_parts_rope": False,
    "NTK_original_ctx_len": 8192,
    "rotary_dim": None,
    "rotary_base": 10000,
    "rotary_base_local": 10000,
    "rotary_scaling_factor": 1.0,
    "rotary_adjacent_pairs": False,
    "use_yarn_rope": False,
    "yarn_factor": 1.0,
    "use_qk_norm": False,
    "clip_qkv": None,
    "use_logn_attn": False,
    "train_seq_length": None,
    "use_dynamic_ntk_rope": False,
    "use_attention_sinks": False,
    "quantization_method": None,
    "norm_topk_prob": False,
    "num_experts": None,
    "n_params": 9216,
    "tokenizer_prepends_bos": None,
    "default_prepend_bos": True,
    "decoder_start_token_id": None,
    "tie_word_embeddings": False,
    "post_embedding_ln": False,
    "parallel_attn_mlp": False,
    "load_in_4bit": False,
    "uses_rms_norm": False,
    "layer_norm_folding": False,
}


# ---- the definition ------------------------------------------------------------------------------


def norm(x, state, name, kind, eps):
    if kind is None:
        return x
    if kind.startswith("LN"):
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    if not kind.endswith("Pre"):
        x = x * state[f"{name}.w"]
    return x + state[f"{name}.b"] if kind == "LN" else x


def tanh_gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_new": tanh_gelu,
    "gelu_fast": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "silu": lambda x: x * torch.sigmoid(x),
    "solu": lambda x: x * x.exp() / x.exp().sum(-1, keepdim=True),
    "solu_ln": lambda x: x * x.exp() / x.exp().sum(-1, keepdim=True),
}


def capped(x, cap):
    return cap * torch.tanh(x / cap) if cap > 0 else x


def attention(config, state, layer, x):
    name, written = f"blocks.{layer}.attn", torch.zeros_like(x)
    under = "" if config["n_key_value_heads"] is None else "_"
    shared = config["n_heads"] // (config["n_key_value_heads"] or config["n_heads"])
    scale = 1.0
    if config["use_attn_scale"]:
        given = config["attn_scale"]
        scale = math.sqrt(config["d_head"]) if given == -1 else given
    if config["scale_attn_by_inverse_layer_idx"]:
        scale *= layer + 1
    for head in range(config["n_heads"]):
        sides = (("", "Q", head), (under, "K", head // shared), (under, "V", head // shared))
        q, k, v = (
            x @ state[f"{name}.{u}W_{side}"][h] + state[f"{name}.{u}b_{side}"][h]
            for u, side, h in sides
        )
        scores = capped(q @ k.mT / scale, config["attn_scores_soft_cap"])
        if config["attention_dir"] == "causal":
            later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
            scores = scores.masked_fill(later, -math.inf)
        written = written + scores.softmax(-1) @ v @ state[f"{name}.W_O"][head]
    return written + state[f"{name}.b_O"]


def mlp(config, state, layer, x):
    name, act = f"blocks.{layer}.mlp", ACTIVATIONS[config["act_fn"]]
    if config["gated_mlp"]:
        made = (
            act(x @ state[f"{name}.W_gate"]) * (x @ state[f"{name}.W_in"]) + state[f"{name}.b_in"]
        )
    else:
        made = act(x @ state[f"{name}.W_in"] + state[f"{name}.b_in"])
        if config["act_fn"].endswith("_ln"):
            kind = "LN" if config["normalization_type"] == "LN" else "LNPre"
            made = norm(made, state, f"{name}.ln", kind, config["eps"])
    return made @ state[f"{name}.W_out"] + state[f"{name}.b_out"]


def by_definition(config, state, tokens):
    """The logits of HookedTransformer, from its configuration and its state dict alone."""
    config, state = {**DEFAULTS, **config}, {name: one.double() for name, one in state.items()}
    kind, eps = config["normalization_type"], config["eps"]
    x = state["embed.W_E"][tokens] + state["pos_embed.W_pos"][: tokens.shape[1]]
    for layer in range(config["n_layers"]):
        normed = norm(x, state, f"blocks.{layer}.ln1", kind, eps)
        x = x + attention(config, state, layer, normed)
        if not config["attn_only"]:
            normed = norm(x, state, f"blocks.{layer}.ln2", kind, eps)
            x = x + mlp(config, state, layer, normed)
    if kind is not None and config["final_rms"]:
        kind = "RMSPre" if kind.endswith("Pre") else "RMS"
    logits = norm(x, state, "ln_final", kind, eps) @ state["unembed.W_U"] + state["unembed.b_U"]
    return capped(logits, config["output_logits_soft_cap"])


def shapes(config) -> dict[str, tuple[int, ...]]:
    """The tensors of HookedTransformer's state dict."""
    d, e, h, m = (config[name] for name in ("d_model", "d_head", "n_heads", "d_mlp"))
    kv, under = config["n_key_value_heads"] or h, "" if config["n_key_value_heads"] is None else "_"
    made = {
        "embed.W_E": (config["d_vocab"], d),
        "pos_embed.W_pos": (config["n_ctx"], d),
        "unembed.W_U": (d, config["d_vocab_out"]),
        "unembed.b_U": (config["d_vocab_out"],),
    }
    norms = {"ln_final": "RMS" if config["final_rms"] else config["normalization_type"]}
    for layer in range(config["n_layers"]):
        attn, mlp = f"blocks.{layer}.attn", f"blocks.{layer}.mlp"
        made |= {f"{attn}.W_Q": (h, d, e), f"{attn}.b_Q": (h, e)}
        for side in "KV":
            made[f"{attn}.{under}W_{side}"] = (kv, d, e)
            made[f"{attn}.{under}b_{side}"] = (kv, e)
        made |= {f"{attn}.W_O": (h, e, d), f"{attn}.b_O": (d,)}
        norms[f"blocks.{layer}.ln1"] = config["normalization_type"]
        if config["attn_only"]:
            continue
        norms[f"blocks.{layer}.ln2"] = config["normalization_type"]
        made |= {f"{mlp}.W_in": (d, m), f"{mlp}.b_in": (m,)}
        made |= {f"{mlp}.W_out": (m, d), f"{mlp}.b_out": (d,)}
        if config["gated_mlp"]:
            made[f"{mlp}.W_gate"] = (d, m)
        if config["act_fn"] == "solu_ln" and config["normalization_type"] == "LN":
            made |= {f"{mlp}.ln.w": (m,), f"{mlp}.ln.b": (m,)}
    if config["normalization_type"] in ("LN", "RMS"):
        for name, kind in norms.items():
            made[f"{name}.w"] = (d,)
            if kind == "LN":
                made[f"{name}.b"] = (d,)
    return made


def weights(config, dtype=torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    state = {
        name: 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
        + (1.0 if name.endswith(".w") else 0.0)
        for name, shape in shapes(config).items()
    }
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def write(folder, config, state):
    torch.save(state, folder / "old.pt")
    (folder / "old.config.json").write_text(json.dumps(config))
    return folder / "old.pt"


def load(path, dtype="float64"):
    return load_model(ModelConfig(path=str(path), dtype=dtype))


def logits(model, tokens=TOKENS):
    return Engine(model).logits(tiny.from_tokens(tokens))


def relative(ours, theirs) -> float:
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


# ---- equal to the definition ---------------------------------------------------------------------

# Each field that is honoured, off its default; and a change of the definition that it must show.
VARIANTS = {
    "plain": {},
    "scale off": {"use_attn_scale": False},
    "scale off, one given": {"use_attn_scale": False, "attn_scale": 1.5},
    "scale given": {"attn_scale": 0.7},
    "scale of one": {"attn_scale": 1.0},
    "scale by layer": {"scale_attn_by_inverse_layer_idx": True},
    "scale by layer alone": {"scale_attn_by_inverse_layer_idx": True, "use_attn_scale": False},
    "attention only": {"attn_only": True},
    "bidirectional": {"attention_dir": "bidirectional"},
    "norm without parameters": {"normalization_type": "LNPre"},
    "rms norm": {"normalization_type": "RMS"},
    "rms norm without parameters": {"normalization_type": "RMSPre"},
    "no norm": {"normalization_type": None},
    "final rms": {"final_rms": True},
    "final rms without parameters": {"final_rms": True, "normalization_type": "LNPre"},
    "norm epsilon": {"eps": 0.3},
    "gated": {"gated_mlp": True, "act_fn": "silu"},
    "grouped queries": {"n_key_value_heads": 2},
    "attention soft-cap": {"attn_scores_soft_cap": 0.5},
    "logit soft-cap": {"output_logits_soft_cap": 1.5},
    "other outputs": {"d_vocab_out": 7},
    **{name: {"act_fn": name} for name in ACTIVATIONS if name != "gelu"},
    "solu_ln, folded": {"act_fn": "solu_ln", "normalization_type": "LNPre"},
}
SAME_AS_PLAIN = ("plain",)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_engine_computes_what_hooked_transformer_computes(tmp_path, name):
    config = {**SIZES, **DEFAULTS, **VARIANTS[name]}
    state = weights(config)
    model = load(write(tmp_path, config, state))
    expected = by_definition(config, state, TOKENS)
    assert expected.std() > 0.3
    assert relative(logits(model), expected) < 2e-7  # TransformerLens's RMSNorm is in float32
    assert relative(model.bridge(TOKENS), expected) < 2e-7
    assert model.weight_hash == weight_hash(state)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in SAME_AS_PLAIN])
def test_each_field_shows_in_the_definition(name):
    config = {**SIZES, **DEFAULTS, **VARIANTS[name]}
    state = weights(config)
    others = {field: DEFAULTS[field] for field in VARIANTS[name]}
    fitting = set(shapes({**config, **others})) <= set(state)
    if "d_vocab_out" in others or not fitting:
        return  # without the field there would be other weights
    without = by_definition({**config, **others}, state, TOKENS)
    # The approximation of GELU is off by 1e-3; everything else by far more.
    assert relative(without, by_definition(config, state, TOKENS)) > 1e-4


def test_a_configuration_as_it_was_saved_loads_and_means_the_same(tmp_path):
    config = {**SIZES, **DEFAULTS}
    state = weights(config)
    masks = {f"blocks.{layer}.attn.mask": torch.ones(10, 10).tril().bool() for layer in range(2)}
    model = load(write(tmp_path, {**AS_SAVED, **config}, {**state, **masks}))
    assert relative(logits(model), by_definition(config, state, TOKENS)) < 2e-7


def test_a_configuration_of_transformer_lens_4_as_it_was_saved_loads(tmp_path):
    bridge = tiny.native_bridge(attn_scale=1.7)
    fields = {name: value for name, value in bridge.cfg.to_dict().items()}
    torch.save({name: one.clone() for name, one in bridge.state_dict().items()}, tmp_path / "a.pt")
    (tmp_path / "a.config.json").write_text(json.dumps(fields, default=str))
    assert relative(logits(load(tmp_path / "a.pt")), bridge(TOKENS)) < 2e-7


def test_stored_precision_is_kept_until_the_cast(tmp_path):
    config = {**SIZES, **DEFAULTS, "dtype": "torch.float16"}
    state = weights(config)
    path = write(tmp_path, config, state)
    assert relative(logits(load(path)), by_definition(config, state, TOKENS)) < 1e-12
    for dtype in DTYPES:
        model = load(path, dtype)
        assert {one.dtype for one in model.bridge.parameters()} == {DTYPES[dtype]}
        assert model.weight_hash == weight_hash(state)
    mixed = {name: one.float() if "W_E" in name else one for name, one in state.items()}
    path = write(tmp_path, config, mixed)
    assert relative(logits(load(path)), by_definition(config, mixed, TOKENS)) < 1e-12
    assert load(path).weight_hash == weight_hash(mixed) != weight_hash(state)


@pytest.mark.parametrize("case", ["tl_no_attn_scale/attn_only", "tl2_config_as_saved/as_saved"])
def test_transformer_lens_2_gave_these_logits(cases, case):
    path = cases / "public" / f"{case}.pt"
    expected = torch.load(path.with_suffix(".expected.pt"), weights_only=True)
    ours = logits(load(path, "float32"), expected["tokens"])
    assert relative(ours, expected["logits"]) < 5e-6
    config = json.loads(path.with_suffix(".config.json").read_text())
    defined = by_definition(config, torch.load(path, weights_only=True), expected["tokens"])
    assert relative(defined, expected["logits"]) < 5e-6


# ---- refused by name -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_yarn_rope": True}, "use_yarn_rope=True is set, but TransformerLens's native model"),
        ({"clip_qkv": 8.0}, r"clip_qkv=8\.0 is set, .*; use a model without it"),
        ({"use_logn_attn": True}, "use_logn_attn=True is set"),
        ({"positional_embedding_type": "rotary"}, "legacy rotary checkpoints are refused"),
        ({"attn_scale": 0.0}, r"attn_scale=0\.0, but .* must be above 0, or -1 for sqrt"),
        ({"attn_scale": -2.0}, r"attn_scale=-2\.0, but .* must be above 0, or -1 for sqrt"),
        ({"act_fn": None}, "act_fn is null, but a model with MLPs has an activation; set it"),
        ({"gated_mlp": True, "act_fn": "solu_ln"}, "act_fn='solu_ln' with gated_mlp=True"),
        ({"use_atn_scale": True}, "there is no field use_atn_scale; remove it, or correct"),
    ],
)
def test_fields_that_cannot_be_computed_are_refused_by_name(tmp_path, fields, message):
    config = {**SIZES, **DEFAULTS, **fields}
    path = write(tmp_path, config, weights({**SIZES, **DEFAULTS}))
    with pytest.raises(ValueError, match=rf"old\.config\.json is no .*: {message}") as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_local_attn": True, "window_size": 4, "attn_types": ["global", "local"]},
        {"parallel_attn_mlp": True},
        {"post_embedding_ln": True},
        {"use_normalization_before_and_after": True},
        {"use_qk_norm": True},
        {"num_experts": 2},
        {"load_in_4bit": True},
        {"use_NTK_by_parts_rope": True},
    ],
)
def test_fields_that_the_native_model_ignores_are_refused_by_name(tmp_path, fields):
    config = {**SIZES, **DEFAULTS, **fields}
    model = load(write(tmp_path, config, weights({**SIZES, **DEFAULTS})))
    with pytest.raises(ValueError, match="|".join(f"{field}=.* is set, but" for field in fields)):
        Engine(model)


def test_a_stored_mask_of_local_attention_is_refused(tmp_path):
    config = {**SIZES, **DEFAULTS}
    state = weights(config)
    state["blocks.1.attn.mask"] = torch.ones(10, 10).tril().triu(-3).bool()
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.mask is no causal mask"):
        load(write(tmp_path, config, state))


@pytest.mark.parametrize("field", ["use_attn_scale", "scale_attn_by_inverse_layer_idx"])
def test_under_the_names_of_transformer_lens_4_the_scale_is_refused_where_it_is_ignored(
    tmp_path, field
):
    """The native model divides by sqrt(d_head) all the same, so its weights were trained so."""
    bridge = tiny.native_bridge()
    config = {name: getattr(bridge.cfg, name) for name in (*SIZES, "d_mlp", "act_fn", "eps")}
    torch.save({name: one.clone() for name, one in bridge.state_dict().items()}, tmp_path / "a.pt")
    fields = {**config, field: not DEFAULTS[field]}
    (tmp_path / "a.config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"{field}={fields[field]} is honoured in files with Hook"):
        load(tmp_path / "a.pt")
    remedy = {**fields, field: DEFAULTS[field], "attn_scale": 1.0}
    (tmp_path / "a.config.json").write_text(json.dumps(remedy))
    scale = [block.attn.original_component for block in bridge.blocks]
    for attention in scale:
        attention.scale = 1.0
    assert relative(logits(load(tmp_path / "a.pt")), bridge(TOKENS)) < 1e-12


@pytest.mark.parametrize("field", ["use_attn_scale", "scale_attn_by_inverse_layer_idx"])
def test_a_native_bridge_that_does_not_do_as_its_configuration_says_is_refused(field):
    bridge = tiny.native_bridge(**{field: not DEFAULTS[field]})
    with pytest.raises(ValueError, match=rf"{field}={not DEFAULTS[field]}.* divide the attention"):
        Engine(from_bridge(bridge))
    setattr(bridge.cfg, field, DEFAULTS[field])
    assert relative(logits(from_bridge(bridge)), bridge(TOKENS)) < 1e-12
