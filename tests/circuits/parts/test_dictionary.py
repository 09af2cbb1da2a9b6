"""Dictionaries: what each kind makes of an input, one number at a time; runs against hooks; what is
refused.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from circuits.ablation import AblationConfig, fit_ablation
from circuits.engine import Engine
from circuits.parts import UnitsConfig, divide, read_dictionary
from tests import dictionaries, tiny

PROMPTS = tiny.prompts(4, seed=2, longest=8)
REFERENCE = tiny.prompts(6, seed=1, longest=12)
ENGINES = {
    "gpt2": Engine(tiny.gpt2(activation_function="relu")),
    "neox": Engine(tiny.huggingface("neox")),
    "gemma2": Engine(tiny.huggingface("gemma2")),
}


def divided_by(name: str, *folders, nodes: bool = False):
    config = UnitsConfig("features", dictionaries=[str(folder) for folder in folders], nodes=nodes)
    return divide(ENGINES[name], config)


def ablated(divided, ablation: str = "counterfactual") -> torch.Tensor:
    fitted = fit_ablation(AblationConfig(ablation), divided.engine, REFERENCE, source=divided)
    return fitted.writers(divided.engine, PROMPTS)[0]


def close(ours, expected, atol: float = 1e-9) -> None:
    torch.testing.assert_close(ours, expected, atol=atol, rtol=atol)


# ---- encoders ------------------------------------------------------------------------------------


def by_hand(weights: dict, x: list[float], kind: str, k: int | None, by_norm: bool) -> list[float]:
    """The features of one input."""
    w = {name: tensor.tolist() for name, tensor in weights.items()}
    before = []
    for feature in range(len(w["W_enc"][0])):
        total = 0.0
        for number, value in enumerate(x):
            total += (value - w["b_dec"][number]) * w["W_enc"][number][feature]
        before.append(total)
    if kind == "gated":
        sizes = [p * math.exp(r) + b for p, r, b in zip(before, w["r_mag"], w["b_mag"])]
        return [max(s, 0) * (p + g > 0) for s, p, g in zip(sizes, before, w["b_gate"])]
    before = [p + b for p, b in zip(before, w["b_enc"])]
    if kind == "jumprelu":
        return [max(p, 0) if p > t else 0.0 for p, t in zip(before, w["threshold"])]
    if k is None:
        return [max(p, 0) for p in before]
    lengths = [math.hypot(*row) if by_norm else 1.0 for row in w["W_dec"]]
    order = sorted(range(len(before)), key=lambda f: -before[f] * lengths[f])[:k]
    return [max(p, 0) if f in order else 0.0 for f, p in enumerate(before)]


KINDS = {
    "standard": {},
    "jumprelu": {},
    "gated": {},
    "topk": {"k": 3},
    "topk, by norm": {"k": 3, "rescale_acts_by_decoder_norm": True},
    "standard, topk of old": {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}},
}


@pytest.mark.parametrize("name", KINDS)
def test_features_are_what_the_formulas_say(tmp_path, name):
    kind, config = name.partition(",")[0], KINDS[name]
    weights = dictionaries.random(5, 7, kind)
    folder = dictionaries.saved(tmp_path / "d", weights, architecture=kind, **config)
    read = read_dictionary(folder)
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    k = config.get("k") or config.get("activation_fn_kwargs", {}).get("k")
    by_norm = config.get("rescale_acts_by_decoder_norm", False)
    expected = [by_hand(weights, row, kind, k, by_norm) for row in x.tolist()]
    close(read.encode(x), torch.tensor(expected, dtype=torch.float64))
    assert 0 < (read.encode(x) > 0).double().mean() < 1


def test_the_input_bias_is_taken_off_only_where_the_file_says_so(tmp_path):
    weights = dictionaries.random(5, 7)
    folder = dictionaries.saved(tmp_path / "d", weights, apply_b_dec_to_input=False)
    x = torch.ones(1, 5, dtype=torch.float64)
    expected = (x @ weights["W_enc"] + weights["b_enc"]).relu()
    close(read_dictionary(folder).encode(x), expected)


# ---- runs ----------------------------------------------------------------------------------------

HOOKS = {  # name in a file, name in the bridge, site
    "blocks.1.hook_resid_pre": ("blocks.1.hook_in", "r1"),
    "blocks.1.hook_resid_post": ("blocks.1.hook_out", "r2"),
    "blocks.0.hook_out": ("blocks.0.hook_out", "r1"),
    "blocks.0.hook_resid_pre": ("blocks.0.hook_in", "r0"),
    "blocks.1.hook_mlp_out": ("blocks.1.mlp.hook_out", "m1"),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_without_its_error_a_site_has_what_the_dictionary_rebuilds(tmp_path, name, hook):
    weights = dictionaries.random(ENGINES[name].architecture.width, 30)
    folder = dictionaries.saved(tmp_path / "d", weights, metadata=dictionaries.at(hook))
    divided = divided_by(name, folder)
    place, site = HOOKS[hook]
    assert divided.units.sites[0].name == site and divided.units.n_parts == 31
    mask = torch.ones(31)
    mask[divided.units.index(f"{site}.error")] = 0

    def splice(value: torch.Tensor, hook) -> torch.Tensor:
        z = ((value - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]).relu()
        return z @ weights["W_dec"] + weights["b_dec"]

    ours = divided.masked(PROMPTS, mask, ablated(divided, "zero"))
    for row, length in enumerate(PROMPTS.lengths.tolist()):
        tokens = PROMPTS.clean[row, None, :length]
        theirs = ENGINES[name].model.bridge.run_with_hooks(tokens, fwd_hooks=[(place, splice)])[0]
        positions = PROMPTS.positions[row]
        close(ours[row, positions >= 0], theirs[positions[positions >= 0]], 1e-8)


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated", "topk"])
@pytest.mark.parametrize("name", ENGINES)
def test_with_no_part_of_the_stream_left_a_run_is_the_ablated_one(tmp_path, name, kind):
    engine = ENGINES[name]
    weights = dictionaries.random(engine.architecture.width, 20, kind)
    extra = {"k": 4} if kind == "topk" else {}
    folder = dictionaries.saved(tmp_path / "d", weights, architecture=kind, **extra)
    divided = divided_by(name, folder)
    numbers = ablated(divided)
    ones = torch.ones(divided.units.shape)
    kept, removed = divided.masked(PROMPTS, torch.stack([ones, 0 * ones]), numbers)
    real = PROMPTS.positions >= 0
    close(kept[real], engine.logits(PROMPTS)[real], 1e-4 if name == "gemma2" else 1e-8)
    close(removed[real], engine.logits(PROMPTS.corrupted())[real], 1e-4)


@pytest.mark.parametrize("ablation", ["mean", "positional_mean", "resample", "counterfactual"])
@pytest.mark.parametrize("name", ENGINES)
def test_an_mlp_with_no_feature_and_no_error_is_removed(tmp_path, name, ablation):
    """On Gemma 2 too, whose post-norm stands before what the dictionary reads."""
    engine = ENGINES[name]
    weights = dictionaries.random(engine.architecture.width, 20)
    metadata = dictionaries.at("blocks.0.hook_mlp_out")
    divided = divided_by(name, dictionaries.saved(tmp_path / "d", weights, metadata=metadata))
    nodes = divide(engine, UnitsConfig("nodes"))
    mask = torch.ones(nodes.units.shape)
    mask[nodes.units.index("m0")] = 0.25
    share = torch.full(divided.units.shape, 0.25)
    if ablation == "counterfactual":  # the sum of parts, at any share of all of them
        close(
            divided.masked(PROMPTS, share, ablated(divided)),
            nodes.masked(PROMPTS, mask, ablated(nodes)),
            1e-6,
        )
    mask[nodes.units.index("m0")] = 0
    close(
        divided.masked(PROMPTS, 0 * share, ablated(divided, ablation)),
        nodes.masked(PROMPTS, mask, ablated(nodes, ablation)),
        1e-6,
    )


READS = [("ln2.hook_normalized", False), ("ln2.hook_normalized", True), ("mlp.hook_in", True)]


@pytest.mark.parametrize(("hook", "unfolded"), READS)
def test_an_exact_transcoder_has_the_neurons_as_features(tmp_path, hook, unfolded):
    """Its encoder is the MLP's first layer, with the norm's gain in it where it reads without."""
    engine = ENGINES["gpt2"]
    block = engine.architecture.blocks[1]
    assert block.mlp is not None and block.norm2 is not None and block.norm2.module is not None
    norm = block.norm2.module
    up, down = block.mlp.up, block.mlp.down
    into, bias = up.weight.T.detach(), up.bias.detach()
    if not unfolded:
        into, bias = norm.weight.detach()[:, None] * into, bias + norm.bias.detach() @ into
    weights = {"W_enc": into, "b_enc": bias, "W_dec": down.weight.T.detach(), "b_dec": down.bias}
    weights = {key: value.detach().clone() for key, value in weights.items()}
    told = {"model_from_pretrained_kwargs": {"fold_ln": False}}
    loading = told if unfolded and "ln2" in hook else {}
    folder = dictionaries.saved(
        tmp_path / "d",
        weights,
        architecture="transcoder",
        apply_b_dec_to_input=False,
        d_out=12,
        metadata=dictionaries.at(f"blocks.1.{hook}", "blocks.1.hook_mlp_out", **loading),
    )
    divided, neurons = (
        divided_by("gpt2", folder),
        divide(engine, UnitsConfig("neurons", layers=[1])),
    )
    assert divided.units.part_name(5) == "m1.f5" and len(divided.units.sites[0]) == 49
    read = divided.read(engine, PROMPTS)[0]
    assert read[..., -12:].abs().max() < 1e-9  # the error
    mask = torch.rand(48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    close(
        divided.masked(PROMPTS, torch.cat([mask, torch.ones(1)]), ablated(divided)),
        neurons.masked(PROMPTS, mask, ablated(neurons)),
        1e-8,
    )


def test_a_stream_that_was_centred_is_read_centred(tmp_path):
    engine = ENGINES["gpt2"]
    weights = dictionaries.random(12, 20)
    kwargs = {"center_writing_weights": True}
    metadata = dictionaries.at("blocks.1.hook_resid_pre", model_from_pretrained_kwargs=kwargs)
    folder = dictionaries.saved(tmp_path / "d", weights, metadata=metadata)
    divided = divided_by("gpt2", folder)
    whole = engine.writers(PROMPTS)[:5].sum(0) + engine.architecture.blocks[0].attention.o.bias
    centred = whole - whole.mean(-1, keepdim=True)
    expected = ((centred - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]).relu()
    close(divided.read(engine, PROMPTS)[0][..., 12:32], expected)


def test_gradients_through_dictionaries_are_those_in_the_mask(tmp_path):
    folders = [
        dictionaries.saved(tmp_path / name, dictionaries.random(12, 20, kind, seed), **config)
        for seed, (name, kind, config) in enumerate(
            [
                ("a", "standard", {"metadata": dictionaries.at("blocks.0.hook_mlp_out")}),
                ("b", "jumprelu", {"architecture": "jumprelu"}),
                (
                    "c",
                    "topk",
                    {
                        "architecture": "topk",
                        "k": 5,
                        "metadata": dictionaries.at("blocks.1.hook_resid_post"),
                    },
                ),
            ]
        )
    ]
    divided = divided_by("gpt2", *folders, nodes=True)
    names = [site.name for site in divided.units.sites]
    assert names == ["input", "a0", "m0", "r1", "a1", "m1", "r2"]
    numbers = ablated(divided)
    mask = torch.ones(divided.units.shape, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(divided.masked(PROMPTS, mask, numbers).sum(), mask)
    engine = divided.engine
    found = divided.gradients(PROMPTS, engine.embed(PROMPTS).sum(0), torch.sum)
    found = found * (divided.read(engine, PROMPTS)[0] - numbers)
    close(divided.gathered(found).sum((0, 1)), expected)


def test_a_dictionary_that_rebuilds_everything_leaves_nothing_unexplained(tmp_path):
    exact = divided_by("gpt2", dictionaries.saved(tmp_path / "e", dictionaries.exact(12)))
    noise = divided_by("gpt2", dictionaries.saved(tmp_path / "n", dictionaries.random(12, 20)))
    read = exact.read(exact.engine, PROMPTS)[0]
    assert exact.unexplained(read, PROMPTS)["r1"] < 1e-20
    assert noise.unexplained(noise.read(noise.engine, PROMPTS)[0], PROMPTS)["r1"] > 1


def test_a_trained_dictionary_explains_most_of_the_stream(tmp_path):
    engine = ENGINES["gpt2"]
    many = tiny.prompts(64, seed=7)
    whole = engine.writers(many)[:5].sum(0) + engine.architecture.blocks[0].attention.o.bias
    values = whole[many.key_mask].detach()
    weights = {name: one.requires_grad_() for name, one in dictionaries.random(12, 40).items()}
    with torch.no_grad():
        weights["W_dec"].mul_(0.1)
        weights["W_enc"].copy_(weights["W_dec"].T)
        weights["b_enc"].zero_()
        weights["b_dec"].copy_(values.mean(0))
    optimiser = torch.optim.Adam(weights.values(), lr=0.02)
    for _ in range(150):
        z = ((values - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]).relu()
        error = (z @ weights["W_dec"] + weights["b_dec"] - values).square().sum(-1)
        loss = (error + 0.01 * z.sum(-1)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    trained = {name: one.detach() for name, one in weights.items()}
    divided = divided_by("gpt2", dictionaries.saved(tmp_path / "d", trained))
    share = divided.unexplained(divided.read(engine, PROMPTS)[0], PROMPTS)["r1"]
    assert share < 0.2


# ---- what is refused -----------------------------------------------------------------------------

CONFIGS = {
    "architecture='crosscoder' is not supported; supported are standard,": {
        "architecture": "crosscoder"
    },
    "architecture='skip_transcoder'": {"architecture": "skip_transcoder"},
    r"architecture=\[\]": {"architecture": []},
    "normalize_activations='layer_norm' is not supported, only 'none'; fold": {
        "normalize_activations": "layer_norm"
    },
    "reshape_activations='hook_z'": {"reshape_activations": "hook_z"},
    "finetuning_scaling_factor=True": {"finetuning_scaling_factor": True},
    "activation_fn='tanh-relu'": {"activation_fn": "tanh-relu"},
    "hook_name='blocks.0.attn.hook_z' is not supported; supported are blocks.N.hook_resid_pre": {
        "metadata": dictionaries.at("blocks.0.attn.hook_z")
    },
    "hook_name=None": {"metadata": {}},
    r"hook_name=\['blocks": {"metadata": {"hook_name": ["blocks.0.hook_resid_pre"]}},
    "metadata is 3": {"metadata": 3},
    "hook_layer=4, but hook_name": {"hook_layer": 4},
    "d_in is -12": {"d_in": -12},
    "d_sae is '20'": {"d_sae": "20"},
    "d_sae is True": {"d_sae": True},
    "apply_b_dec_to_input is 1,": {"apply_b_dec_to_input": 1},
    "k is None": {"architecture": "topk"},
    "k is 0": {"architecture": "topk", "k": 0},
    "k=21, but there are d_sae=20": {"architecture": "topk", "k": 21},
    r"W_enc is \(12, 20\), but cfg.json makes it \(12, 19\)": {"d_sae": 19},
    "lacks threshold of jumprelu": {"architecture": "jumprelu"},
    "lacks b_gate, b_mag, r_mag of gated": {"architecture": "gated"},
    "hook_name_out=None": {"architecture": "transcoder"},
    "it reads block 1 and writes block 0": {
        "architecture": "transcoder",
        "metadata": dictionaries.at("blocks.1.ln2.hook_normalized", "blocks.0.hook_mlp_out"),
    },
    "model_from_pretrained_kwargs is 'x'": {
        "metadata": dictionaries.at("blocks.1.hook_resid_pre", model_from_pretrained_kwargs="x")
    },
}


@pytest.mark.parametrize("message", CONFIGS)
def test_files_that_say_something_else_are_refused(tmp_path, message):
    folder = dictionaries.saved(tmp_path / "d", dictionaries.random(12, 20), **CONFIGS[message])
    with pytest.raises(ValueError, match=message) as refused:
        read_dictionary(folder)
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)


TENSORS = {
    "lacks b_enc of standard": {"b_enc": None},
    "holds W_skip": {"W_skip": torch.zeros(12, 12)},
    "W_dec is not finite": {"W_dec": torch.full((20, 12), float("nan"))},
    "b_enc is torch.int64, but it must be float": {"b_enc": torch.zeros(20, dtype=torch.int64)},
    r"b_dec is \(1, 12\)": {"b_dec": torch.zeros(1, 12)},
    "features are rescaled": {"scaling_factor": torch.full((20,), 2.0)},
}


@pytest.mark.parametrize("message", TENSORS)
def test_other_tensors_are_refused(tmp_path, message):
    folder = dictionaries.saved(tmp_path / "d", dictionaries.random(12, 20))
    weights = {**load_file(folder / "sae_weights.safetensors"), **TENSORS[message]}
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(weights, folder / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=message):
        read_dictionary(folder)


def test_dictionaries_that_do_not_fit_the_model_are_refused(tmp_path):
    def made(name: str, width: int = 12, **config):
        return dictionaries.saved(tmp_path / name, dictionaries.random(width, 20), **config)

    one = made("one")
    with pytest.raises(ValueError, match="dictionaries .*one and .*two are both of r1; give one"):
        divided_by("gpt2", one, made("two", metadata=dictionaries.at("blocks.0.hook_out")))
    with pytest.raises(
        ValueError, match="is for values of 8 numbers, but .* has 12; it was trained"
    ):
        divided_by("gpt2", made("narrow", 8))
    beyond = made("beyond", metadata=dictionaries.at("blocks.2.hook_resid_post"))
    with pytest.raises(ValueError, match="is of r3, but the model has 2 blocks, with r0 to r2"):
        divided_by("gpt2", beyond)
    mlp = made("mlp", metadata=dictionaries.at("blocks.2.hook_mlp_out"))
    with pytest.raises(ValueError, match="is of m2, but the model has 2 blocks, with m0 to m1"):
        divided_by("gpt2", mlp)
    attention = Engine(tiny.native(attn_only=True))
    mlp = made("first", metadata=dictionaries.at("blocks.0.hook_mlp_out"))
    with pytest.raises(ValueError, match="is of an MLP, but the model has none"):
        divide(attention, UnitsConfig("features", dictionaries=[str(mlp)]))
    with pytest.raises(FileNotFoundError, match="cfg.json: a dictionary is a folder with"):
        divided_by("gpt2", tmp_path / "nothing")
    (one / "sae_weights.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(ValueError, match="one cannot be used: .*sae_weights.safetensors cannot be"):
        read_dictionary(one)
    (one / "cfg.json").write_text("[1]")
    with pytest.raises(ValueError, match="it holds no mapping"):
        read_dictionary(one)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 40) | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=6), inner, max_size=2)
    ),
    max_leaves=4,
)
FIELDS = (
    "architecture d_in d_sae d_out k apply_b_dec_to_input normalize_activations metadata hook_name "
    "hook_name_out hook_layer activation_fn activation_fn_kwargs model_from_pretrained_kwargs"
).split()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
def test_whatever_a_file_says_it_is_read_or_refused_in_one_line(tmp_path, changes):
    folder = dictionaries.saved(tmp_path / "d", dictionaries.random(12, 20))
    told = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**told, **changes}))
    try:
        read_dictionary(folder)
    except ValueError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
