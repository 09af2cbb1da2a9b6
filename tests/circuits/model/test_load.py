"""Loading: the sources of models, what is refused, and the real models with known answers."""

from __future__ import annotations

import copy
import gc
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from circuits.engine import Engine
from circuits.model.load import (
    LoadedModel,
    ModelConfig,
    from_bridge,
    from_module,
    load_model,
    weight_hash,
)
from tests import tiny

TOKENS = torch.randint(29, (2, 7), generator=torch.Generator().manual_seed(11))
HUGGINGFACE = {"gpt2": tiny.gpt2_module, "llama": tiny.llama_module}
NATIVE = {
    "plain": {},
    "attention only": {"attn_only": True, "normalization_type": None},
    "grouped queries": {"n_heads": 4, "n_key_value_heads": 2},
}


def load(path, **changes) -> LoadedModel:
    return load_model(ModelConfig(path=str(path), **changes))


@pytest.fixture(scope="module", params=HUGGINGFACE)
def folder(request, tmp_path_factory):
    """A HuggingFace folder, and the module that it was saved from."""
    module = HUGGINGFACE[request.param]()
    path = tmp_path_factory.mktemp(request.param)
    module.save_pretrained(path)
    return path, module


# ---- TransformerLens files, made by hand ---------------------------------------------------------


def legacy(bridge) -> dict[str, torch.Tensor]:
    """The bridge's weights under the names and in the per-head shapes of HookedTransformer's state
    dicts.
    """
    config, state = bridge.cfg, {}
    width, model_width = config.d_head, config.d_model

    def linear(part, name: str, weight: str, bias: str) -> None:
        state[f"{name}.{weight}"] = part.weight.T.contiguous()
        state[f"{name}.{bias}"] = part.bias

    state["embed.W_E"] = bridge.embed.original_component.weight
    state["pos_embed.W_pos"] = bridge.pos_embed.original_component.weight
    linear(bridge.unembed.original_component, "unembed", "W_U", "b_U")
    norms = {} if config.normalization_type is None else {"ln_final": bridge.ln_final}
    for layer, block in enumerate(bridge.blocks):
        name = f"blocks.{layer}"
        for side in "qkv":
            part = getattr(block.attn, side).original_component
            under = "_" if side != "q" and config.n_key_value_heads else ""
            weight = part.weight.reshape(-1, width, model_width).transpose(
                1, 2
            )  # [heads, d_model, d_head]
            state[f"{name}.attn.{under}W_{side.upper()}"] = weight.contiguous()
            state[f"{name}.attn.{under}b_{side.upper()}"] = part.bias.reshape(-1, width)
        o = block.attn.o.original_component
        state[f"{name}.attn.W_O"] = o.weight.T.reshape(-1, width, model_width).contiguous()
        state[f"{name}.attn.b_O"] = o.bias
        state[f"{name}.attn.mask"] = (
            torch.ones(config.n_ctx, config.n_ctx).tril().bool()
        )  # buffers of its time
        state[f"{name}.attn.IGNORE"] = torch.tensor(-math.inf)
        if not config.attn_only:
            linear(getattr(block.mlp, "in").original_component, f"{name}.mlp", "W_in", "b_in")
            linear(block.mlp.out.original_component, f"{name}.mlp", "W_out", "b_out")
        if norms:
            norms[f"{name}.ln1"] = block.ln1
        if norms and not config.attn_only:
            norms[f"{name}.ln2"] = block.ln2
    for name, norm in norms.items():
        state[f"{name}.w"], state[f"{name}.b"] = (
            norm.original_component.weight,
            norm.original_component.bias,
        )
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def bridge_layout(bridge) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in bridge.state_dict().items()}


LAYOUTS = {"legacy": legacy, "bridge": bridge_layout}


def config_of(bridge) -> dict:
    fields = (
        "d_model",
        "d_head",
        "n_heads",
        "n_layers",
        "n_ctx",
        "d_vocab",
        "act_fn",
        "d_mlp",
        "eps",
        "attn_only",
        "normalization_type",
        "n_key_value_heads",
    )
    return {name: getattr(bridge.cfg, name) for name in fields}


def write(folder, state: dict, config: dict, suffix: str):
    path = folder / f"model.v1{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    (folder / "model.v1.config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("layout", "suffix", "variant"),
    [
        *[(layout, suffix, "plain") for layout in LAYOUTS for suffix in (".pt", ".safetensors")],
        ("legacy", ".pt", "attention only"),
        ("legacy", ".pt", "grouped queries"),
    ],
)
def test_transformer_lens_files_give_the_model_they_were_made_from(
    tmp_path, layout, suffix, variant
):
    bridge = tiny.native_bridge(torch.float32, **NATIVE[variant])
    state = LAYOUTS[layout](bridge)
    model = load(write(tmp_path, state, config_of(bridge), suffix))
    with torch.no_grad():
        expected = bridge(TOKENS)
    assert expected.std() > 0.3
    torch.testing.assert_close(model.bridge(TOKENS), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        Engine(model).logits(tiny.from_tokens(TOKENS)), expected, atol=1e-4, rtol=1e-4
    )
    assert model.weight_hash == weight_hash(state)
    assert (model.tokenizer, model.hf_config, model.prepend_bos) == (None, None, False)
    assert (model.context, model.vocabulary) == (16, 29)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", ["missing", "shape", "extra"])
def test_transformer_lens_weights_that_do_not_fit_are_refused(tmp_path, layout, change):
    bridge = tiny.native_bridge(torch.float32)
    state = LAYOUTS[layout](bridge)
    name = next(name for name in state if "mlp.W_in" in name or "mlp.in" in name)
    if change == "missing":
        del state[name]
    elif change == "shape":
        state[name] = state[name][:, :-1].clone()
    else:
        state["blocks.5.mlp.W_in" if layout == "legacy" else "blocks.5.mlp.in.weight"] = state[
            name
        ].clone()
    with pytest.raises(
        ValueError, match=r"model\.v1\.pt: the weights do not fit model\.v1\.config\.json"
    ):
        load(write(tmp_path, state, config_of(bridge), ".pt"))


def test_heads_of_another_number_are_refused_though_the_sizes_fit(tmp_path):
    bridge = tiny.native_bridge(torch.float32, d_head=4)
    config = {**config_of(bridge), "n_heads": 2, "d_head": 6}
    with pytest.raises(ValueError, match=r"the weights do not fit .*W_Q.* has shape \(3, 12, 4\)"):
        load(write(tmp_path, legacy(bridge), config, ".pt"))


@pytest.mark.parametrize("buffer", ["rotary_sin", "rotary_cos"])
def test_legacy_rotary_checkpoints_are_refused(tmp_path, buffer):
    bridge = tiny.native_bridge(torch.float32)
    state = {**legacy(bridge), f"blocks.0.attn.{buffer}": torch.zeros(16, 4)}
    with pytest.raises(ValueError, match=f"legacy rotary checkpoints are refused .*{buffer}"):
        load(write(tmp_path, state, config_of(bridge), ".pt"))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_both_transformer_lens_files_must_be_there(tmp_path, suffix):
    with pytest.raises(
        FileNotFoundError, match=rf"no file .*v1\{suffix}; a TransformerLens model is X\{suffix}"
    ):
        load(tmp_path / f"model.v1{suffix}")
    (tmp_path / f"model.v1{suffix}").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no file .*model\.v1\.config\.json"):
        load(tmp_path / f"model.v1{suffix}")


@pytest.mark.parametrize("text", ["{", "[]", '{"n_layers": 2}', '{"no_such_field": 1}'])
def test_a_broken_transformer_lens_configuration_is_refused(tmp_path, text):
    bridge = tiny.native_bridge(torch.float32)
    path = write(tmp_path, legacy(bridge), {}, ".pt")
    (tmp_path / "model.v1.config.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"model\.v1\.config\.json is no TransformerLens configuration"
    ):
        load(path)


class Opens:
    """What a hostile file would run on unpickling."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path):
    path = write(tmp_path, {"embed.W_E": Opens(tmp_path / "was_run")}, {}, ".pt")
    with pytest.raises(ValueError, match=r"model\.v1\.pt holds no tensors that can be read"):
        load(path)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_without_tensors_are_refused(tmp_path, suffix):
    path = write(tmp_path, {"a": torch.zeros(1)}, {}, suffix)
    path.write_bytes(b"neither of the two")
    with pytest.raises(ValueError, match="holds no tensors that can be read"):
        load(path)


@pytest.mark.parametrize(
    "content", [{"model": {"embed.W_E": torch.zeros(3)}}, [torch.zeros(3)], torch.zeros(3)]
)
def test_a_training_checkpoint_is_refused(tmp_path, content):
    """A state dict is wanted, not what a trainer wraps around it."""
    bridge = tiny.native_bridge(torch.float32)
    with pytest.raises(ValueError, match="holds no state dict, which is a mapping"):
        load(write(tmp_path, content, config_of(bridge), ".pt"))


# ---- HuggingFace folders -------------------------------------------------------------------------


def test_a_huggingface_folder_gives_the_model_it_was_saved_from(folder):
    path, module = folder
    model = load(path)
    with torch.no_grad():
        expected = module(TOKENS).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(model.bridge(TOKENS), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        Engine(model).logits(tiny.from_tokens(TOKENS)), expected, atol=1e-4, rtol=1e-4
    )
    assert model.weight_hash == weight_hash(module.state_dict()) == from_module(module).weight_hash
    assert model.path == str(path) and model.tokenizer is None and model.prepend_bos is False
    assert (model.context, model.vocabulary) == (16, 29)
    assert not any(parameter.requires_grad for parameter in model.bridge.parameters())


def test_a_path_alone_is_a_configuration_with_defaults(folder):
    configured = load(folder[0])
    for path in (folder[0], str(folder[0])):
        model = load_model(path)
        assert (model.path, model.weight_hash) == (configured.path, configured.weight_hash)
        assert torch.equal(model.probe_logits, configured.probe_logits)


def test_a_reference_into_a_package_and_a_state_dict_load_by_their_names(tmp_path):
    assert load_model("pkg://mad/models/recall_redirect").vocabulary > 0
    bridge = tiny.native_bridge(torch.float32)
    path = write(tmp_path, legacy(bridge), config_of(bridge), ".pt")
    assert (
        load_model(path).weight_hash == load_model(str(path)).weight_hash == load(path).weight_hash
    )
    with pytest.raises(FileNotFoundError, match="no model at ./nothing"):
        load_model("./nothing")


def test_dtype_is_taken_after_the_hash(folder):
    path, module = folder
    models = {
        dtype: load(path, dtype=dtype) for dtype in ("float32", "float64", "bfloat16", "float16")
    }
    assert {model.weight_hash for model in models.values()} == {weight_hash(module.state_dict())}
    for name, model in models.items():
        assert {parameter.dtype for parameter in model.bridge.parameters()} == {
            getattr(torch, name)
        }
        assert model.probe_logits.dtype == Engine(model).dtype == getattr(torch, name)


def test_a_missing_model_is_named(tmp_path):
    for path in (tmp_path / "nothing", "./nothing", "~/no/such/model", "a/b/c"):
        with pytest.raises(
            FileNotFoundError, match="no model at .*nothing|no model at .*(such/model|a/b/c)"
        ):
            load(path)


def test_a_folder_without_configuration_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="holds no config.json, so it is no HuggingFace model folder"
    ):
        load(tmp_path)


@pytest.mark.parametrize("name", ["gpt2-not-here", "someone/no-such-model"])
def test_a_hub_name_without_the_network_says_so(name):
    with pytest.raises(
        FileNotFoundError, match=f"{name}.* could not be had from the HuggingFace hub.*network"
    ):
        load(name)


@pytest.mark.parametrize(
    "architectures", [["MambaForCausalLM"], [], None, ["XGLMForCausalLM", "XGLMModel"]]
)
def test_other_architectures_are_refused_before_their_weights_are_read(
    folder, tmp_path, architectures
):
    config = json.loads((folder[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    with pytest.raises(
        ValueError, match="is not supported; supported are GPT2LMHeadModel, .*LlamaForCausalLM, "
    ):
        load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"architectures": ["GPT2LMHeadModel"]}'])
def test_a_broken_configuration_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json is no HuggingFace configuration"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "missing",
            "1 missing keys, the first is .*(layers|h)\\.1.*; is config.json of this model",
        ),
        ("extra", "1 unexpected keys, the first is extra; is config.json of this model"),
        (
            "shape",
            "1 mismatched keys, the first is .*(layers|h)\\.1.*; is config.json of this model",
        ),
        ("broken", "model.safetensors is no file of tensors"),
    ],
)
def test_huggingface_weights_that_do_not_fit_are_refused(folder, tmp_path, change, message):
    (tmp_path / "config.json").write_bytes((folder[0] / "config.json").read_bytes())
    state = load_file(folder[0] / "model.safetensors")
    name = next(
        name
        for name in state
        if name.endswith(("h.1.mlp.c_fc.weight", "layers.1.mlp.up_proj.weight"))
    )
    if change == "missing":
        del state[name]
    elif change == "extra":
        state["extra"] = torch.zeros(2)
    elif change == "shape":
        state[name] = state[name][:, :-1].contiguous()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if change == "broken":
        (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_an_unknown_dtype_is_refused(folder):
    with pytest.raises(
        ValueError, match="dtype='int8', but it must be one of float32, float64, bfloat16, float16"
    ):
        load(folder[0], dtype="int8")


# ---- modules in memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", tiny.HUGGINGFACE)
def test_a_module_in_memory_is_left_as_it_was(name, dtype):
    module = tiny.HUGGINGFACE[name]().to(dtype).train()
    before, names = copy.deepcopy(module.state_dict()), [n for n, _ in module.named_modules()]
    config = module.config.to_dict()
    with torch.no_grad():
        logits = module.eval()(TOKENS).logits
    assert logits.std() > 0.3
    module.train()
    model = from_module(module)
    Engine(model)
    after = module.state_dict()
    assert list(before) == list(after) and all(
        torch.equal(before[key], after[key]) for key in before
    )
    assert [n for n, _ in module.named_modules()] == names and module.config.to_dict() == config
    assert module.training and all(parameter.requires_grad for parameter in module.parameters())
    with torch.no_grad():
        assert torch.equal(module.eval()(TOKENS).logits, logits)
        next(module.parameters()).zero_()  # and the loaded model does not change with it
    # Norms, rotary tables and softmax are in float32 in part of the families, whatever the weights
    # are.
    torch.testing.assert_close(model.bridge(TOKENS), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", tiny.HUGGINGFACE)
def test_a_folder_of_any_family_gives_the_model_it_was_saved_from(name, tmp_path):
    module = tiny.HUGGINGFACE[name]()
    module.save_pretrained(tmp_path)
    model = load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            model.bridge(TOKENS), module(TOKENS).logits, atol=1e-4, rtol=1e-4
        )
    assert (model.context, model.vocabulary) == (16, 29)
    assert model.weight_hash == weight_hash(module.state_dict())


def test_modules_without_a_huggingface_configuration_and_wrapped_ones_are_refused():
    with pytest.raises(ValueError, match="Linear has no HuggingFace configuration"):
        from_module(torch.nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match="from_bridge takes TransformerLens native bridges, not 'GPT2LMHeadModel'"
    ):
        from_bridge(tiny.gpt2().bridge)


def test_the_probe_is_of_the_model_before_it_was_wrapped():
    module = tiny.gpt2_module().double()
    model = from_module(module)
    assert model.probe_tokens.shape == (2, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            model.probe_logits, module(model.probe_tokens).logits, atol=0, rtol=0
        )


# ---- the hash ------------------------------------------------------------------------------------


def test_the_hash_sees_one_bit_a_name_a_type_and_a_shape():
    weights = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.tensor(1.0),
        "c": torch.zeros(2, dtype=torch.int16),
    }
    bit = copy.deepcopy(weights)
    bit["a"].view(torch.int32)[1, 2] ^= 1
    assert bit["a"][1, 2] != 5
    others = [
        bit,
        {**weights, "b": -weights["b"]},
        {**weights, "a": weights["a"].reshape(3, 2)},
        {**weights, "a": weights["a"].view(torch.int32)},
        {**weights, "c": weights["c"].bfloat16()},
        {"a": weights["a"], "b": weights["b"], "d": weights["c"]},
        {"a": weights["a"], "b": weights["b"]},
        {**weights, "d": torch.zeros(0)},
    ]
    hashes = [weight_hash(tensors) for tensors in (weights, *others)]
    assert len(set(hashes)) == len(hashes)


def test_the_hash_does_not_see_order_or_memory_layout():
    one, other = torch.arange(6.0).reshape(2, 3), torch.ones(2)
    transposed = one.T.contiguous().T
    assert not transposed.is_contiguous()
    assert weight_hash({"a": one, "b": other}) == weight_hash({"b": other, "a": transposed})


# ---- real models ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(cases):
    return load(cases / "stories260K")


def greedy(factored: Engine, tokens: list[int], count: int) -> list[int]:
    for _ in range(count):
        tokens = [
            *tokens,
            int(factored.logits(tiny.from_tokens(torch.tensor([tokens])))[0, -1].argmax()),
        ]
    return tokens


@pytest.mark.parametrize(
    ("text", "following"),
    [
        ("The boy was sad, so", "he"),
        ("The girl was sad, so", "she"),
        ("Once upon a time, there was a little girl named Lily.", "She"),
    ],
)
def test_stories_goes_on_with_the_right_pronoun(stories, text, following):
    assert stories.prepend_bos is True
    tokens = stories.tokenizer.encode(text)
    assert tokens[0] == stories.tokenizer.bos_token_id
    longer = greedy(Engine(stories), tokens, 1)
    assert stories.tokenizer.decode(longer[len(tokens) :]).strip() == following


def test_stories_generates_what_huggingface_generates(stories, cases):
    from transformers import AutoModelForCausalLM

    factored, module = (
        Engine(stories),
        AutoModelForCausalLM.from_pretrained(cases / "stories260K").eval(),
    )
    assert factored.graph.n_edges == 1701
    tokens = stories.tokenizer.encode("Once upon a time")
    text = greedy(factored, tokens, 20)
    with torch.no_grad():
        following = module(torch.tensor([text])).logits[0].argmax(-1).tolist()
    assert following[len(tokens) - 1 : -1] == text[len(tokens) :]
    assert stories.tokenizer.decode(text).startswith(
        "<s> Once upon a time, there was a little girl named Lily."
    )


@pytest.mark.parametrize(
    ("name", "accuracy"), [("l_2_2", 1.0), ("finetuned_0", 0.983), ("finetuned_400_broken", 0.039)]
)
def test_induction_models_reach_their_known_accuracy(cases, name, accuracy):
    folder = cases / "gbmi_induction_2L1H"
    factored = Engine(load(folder / f"indhead_{name}.pt"))
    assert factored.graph.attention_only and factored.graph.n_edges == 12
    data = np.load(folder / "test.eval.npz", allow_pickle=False)
    logits = factored.logits(tiny.from_tokens(torch.tensor(data["tokens"])))[:, data["answer_pos"]]
    right = logits.argmax(-1) == torch.tensor(data["labels"])
    assert right.double().mean().item() == pytest.approx(accuracy, abs=5e-4)


@pytest.mark.parametrize(("program", "edges"), [("reverse", 77), ("xproportion", 23)])
def test_compiled_programs_compute_their_labels(cases, program, edges):
    folder = cases / "tracr_compiled"
    factored = Engine(load(folder / f"{program}.pt"))
    assert factored.graph.n_edges == edges and not factored.graph.causal
    data = np.load(folder / f"{program}.eval.npz", allow_pickle=False)
    logits = factored.logits(tiny.from_tokens(torch.tensor(data["tokens"], dtype=torch.long)))[
        :, data["answer_pos"]
    ]
    labels = torch.tensor(data["labels"])
    if program == "reverse":
        assert torch.equal(logits.argmax(-1), labels)
    else:
        torch.testing.assert_close(logits[..., 0], labels, atol=1e-4, rtol=0)


def test_a_tokenizer_stays_as_it_is_beside_a_bridge_that_takes_text(folder, cases):
    from transformers import GPT2Tokenizer

    files = [str(cases / "gpt2_tokenizer" / name) for name in ("vocab.json", "merges.txt")]
    tokenizer = GPT2Tokenizer(*files, bos_token=None)
    before = len(tokenizer), tokenizer.bos_token, tokenizer.pad_token
    loaded = from_module(folder[1], tokenizer=tokenizer)
    assert (len(tokenizer), tokenizer.bos_token, tokenizer.pad_token) == before
    assert loaded.tokenizer is tokenizer and before[1:] == (None, None)
    text = "so he"
    assert loaded.bridge.to_tokens(text, prepend_bos=False).tolist() == [tokenizer.encode(text)]
    asked = from_module(folder[1], tokenizer=tokenizer, prepend_bos=True)
    with pytest.raises(ValueError, match="the tokenizer has no BOS token; set prepend_bos=False"):
        asked.prompts([{"clean": text}])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
def test_one_number_that_is_not_finite_is_found(folder, dtype, value):
    module = copy.deepcopy(folder[1]).to(dtype)
    name, tensor = list(module.named_parameters())[-1]
    tensor.data.flatten()[-1] = value
    message = rf"{name} is not finite \(NaN or infinite\) in 1 of its {tensor.numel()}"
    with pytest.raises(ValueError, match=message):
        from_module(module)


def test_the_collector_is_as_before_whatever_happens():
    gc.disable()
    try:
        from_module(tiny.gpt2_module())
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(FileNotFoundError):
        load("./no-such-folder")
    assert gc.isenabled()


def test_a_cast_leaves_rotary_frequencies_alone(tmp_path):
    tiny.llama_module().save_pretrained(tmp_path / "llama")
    loaded = load_model(ModelConfig(path=str(tmp_path / "llama"), dtype="bfloat16"))
    rotary = loaded.bridge.rotary_emb.original_component
    assert rotary.inv_freq.dtype == torch.float32
    assert loaded.bridge.embed.original_component.weight.dtype == torch.bfloat16
    Engine(loaded)


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3"])
def test_weights_stored_in_bfloat16_do_not_round_the_scale_of_embeddings(name, tmp_path):
    """With 12 numbers it is 3.4641, in bfloat16 3.46875."""
    tiny.HUGGINGFACE[name]().bfloat16().save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    embedding = loaded.bridge.embed.original_component
    theirs = 12**0.5 * embedding.weight[TOKENS]
    torch.testing.assert_close(embedding(TOKENS), theirs)
    half = load_model(ModelConfig(path=str(tmp_path), dtype="bfloat16"))
    table = half.bridge.embed.original_component.weight
    ours = half.bridge.embed.original_component(TOKENS)
    assert torch.equal(ours, torch.tensor(12**0.5, dtype=torch.bfloat16) * table[TOKENS])


def test_split_input_goes_with_the_model(tmp_path):
    tiny.gpt2_module().save_pretrained(tmp_path / "gpt2")
    loaded = load_model(ModelConfig(path=str(tmp_path / "gpt2"), split_input=True))
    assert Engine(loaded).graph.n_inputs == 2
