"""GGUF files: equal to the modules that they were written from; what is left out is refused."""

from __future__ import annotations

import logging
import shutil
import sys

import numpy as np
import pytest
import torch

from circuits.engine import Engine
from circuits.model.load import from_module, load_model
from tests import modules, tiny

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

SIZES = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "max_position_embeddings": 24}
WIDE = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 2.0**-7}
PLAIN = {"attention_bias": False, "mlp_bias": False}
MODULES = {
    "llama": lambda: modules.llama_module(**SIZES, **WIDE, **PLAIN),
    "llama, tied": lambda: modules.llama_module(**SIZES, **WIDE, **PLAIN, tie_word_embeddings=True),
    "llama, base": lambda: modules.llama_module(
        **SIZES, **WIDE, **PLAIN, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    ),
    "qwen2": lambda: modules.qwen2_module(
        **{name: SIZES[name] for name in SIZES if name != "head_dim"},
        **WIDE,
        use_sliding_window=False,
    ),
    "qwen3": lambda: modules.qwen3_module(
        **SIZES, **WIDE, attention_bias=False, use_sliding_window=False
    ),
}
TOKENS = torch.randint(29, (2, 9), generator=torch.Generator().manual_seed(3))


# ---- files, written by llama.cpp's own package ---------------------------------------------------


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's llama wants them: each head's halves interleaved."""
    half = weight.shape[0] // heads // 2
    rows = [
        head * 2 * half + which * half + pair
        for head in range(heads)
        for pair in range(half)
        for which in range(2)
    ]
    return weight[rows]


def tensors_of(module, architecture: str) -> dict[str, np.ndarray]:
    """The weights under the names that they have in a file."""
    config = module.config
    names = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(names[architecture], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = {}
    for name, tensor in module.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        side = name.split(".")[-2]
        if architecture == "llama" and side in heads:
            values = permuted(values, heads[side])
        tensors[table.get_name(name, (".weight", ".bias"))] = values
    return tensors


def fields_of(module, architecture: str) -> dict[str, object]:
    """The metadata of its architecture, as a file states it."""
    config = module.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.dimension_count": width,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    return {f"{architecture}.{name}": value for name, value in fields.items()}


def write(path, module, *, fields=None, tensors=None, quantised=(), without=(), architecture=None):
    """Writes a file; `fields` and `tensors` are added to the module's own, or replace them."""
    architecture = architecture or module.config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in {**fields_of(module, architecture), **(fields or {})}.items():
        if name in without:
            continue
        kind = {bool: writer.add_bool, str: writer.add_string, float: writer.add_float32}
        kind |= {int: writer.add_uint32, list: writer.add_array}
        kind[type(value)](name, value)
    for name, values in {**tensors_of(module, architecture), **(tensors or {})}.items():
        if values.ndim == 2 and quantised:
            data = gguf.quantize(values, quantised)
            writer.add_tensor(name, data, raw_dtype=quantised)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def module():
    return MODULES["llama"]()


# ---- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_a_file_is_the_module_that_it_was_written_from(name, tmp_path, caplog):
    module = MODULES[name]()
    loaded = load_model(str(write(tmp_path / "model.gguf", module)))
    assert loaded.weight_hash == from_module(module).weight_hash
    assert loaded.tokenizer is None and not caplog.records
    with torch.no_grad():
        expected = module(TOKENS).logits
    torch.testing.assert_close(Engine(loaded).logits(tiny.from_tokens(TOKENS)), expected)


def by_hand(values: np.ndarray) -> np.ndarray:
    """What Q8_0 stands for: 34 bytes are a scale in half precision and 32 multiples of it."""
    stored = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0).reshape(-1, 34)
    decoded = [
        np.frombuffer(block[:2].tobytes(), np.float16).astype(np.float32)
        * np.frombuffer(block[2:].tobytes(), np.int8).astype(np.float32)
        for block in stored
    ]
    return np.stack(decoded).reshape(values.shape)


def test_quantised_weights_are_what_they_stand_for(module, tmp_path, caplog):
    path = write(tmp_path / "small.gguf", module, quantised=gguf.GGMLQuantizationType.Q8_0)
    loaded = load_model(str(path))
    assert [record.message for record in caplog.records] == [
        "small.gguf: the weights are stored as Q8_0; they are computed with as float32, each the "
        "value that it stands for"
    ]
    assert loaded.weight_hash != from_module(module).weight_hash
    state = {
        name: torch.from_numpy(by_hand(tensor.numpy())) if tensor.ndim == 2 else tensor
        for name, tensor in module.state_dict().items()
    }
    rounded = MODULES["llama"]()
    rounded.load_state_dict(state)
    assert loaded.weight_hash == from_module(rounded).weight_hash
    with torch.no_grad():
        expected = rounded(TOKENS).logits
    torch.testing.assert_close(Engine(loaded).logits(tiny.from_tokens(TOKENS)), expected)


def test_a_folder_that_holds_one_and_nothing_beside_it_is_read(module, tmp_path):
    path = write(tmp_path / "model.gguf", module)
    for other in ("adapter_config.json", "config.json", "tokenizer_config.json"):
        (tmp_path / other).write_text("{no JSON")
    assert load_model(str(tmp_path)).weight_hash == load_model(str(path)).weight_hash
    shutil.copy(path, tmp_path / "other.gguf")
    with pytest.raises(ValueError, match=r"holds 2 GGUF files; name one .* model=.*/model\.gguf"):
        load_model(str(tmp_path))
    module.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    path.write_bytes(b"not read, as there are safetensors")
    assert load_model(str(tmp_path)).weight_hash == from_module(module).weight_hash


def test_the_tokenizer_in_a_file_is_read(module, tmp_path):
    symbols = [chr(code) for code in range(ord("a"), ord("a") + 24)]
    tokens = ["<s>", "</s>", *symbols, "Ġ", "ab", "Ġab"]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["a b", "Ġ ab"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    loaded = load_model(str(write(tmp_path / "model.gguf", module, fields=fields)))
    assert loaded.tokenizer is not None and not loaded.prepend_bos
    prompts = loaded.prompts([{"clean": "cab ab"}])
    assert [tokens[token] for token in prompts.clean[0].tolist()] == ["c", "ab", "Ġab"]


# ---- what is refused -----------------------------------------------------------------------------

REFUSED = {
    "factors of rotary frequencies": (
        {"tensors": {"rope_freqs.weight": np.ones(8, np.float32)}},
        r"1 tensors are left out .* the first is rope_freqs.weight \(it rescales rotary freq",
    ),
    "a bias that llama has no place for": (
        {"tensors": {"blk.1.attn_q.bias": np.ones(64, np.float32)}},
        r"the first is blk\.1\.attn_q\.bias, which would make another model",
    ),
    "scaled positions": (
        {"fields": {"llama.rope.scaling.type": "linear"}},
        r"llama\.rope\.scaling\.type='linear' is left out when GGUF files are read",
    ),
    "a window": (
        {"fields": {"llama.attention.sliding_window": 4}},
        r"llama\.attention\.sliding_window=4 is left out",
    ),
    "experts": ({"fields": {"llama.expert_count": 8}}, r"llama\.expert_count=8 is left out"),
    "part of the head is rotated": (
        {"fields": {"llama.rope.dimension_count": 8}},
        r"rope\.dimension_count=8 became head_dim=16; give its HuggingFace folder",
    ),
    "a file in parts": (
        {"fields": {"split.count": 3}},
        r"one of 3 parts of a model; join them with llama-gguf-split --merge",
    ),
    "no epsilon": (
        {"without": ["llama.attention.layer_norm_rms_epsilon"]},
        r"does not state llama\.attention\.layer_norm_rms_epsilon; convert the model again",
    ),
    "an architecture that is not proved": (
        {"architecture": "stablelm"},
        r"general\.architecture='stablelm', but of GGUF files only llama, qwen2, qwen3 are read",
    ),
    "the name by which transformers takes llama for mistral": (
        {"fields": {"general.name": "mistral"}},
        r"model\.gguf .*mistral",
    ),
    "heads layer by layer": (
        {"fields": {"llama.attention.head_count": [4, 2]}},
        r"head_count=\[4, 2\], but it must be between 1 and 64, which is what the tensors hold",
    ),
    "weights of another size": (
        {"fields": {"llama.feed_forward_length": 48}},
        r"the weights do not fit the configuration: \d+ mismatched keys",
    ),
    "layers that no file could hold": (
        {"fields": {"llama.block_count": 2**31}},
        r"block_count=2147483648, but it must be between 1 and 64",
    ),
    "layers missing": (
        {"fields": {"llama.block_count": 3}},
        r"the weights do not fit the configuration: \d+ missing keys",
    ),
    "layers too many": ({"fields": {"llama.block_count": 1}}, r"9 tensors are left out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_make_another_model_is_refused(case, module, tmp_path):
    written, message = REFUSED[case]
    path = write(tmp_path / "model.gguf", module, **written)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "inert", ({"llama.rope.scaling.type": "none"}, {"llama.expert_count": 0}, {"general.name": "x"})
)
def test_what_changes_nothing_is_read(inert, module, tmp_path):
    path = write(tmp_path / "model.gguf", module, fields=inert)
    assert load_model(str(path)).weight_hash == from_module(module).weight_hash


def test_a_broken_file_is_named_in_one_line(module, tmp_path):
    whole = write(tmp_path / "whole.gguf", module).read_bytes()
    path = tmp_path / "broken.gguf"
    for content in (b"", b"GGUF", b"{}" * 99, *(whole[: len(whole) * k // 9] for k in range(1, 9))):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no GGUF file that can be read") as caught:
            load_model(str(path))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_changed_bytes_are_read_or_refused(module, tmp_path):
    """Never a traceback of another kind, whatever the header says."""
    whole = write(tmp_path / "whole.gguf", module).read_bytes()
    header = whole.index(b"token_embd.weight")
    path = tmp_path / "changed.gguf"
    random = np.random.default_rng(0)
    refused = 0
    for place, byte in zip(random.integers(4, header, 24), random.integers(0, 256, 24)):
        path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        try:
            load_model(str(path))
        except ValueError as error:
            refused += 1
            assert "changed.gguf" in str(error) and "\n" not in str(error)
    assert refused > 12


def test_a_missing_file_and_a_missing_package(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for missing in ("none.gguf", str(tmp_path / "none.gguf")):
        with pytest.raises(FileNotFoundError, match=r"no .* at .*none\.gguf"):
            load_model(missing)
    path = write(tmp_path / "model.gguf", module)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'madcap\[gguf\]'"):
        load_model(str(path))


def test_the_package_is_left_as_it_was(module, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    load_model(str(write(tmp_path / "model.gguf", module)))
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
