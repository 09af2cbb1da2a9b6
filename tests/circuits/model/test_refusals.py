"""Models that are refused, each built for real, and the models beside them that are not."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from safetensors.torch import load_file, save_file
from torch import nn

from circuits.engine import Engine
from circuits.model.families import FAMILIES
from circuits.model.load import LoadedModel, ModelConfig, from_bridge, from_module, load_model
from circuits.model.refusals import REASONS, refuse_dtype, refuse_module
from tests import tiny

INDEX = "model.safetensors.index.json"


def load(path: Path, **changes) -> LoadedModel:
    return load_model(ModelConfig(path=str(path), **changes))


def rewrite(folder: Path, file: str, change) -> None:
    """Changes the tensors of a safetensors file, or the fields of a JSON file, in place."""
    path = folder / file
    content = json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)
    change(content)
    if path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        save_file(content, path, metadata={"format": "pt"})


@pytest.fixture
def llama(tmp_path):
    """A Llama folder of one file."""
    tiny.llama_module().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def shards(tmp_path):
    """A Llama folder of several files."""
    tiny.llama_module().save_pretrained(tmp_path / "shards", max_shard_size="3KB")
    assert (tmp_path / "shards" / INDEX).is_file()
    return tmp_path / "shards"


def same_logits(model: LoadedModel, module: nn.Module) -> None:
    with torch.no_grad():
        expected = module(model.probe_tokens).logits
        torch.testing.assert_close(model.bridge(model.probe_tokens), expected, atol=1e-4, rtol=1e-4)
    Engine(model)


# ---- no values: the meta device and offloading ---------------------------------------------------


@pytest.mark.parametrize(
    "place", [lambda: torch.device("meta"), accelerate.init_empty_weights], ids=["meta", "empty"]
)
def test_a_module_without_values_is_refused(place):
    from transformers import GPT2LMHeadModel

    config = tiny.gpt2_module().config
    with place():
        module = GPT2LMHeadModel(config)
    with pytest.raises(
        ValueError,
        match=r"^memory: transformer\.wte\.weight is on the meta device, .*from_pretrained",
    ):
        from_module(module)


def test_one_layer_without_values_is_refused():
    module: nn.Module = tiny.gpt2_module()
    module.get_submodule("transformer.h.1.mlp").to("meta")
    with pytest.raises(
        ValueError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight is on the meta device"
    ):
        from_module(module)


def test_weights_that_were_assigned_to_an_empty_module_leave_rotary_frequencies_without_values():
    from transformers import LlamaForCausalLM

    full = tiny.llama_module()
    with torch.device("meta"):
        module = LlamaForCausalLM(full.config)  # type: ignore[arg-type]
    module.load_state_dict(full.state_dict(), assign=True)
    with pytest.raises(ValueError, match=r"model\.rotary_emb\.inv_freq is on the meta device"):
        from_module(module)


def test_a_native_bridge_without_values_is_refused():
    bridge = tiny.native_bridge()
    bridge.original_model.to("meta")
    with pytest.raises(ValueError, match=r"memory: tok_embed\.weight is on the meta device"):
        from_bridge(bridge)


def test_no_model_is_loaded_to_the_meta_device(llama):
    with pytest.raises(ValueError, match="device='meta' holds no values to compute with; use cpu"):
        load(llama, device="meta")


def offloaded_to_disk(module: nn.Module, folder: Path) -> None:
    parts = ("wte", "wpe", "drop", "h.0", "ln_f")
    places = {
        "lm_head": "cpu",
        **{f"transformer.{part}": "cpu" for part in parts},
        "transformer.h.1": "disk",
    }
    accelerate.dispatch_model(module, places, main_device="cpu", offload_dir=str(folder))  # type: ignore[arg-type]


OFFLOADED = {
    "cpu": (
        lambda module, folder: accelerate.cpu_offload(module, torch.device("cpu")),
        "transformer.wte",
    ),
    "disk": (
        lambda module, folder: accelerate.disk_offload(module, folder, torch.device("cpu")),
        "transformer.wte",
    ),
    "device map": (offloaded_to_disk, "transformer.h.1.ln_1"),
}


@pytest.mark.parametrize("how", OFFLOADED)
def test_offloaded_modules_are_refused(tmp_path, how):
    module, (offload, name) = tiny.gpt2_module(), OFFLOADED[how]
    offload(module, tmp_path)
    with torch.no_grad():  # it computes as it stands
        assert module(torch.tensor([[1, 2]])).logits.isfinite().all()
    with pytest.raises(
        ValueError,
        match=f"memory: {name} is offloaded by accelerate.*device_map='cpu'.*remove_hook",
    ):
        from_module(module)


def test_an_offloaded_module_is_taken_when_its_weights_are_back():
    module = tiny.gpt2_module()
    accelerate.cpu_offload(module, torch.device("cpu"))
    remove_hook_from_submodules(module)
    same_logits(from_module(module), tiny.gpt2_module())


@pytest.mark.parametrize("hooks", [False, True])
def test_a_device_map_of_one_device_is_taken(hooks):
    module = tiny.gpt2_module()
    accelerate.dispatch_model(module, {"": "cpu"}, force_hooks=hooks)
    assert module.hf_device_map == {"": "cpu"}  # type: ignore[attr-defined]
    same_logits(from_module(module), module)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_a_module_on_two_devices_is_refused():
    module: nn.Module = tiny.gpt2_module()
    module.get_submodule("transformer.h.1").to("cuda")
    with pytest.raises(
        ValueError, match=r"wte\.weight has device cpu and transformer\.h\.1\..* cuda:0; move"
    ):
        from_module(module)


# ---- half-loaded checkpoints ---------------------------------------------------------------------


def test_shards_give_the_model_that_was_saved(shards):
    same_logits(load(shards), tiny.llama_module())


def test_a_missing_shard_is_named(shards):
    (shards / "model-00002-of-00007.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError,
        match="shards lacks model-00002-of-00007.safetensors, one of the 7 shards",
    ):
        load(shards)


def test_a_shard_without_one_of_its_tensors_is_named(shards):
    name = "model.layers.0.self_attn.k_proj.bias"
    rewrite(shards, "model-00002-of-00007.safetensors", lambda tensors: tensors.pop(name))
    with pytest.raises(
        ValueError,
        match="model-00002-of-00007.safetensors lacks 1 of the 6 tensors .* "
        f"the first is {name}; download",
    ):
        load(shards)


def test_an_index_without_one_of_the_shards_is_refused(shards):
    def without(index: dict) -> None:
        places = index["weight_map"].items()
        index["weight_map"] = {name: file for name, file in places if "00002" not in file}

    rewrite(shards, INDEX, without)
    name = r"model\.layers\.0\.self_attn\.k_proj\.bias"
    message = f"6 missing keys, the first is {name}; is config.json of this"
    with pytest.raises(ValueError, match=message):
        load(shards)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_broken_index_is_named(shards, text):
    (shards / INDEX).write_text(text)
    with pytest.raises(ValueError, match=f"{INDEX} is no index of shards .*; download it again"):
        load(shards)


@pytest.mark.parametrize(
    "file", ["model-00003-of-00007.safetensors", "model.safetensors", "pytorch_model.bin"]
)
@pytest.mark.parametrize("left", [0, 0.9])
def test_a_file_that_was_cut_short_is_named(llama, shards, file, left):
    folder = shards if "of" in file else llama
    if file.endswith(".bin"):
        torch.save(load_file(llama / "model.safetensors"), llama / file)
        (llama / "model.safetensors").unlink()
        assert load(llama).vocabulary == 29
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: int(left * len(content))])
    with pytest.raises(
        ValueError,
        match=f"{file} is no file of tensors, perhaps it was cut short; download or save",
    ):
        load(folder)


def test_a_folder_without_weights_is_refused(llama):
    (llama / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match="llama holds no weights .model.safetensors or .*; download or save"
    ):
        load(llama)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_named(llama, value):
    name = "model.layers.1.mlp.up_proj.weight"
    message = (
        rf"{name} is not finite \(NaN or infinite\) in 1 of its 240 values as torch.float32; "
        "take an earlier"
    )
    module = tiny.llama_module()
    with torch.no_grad():
        module.get_parameter(name)[3, 4] = value
    with pytest.raises(ValueError, match=f"^memory: {message}"):
        from_module(module)
    module.save_pretrained(llama)
    with pytest.raises(ValueError, match=f"{llama}: {message}"):
        load(llama)


def test_a_transformer_lens_model_that_is_not_finite_is_named():
    bridge = tiny.native_bridge()
    with torch.no_grad():
        bridge.blocks[1].attn.q.original_component.weight[0, 0] = math.nan
    with pytest.raises(
        ValueError, match=r"layers\.1\.attn\.q\.weight is not finite .* in 1 of its 180 values"
    ):
        from_bridge(bridge)


def test_weights_too_large_for_their_dtype_are_named(llama):
    rewrite(llama, "model.safetensors", lambda tensors: tensors["lm_head.weight"].fill_(1e5))
    assert load(llama).bridge is not None
    with pytest.raises(
        ValueError,
        match=r"lm_head\.weight is not finite .* in 348 of its 348 values as torch.float16",
    ):
        load(llama, dtype="float16")


# ---- tied weights --------------------------------------------------------------------------------


def edited(values: torch.Tensor | None = None) -> nn.Module:
    """A model whose configuration ties its embeddings, with an output embedding of its own."""
    module = tiny.llama_module(tie_word_embeddings=True)
    head, embedding = (
        module.get_submodule("lm_head"),
        module.get_parameter("model.embed_tokens.weight"),
    )
    assert head.weight is embedding
    head.weight = nn.Parameter(embedding.detach().clone() if values is None else values)
    return module


DIFFERENT = torch.randn(29, 12, generator=torch.Generator().manual_seed(3))
TIED = (
    r"the configuration ties lm_head\.weight to model\.embed_tokens\.weight "
    r"\(tie_word_embeddings=True\), but their "
    r"values differ; .*tie_word_embeddings=False.*module\.tie_weights\(\)"
)


def test_tied_embeddings_that_differ_are_refused_and_the_remedies_help(tmp_path):
    module = edited(DIFFERENT)
    with pytest.raises(ValueError, match=TIED):
        from_module(module)
    module.save_pretrained(tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["lm_head.weight"], DIFFERENT)
    with pytest.raises(ValueError, match=f"{tmp_path}: {TIED}"):
        load(tmp_path)

    rewrite(tmp_path, "config.json", lambda fields: fields.update(tie_word_embeddings=False))
    same_logits(load(tmp_path), module)
    module.config.tie_word_embeddings = False  # type: ignore[union-attr]
    same_logits(from_module(module), module)

    module = edited(DIFFERENT)
    module.tie_weights()  # type: ignore[operator]
    same_logits(from_module(module), tiny.llama_module(tie_word_embeddings=True))


def test_tied_embeddings_in_two_tensors_of_equal_values_are_taken(tmp_path):
    module = edited()
    same_logits(from_module(module), module)
    module.save_pretrained(tmp_path)
    same_logits(load(tmp_path), module)


def test_embeddings_shared_without_a_word_are_taken_but_saved_as_one(tmp_path):
    module = tiny.llama_module()
    module.get_submodule("lm_head").weight = module.get_parameter("model.embed_tokens.weight")
    same_logits(from_module(module), module)
    module.save_pretrained(tmp_path)  # which leaves the output embedding out
    with pytest.raises(
        ValueError,
        match=r"1 missing keys, the first is lm_head\.weight; .* tie_word_embeddings=True",
    ):
        load(tmp_path)
    rewrite(tmp_path, "config.json", lambda fields: fields.update(tie_word_embeddings=True))
    same_logits(load(tmp_path), module)


# ---- dtypes --------------------------------------------------------------------------------------


def cast(module: nn.Module, dtype: torch.dtype, within: str = "") -> nn.Module:
    for part in module.get_submodule(within).modules():
        for name, parameter in part.named_parameters(recurse=False):
            part._parameters[name] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
    return module


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (
            torch.float8_e4m3fn,
            r"^torch\.float8_e4m3fn cannot be computed with on cpu \(.*not impl.*\); use float32",
        ),
        (
            torch.complex64,
            r"^memory: transformer\.wte\.weight holds torch\.complex64, but the engine computes "
            r"with fl",
        ),
        (
            torch.int8,
            r"^memory: transformer\.wte\.weight holds torch\.int8, .* float weights; dequantise "
            r"the module",
        ),
    ],
)
def test_dtypes_that_cannot_be_computed_with_are_refused(dtype, message):
    with pytest.raises(ValueError, match=message):
        from_module(cast(tiny.gpt2_module(), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_that_can_be_computed_with_are_taken(dtype):
    refuse_dtype(dtype, torch.device("cpu"))
    assert from_module(cast(tiny.gpt2_module(), dtype)).probe_logits.dtype == dtype


def test_mixed_dtypes_are_refused():
    module = cast(tiny.gpt2_module(), torch.float16, "transformer.h.1.mlp")
    with pytest.raises(
        ValueError,
        match=r"wte\.weight has dtype torch\.float32 and "
        r"transformer\.h\.1\.mlp\.c_fc\.weight torch\.float16; cast",
    ):
        from_module(module)
    same_logits(from_module(module.float()), module)


def test_tensors_that_are_more_than_tensors_are_refused():
    class Sharded(torch.Tensor):
        pass

    module = tiny.gpt2_module()
    part = module.get_submodule("transformer.h.1.ln_2")
    part.weight = nn.Parameter(part.weight.detach().as_subclass(Sharded))  # type: ignore[union-attr]
    with pytest.raises(
        ValueError, match=r"h\.1\.ln_2\.weight is a Sharded, no plain tensor; gather or dequantise"
    ):
        from_module(module)


def test_whole_numbers_in_a_transformer_lens_file_are_refused(tmp_path):
    bridge = tiny.native_bridge(torch.float32)
    state = dict(bridge.state_dict())
    state["blocks.0.attn.q.weight"] = state["blocks.0.attn.q.weight"].to(torch.int8)
    torch.save(state, tmp_path / "a.pt")
    (tmp_path / "a.config.json").write_text(
        '{"d_model": 12, "d_head": 5, "n_heads": 3, "n_layers": 2, "n_ctx": 16}'
    )
    with pytest.raises(
        ValueError,
        match=r"a\.pt: blocks\.0\.attn\.q\.weight holds torch\.int8, but weights must be",
    ):
        load(tmp_path / "a.pt")


# ---- adapters ------------------------------------------------------------------------------------


class LoraLinear(nn.Linear):
    """What an adapter of rank 1 makes of a projection; at first it changes nothing."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.lora_A = nn.Linear(base.in_features, 1, bias=False)
        self.lora_B = nn.Linear(1, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + self.lora_B(self.lora_A(input))


class Wrapped(nn.Module):
    """What peft's other adapters make of a layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, *inputs):
        return self.base_layer(*inputs)


class PeftModelForCausalLM(nn.Module):
    """What peft makes of a model; prompt tuning leaves the layers as they are."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_model, self.config, self.peft_config = base, base.config, {"default": {}}


def replaced(module: nn.Module, name: str, make) -> nn.Module:
    module.set_submodule(name, make(module.get_submodule(name)))
    return module


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (lambda: replaced(tiny.llama_module(), Q, LoraLinear), rf"{Q}\.lora_A"),
        (lambda: replaced(tiny.llama_module(), Q, Wrapped), rf"{Q}\.base_layer"),
        (lambda: PeftModelForCausalLM(tiny.llama_module()), r"PeftModelForCausalLM\.peft_config"),
    ],
    ids=["lora", "base layer", "wrapper"],
)
def test_adapters_that_are_not_merged_are_refused(module, name):
    with pytest.raises(
        ValueError, match=f"^memory: {name} belongs to an adapter .*merge_and_unload"
    ):
        from_module(module())


def test_a_merged_module_that_remembers_its_adapter_is_taken():
    module = tiny.llama_module()
    module.peft_config = {"default": {}}  # type: ignore[assignment]
    same_logits(from_module(module), module)


@pytest.mark.parametrize("whole", [False, True])
def test_a_folder_of_an_adapter_is_refused(llama, whole):
    (llama / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if not whole:
        (llama / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"llama holds adapter_config\.json, an adapter .*merge_and_unload.*delete"
    ):
        load(llama)


# ---- quantised weights and other layers ----------------------------------------------------------


class Linear8bitLt(nn.Linear):
    """bitsandbytes' name; weights are kept in the grid of eight bits."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input)


class QuantLinear(nn.Module):
    """GPTQ's name; there are no parameters at all."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", base.weight.detach().to(torch.int32))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.qweight.T.to(input.dtype)


class LoudLinear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class QuietLinear(nn.Linear):
    """Computes what every Linear computes."""


def as_class(kind: type[nn.Module]):
    def make(base: nn.Module) -> nn.Module:
        if kind is QuantLinear:
            return QuantLinear(base)  # type: ignore[arg-type]
        base.__class__ = kind
        return base

    return make


@pytest.mark.parametrize("kind", [Linear8bitLt, QuantLinear])
def test_quantised_layers_are_refused(kind):
    with pytest.raises(
        ValueError, match=f"^memory: {Q} is a quantised {kind.__name__}, but .* dequantise"
    ):
        from_module(replaced(tiny.llama_module(), Q, as_class(kind)))


def test_layers_with_computations_of_their_own_are_refused_by_name():
    module = replaced(tiny.llama_module(), Q, as_class(LoudLinear))
    with pytest.raises(
        ValueError,
        match=rf"^memory: {Q} is a LoudLinear \(.*\), whose own computation the engine does",
    ):
        from_module(module)

    class Doubled(nn.Embedding):
        pass

    module = replaced(tiny.llama_module(), "model.embed_tokens", as_class(Doubled))
    with pytest.raises(ValueError, match=r"model\.embed_tokens is a Doubled"):
        from_module(module)


def test_an_activation_of_ones_own_is_taken():
    class OwnSilu(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.sigmoid()

    module = replaced(tiny.llama_module(), "model.layers.0.mlp.act_fn", lambda base: OwnSilu())
    same_logits(from_module(module), tiny.llama_module())


def test_a_linear_layer_by_another_name_is_taken():
    module = replaced(tiny.llama_module(), Q, as_class(QuietLinear))
    same_logits(from_module(module), module)


def test_torchs_own_quantised_layers_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to drop them
        module = torch.ao.quantization.quantize_dynamic(
            tiny.llama_module(), {nn.Linear}, dtype=torch.qint8
        )
    with pytest.raises(
        ValueError,
        match=r"model\.layers\.0\.self_attn\.q_proj is a quantised Linear, but .* dequantise",
    ):
        from_module(module)


@pytest.mark.parametrize(
    ("fields", "method"),
    [({"quant_method": "gptq", "bits": 4}, "'gptq'"), ({"load_in_8bit": True}, "'unknown'")],
)
def test_a_folder_of_quantised_weights_is_refused_before_they_are_read(llama, fields, method):
    rewrite(llama, "config.json", lambda config: config.update(quantization_config=fields))
    (llama / "model.safetensors").unlink()
    with pytest.raises(
        ValueError,
        match=rf"llama: the weights are quantised, .*\(quant_method={method}\), but .*deq",
    ):
        load(llama)


def test_a_module_that_says_it_is_quantised_is_refused():
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.base import HfQuantizer

    module = tiny.llama_module()
    module.is_quantized = True  # type: ignore[assignment]
    with pytest.raises(
        ValueError, match=r"memory: the module is quantised \(unknown method\), but .* dequantise"
    ):
        from_module(module)
    module.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[union-attr]
    module.quantization_method = module.config.quantization_config.quant_method  # type: ignore[union-attr]
    with pytest.raises(
        ValueError, match=r"memory: the module is quantised \(bitsandbytes\), but .* dequantise"
    ):
        from_module(module)
    HfQuantizer.remove_quantization_config(None, module)  # type: ignore[arg-type]
    same_logits(from_module(module), module)


# ---- architectures -------------------------------------------------------------------------------

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 29}
UNSUPPORTED = {
    "BloomForCausalLM": ("ALiBi", {}),
    "MptForCausalLM": ("ALiBi", {"expansion_ratio": 1, "max_seq_len": 16}),
    "FalconForCausalLM": ("one fused projection, in some versions ALiBi", {}),
    "MixtralForCausalLM": (
        "mixture of experts",
        {"intermediate_size": 8, "num_key_value_heads": 2},
    ),
    "Qwen3MoeForCausalLM": ("mixture of experts", {"intermediate_size": 8, "num_experts": 2}),
    "OlmoeForCausalLM": ("mixture of experts", {"intermediate_size": 8, "num_experts": 2}),
    "MambaForCausalLM": ("recurrent", {"state_size": 4}),
    "T5ForConditionalGeneration": ("an encoder beside the decoder", {"d_ff": 8, "d_kv": 8}),
    "BertForMaskedLM": ("an encoder: use a decoder", {"intermediate_size": 8}),
    "GPT2Model": ("no output over the vocabulary: load it with AutoModelForCausalLM", {}),
    "LlamaForSequenceClassification": ("no output over the vocabulary", {"intermediate_size": 8}),
    "Starcoder2ForCausalLM": (None, {"intermediate_size": 8, "num_key_value_heads": 2}),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_memory_and_folder_refuse_an_architecture_alike(tmp_path, name):
    import transformers

    why, fields = UNSUPPORTED[name]
    kind = getattr(transformers, name)
    module = kind(kind.config_class(**SMALL, **fields))
    message = f"architecture {name} is not supported; supported are {', '.join(FAMILIES)}"
    message += f". {name} has " if why else "$"
    with pytest.raises(ValueError, match=f"^memory: {message}.*{why or ''}"):
        from_module(module)
    module.config.architectures = [name]
    module.config.save_pretrained(tmp_path)  # weights are never looked for
    with pytest.raises(ValueError, match=f"{tmp_path}: {message}.*{why or ''}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Qwen2MoeForCausalLM", "experts"),
        ("GptOssForCausalLM", "experts"),
        ("DeepseekV3ForCausalLM", "experts"),
        ("PhimoeForCausalLM", "experts"),
        ("FalconMambaForCausalLM", "recurrent"),
        ("FalconH1ForCausalLM", "recurrent"),
        ("JambaForCausalLM", "recurrent"),
        ("RwkvForCausalLM", "recurrent"),
        ("BartForConditionalGeneration", "encode"),
        ("LlavaForConditionalGeneration", "images"),
        ("Qwen2VLForConditionalGeneration", "images"),
        ("Gemma3ForConditionalGeneration", "images"),
        ("WhisperForConditionalGeneration", "images"),
        ("ModernBertDecoderForCausalLM", None),
        ("PhiForCausalLM", None),
        ("XGLMForCausalLM", None),
    ],
)
def test_the_reason_fits_the_name(tmp_path, name, why):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [name]}))
    with pytest.raises(ValueError, match=f"architecture {name} is not supported") as caught:
        load(tmp_path)
    assert (f". {name} has" in str(caught.value)) == (why is not None)
    assert why is None or why in str(caught.value)


def test_text_alone_is_not_said_to_be_images():
    assert not any(re.search(pattern, "Gemma3ForCausalLM") for pattern in REASONS)


def test_every_reason_says_what_to_do():
    assert all(
        ": " in why and (": use" in why or ": hand" in why or ": load" in why)
        for why in REASONS.values()
    )


def test_a_model_with_code_of_its_own_is_refused_by_its_architecture(tmp_path):
    fields = {
        "architectures": ["OwnForCausalLM"],
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Config"},
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "own.py").write_text("raise SystemExit('this file was run')")
    with pytest.raises(ValueError, match="architecture OwnForCausalLM is not supported"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({**fields, "architectures": ["LlamaForCausalLM"]})
    )
    with pytest.raises(
        ValueError, match="config.json is no HuggingFace configuration: .*custom code"
    ):
        load(tmp_path)


def test_a_compiled_module_is_refused_and_the_module_inside_it_is_taken():
    module = torch.compile(tiny.gpt2_module(), backend="eager")
    with pytest.raises(
        ValueError, match=r"OptimizedModule has the model inside it: hand that over \(\._orig_mod"
    ):
        from_module(module)  # type: ignore[arg-type]
    same_logits(from_module(module._orig_mod), tiny.gpt2_module())  # type: ignore[union-attr]


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [None, 0, "16"])
def test_a_context_that_is_not_stated_is_refused(context):
    module = tiny.llama_module()
    module.config.__dict__["max_position_embeddings"] = context  # type: ignore[union-attr]
    with pytest.raises(
        ValueError, match=f"memory: max_position_embeddings={context}, but it must be the length"
    ):
        from_module(module)


def test_an_embedding_with_fewer_rows_than_the_vocabulary_is_refused():
    module = replaced(tiny.llama_module(), "model.embed_tokens", lambda base: nn.Embedding(20, 12))
    with pytest.raises(
        ValueError, match="vocab_size=29, but the embedding has 20 rows; set vocab_size=20, or call"
    ):
        from_module(module)


LAYERS = {"llama": "model.layers", "gpt2": "transformer.h", "neox": "gpt_neox.layers"}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kept", [slice(0, 1), slice(1, 2)])
def test_cut_layers_are_refused_and_the_remedies_help(name, kept):
    module, path = tiny.HUGGINGFACE[name](), LAYERS[name]
    whole: nn.ModuleList = module.get_submodule(path)  # type: ignore[assignment]
    module.set_submodule(path, whole[kept])  # type: ignore[arg-type]
    with pytest.raises(
        ValueError,
        match=r"^memory: the model has 1 layers \(.*\), but its configuration says "
        r"num_hidden_layers=2; .* set module\.config\.num_hidden_layers=1, else load",
    ):
        from_module(module)
    module.config.num_hidden_layers = 1  # type: ignore[union-attr]
    if kept == slice(1, 2):
        with pytest.raises(
            ValueError, match=r"\.0\..* says that it is in layer 1 .*set its layer_i"
        ):
            from_module(module)
        for part in module.modules():
            if getattr(part, "layer_idx", None) == 1:
                part.layer_idx = 0  # type: ignore[assignment]
    same_logits(from_module(module), module)


def test_gpt_neox_without_biases_is_refused_and_the_remedy_helps():
    module = tiny.HUGGINGFACE["neox"](attention_bias=False)
    with pytest.raises(
        ValueError,
        match="GPTNeoXForCausalLM with attention_bias=False cannot be wrapped .* of zeros",
    ):
        from_module(module)
    biased = tiny.HUGGINGFACE["neox"]()
    state = {
        name: torch.zeros_like(value)
        for name, value in biased.state_dict().items()
        if "attention" in name
    }
    biased.load_state_dict({**state, **module.state_dict()})
    same_logits(from_module(biased), module)


@pytest.mark.parametrize("name", tiny.HUGGINGFACE)
def test_every_small_model_of_the_tests_is_taken(name):
    refuse_module("memory", tiny.HUGGINGFACE[name]())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 10**30, "num_hidden_layers=10+, but it must be .* between 1 and"),
        ("hidden_size", "16", "hidden_size='16', but it must be a whole number"),
        ("vocab_size", [4, 4], r"vocab_size=\[4, 4\], but it must be"),
        ("num_attention_heads", -3, "num_attention_heads=-3, but it must be"),
        ("num_key_value_heads", True, "num_key_value_heads=True, but it must be"),
        ("attention_bias", [1], "Field 'attention_bias' expected bool, got list"),
        ("hidden_act", "abc", "KeyError: 'abc'"),
        ("dtype", [], "no HuggingFace configuration: IndexError"),
        ("pad_token_id", 10**30, "Padding_idx must be within num_embeddings"),
        ("architectures", "LlamaForCausalLM", "it must be a list of names"),
        ("quantization_config", "int4", "quant_method='int4'"),
    ],
)
def test_a_field_of_another_kind_is_named_in_one_line(llama, field, value, message):
    rewrite(llama, "config.json", lambda fields: fields.update({field: value}))
    with pytest.raises(ValueError, match=message) as refused:
        load(llama)
    assert "\n" not in str(refused.value) and str(llama) in str(refused.value)
