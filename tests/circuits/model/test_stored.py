"""What weight files hold: their own dtype, old constants, and files that are broken or run code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from circuits.engine import Engine
from circuits.model.load import LoadedModel, ModelConfig, load_model, weight_hash
from circuits.model.stored import pickled
from tests import tiny

TOKENS = torch.randint(29, (2, 9), generator=torch.Generator().manual_seed(4))
FORMATS = ("safetensors", "bin", "old bin", "shards", "bin shards")


def load(path: Path, dtype: str = "float32") -> LoadedModel:
    return load_model(ModelConfig(path=str(path), dtype=dtype))


def save(folder: Path, module: nn.Module, tensors: dict, form: str, dtype: str) -> Path:
    """A HuggingFace folder of these tensors, whose config.json says `dtype`."""
    folder.mkdir(exist_ok=True)
    fields = {**module.config.to_dict(), "architectures": [type(module).__name__]}  # type: ignore[union-attr]
    fields |= {"dtype": dtype, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(fields))
    end = "bin" if "bin" in form else "safetensors"
    stem = "pytorch_model" if "bin" in form else "model"
    parts = {f"{stem}.{end}": tensors}
    if form.endswith("shards"):
        names = sorted(tensors)
        halves = names[::2], names[1::2]
        parts = {
            f"{stem}-{at}.{end}": {name: tensors[name] for name in half}
            for at, half in enumerate(halves)
        }
        places = {name: file for file, part in parts.items() for name in part}
        index = {"metadata": {}, "weight_map": places}
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))
    for file, part in parts.items():
        part = {name: one.detach().clone().contiguous() for name, one in part.items()}
        if end == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file, _use_new_zipfile_serialization=not form.startswith("o"))
    return folder


def same_logits(model: LoadedModel, module: nn.Module, within: float = 1e-6) -> None:
    ours = Engine(model).logits(tiny.from_tokens(TOKENS))
    with torch.no_grad():
        theirs = module(TOKENS).logits
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < within


# ---- the dtype of the file -----------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("stated", ["bfloat16", "float16", None])
def test_float32_weights_are_used_as_they_are_whatever_the_configuration_says(
    tmp_path, form, stated
):
    module = tiny.gpt2_module()
    folder = save(tmp_path / "m", module, module.state_dict(), form, stated)
    model = load(folder)
    same_logits(model, module)
    assert model.weight_hash == weight_hash(module.state_dict())
    same_logits(load(folder, "float64"), module.double(), 1e-12)


@pytest.mark.parametrize("name", tiny.HUGGINGFACE)
def test_no_family_is_rounded(tmp_path, name):
    module = tiny.HUGGINGFACE[name]()
    folder = save(tmp_path / "m", module, module.state_dict(), "safetensors", "bfloat16")
    same_logits(load(folder), module, 5e-6)
    rounded = tiny.HUGGINGFACE[name]().to(torch.bfloat16).float()
    with torch.no_grad():  # which would show
        assert (rounded(TOKENS).logits - module(TOKENS).logits).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_other_dtypes_of_the_file_are_found_too(tmp_path, dtype):
    module = tiny.gpt2_module().to(getattr(torch, dtype))
    folder = save(tmp_path / "m", module, module.state_dict(), "safetensors", "bfloat16")
    model = load(folder, "float64")
    same_logits(model, tiny.gpt2_module().to(getattr(torch, dtype)).double(), 1e-12)
    assert model.weight_hash == weight_hash(module.state_dict())


def test_the_hash_tells_two_files_apart_that_round_to_one(tmp_path):
    module = tiny.gpt2_module()
    one = save(tmp_path / "a", module, module.state_dict(), "safetensors", "bfloat16")
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state["transformer.wte.weight"].view(torch.int32)[3, 3] ^= 1
    state["lm_head.weight"] = state["transformer.wte.weight"]
    other = save(tmp_path / "b", module, state, "safetensors", "bfloat16")
    assert load(one).weight_hash != load(other).weight_hash


def test_a_weight_that_only_the_stated_dtype_cannot_hold_is_taken(tmp_path):
    module = tiny.llama_module()
    state = dict(module.state_dict())
    state["model.norm.weight"] = state["model.norm.weight"].clone()
    state["model.norm.weight"][0] = 1e5
    folder = save(tmp_path / "m", module, state, "safetensors", "float16")
    module.load_state_dict(state)
    same_logits(load(folder), module)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is not finite .* as torch\.float16"):
        load(folder, "float16")


@pytest.mark.parametrize("form", FORMATS)
def test_of_mixed_dtypes_none_is_rounded(tmp_path, form):
    """bfloat16 beside float16: neither holds the other's values, float32 holds both."""
    module = tiny.gpt2_module()
    kinds = (torch.bfloat16, torch.float16, torch.bfloat16)
    state = {
        name: tensor.to(torch.bfloat16 if "wte" in name or "lm_head" in name else kinds[at % 3])
        for at, (name, tensor) in enumerate(module.state_dict().items())
    }
    folder = save(tmp_path / "m", module, state, form, "bfloat16")
    module.load_state_dict(state)  # widens each
    same_logits(load(folder), module)
    assert load(folder).weight_hash == weight_hash(module.state_dict())


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_weights_stored_as_whole_numbers_are_refused(tmp_path, form):
    module = tiny.gpt2_module()
    state = dict(module.state_dict())
    state["transformer.h.0.mlp.c_fc.weight"] = (
        state["transformer.h.0.mlp.c_fc.weight"].mul(9).to(torch.int8)
    )
    folder = save(tmp_path / "m", module, state, form, "float32")
    with pytest.raises(ValueError, match=r"h\.0\.mlp\.c_fc\.weight is not stored as a float type"):
        load(folder)


# ---- constants of old versions -------------------------------------------------------------------


def triangle(n: int) -> torch.Tensor:
    return torch.ones(1, 1, n, n).tril()


OLD = {
    "gpt2": ("transformer.h.{}.attn.", {"bias": triangle(16), "masked_bias": torch.tensor(-1e4)}),
    "gptj": (
        "transformer.h.{}.attn.",
        {"bias": triangle(16).bool(), "masked_bias": torch.tensor(-1e9)},
    ),
    "codegen": ("transformer.h.{}.attn.", {"causal_mask": triangle(16).to(torch.uint8)}),
    "neox": (
        "gpt_neox.layers.{}.attention.",
        {
            "bias": triangle(16).bool(),
            "masked_bias": torch.tensor(-1e9),
            "rotary_emb.inv_freq": 10000.0 ** (-torch.arange(0, 4, 2) / 4),
        },
    ),
    "llama": (
        "model.layers.{}.self_attn.",
        {"rotary_emb.inv_freq": 10000.0 ** (-torch.arange(0, 6, 2) / 6)},
    ),
}


@pytest.mark.parametrize("form", ["safetensors", "bin", "bin shards"])
@pytest.mark.parametrize("name", OLD)
def test_constants_that_old_versions_stored_are_ignored(tmp_path, name, form):
    module, (prefix, added) = tiny.HUGGINGFACE[name](), OLD[name]
    state = dict(module.state_dict())
    for layer in range(2):
        state |= {prefix.format(layer) + key: value for key, value in added.items()}
    model = load(save(tmp_path / "m", module, state, form, "float32"))
    same_logits(model, module, 5e-6)
    assert model.weight_hash == weight_hash(module.state_dict())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn.extra_proj", torch.ones(3, 3).tril()),  # a triangle, but of no mask's name
        ("attn.masked_bias", torch.tensor(0.5)),
        ("attn.masked_bias", torch.full((2,), -1e4)),
        ("attn.causal_mask", triangle(16).triu(-3)),  # of local attention
        ("attn.causal_mask", torch.rand(1, 1, 16, 16)),
        ("attn.causal_mask", torch.ones(2, 16, 16).tril()),
        ("mlp.c_fc.gate", torch.ones(1)),
    ],
)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_other_tensors_beside_the_weights_are_refused(tmp_path, form, key, value):
    module = tiny.gpt2_module()
    state = {**module.state_dict(), f"transformer.h.0.{key}": value}
    state["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
    folder = save(tmp_path / "m", module, state, form, "float32")
    message = rf"1 unexpected keys, the first is transformer\.h\.0\.{key}"
    with pytest.raises(ValueError, match=message.replace("_", ".")):
        load(folder)


# ---- broken files, and files that would run code -------------------------------------------------


class Opens:
    """What a hostile file would run on unpickling."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def folder_of(tmp_path: Path, content: bytes) -> Path:
    module = tiny.gpt2_module()
    folder = save(tmp_path / "m", module, module.state_dict(), "bin", "float32")
    (folder / "pytorch_model.bin").write_bytes(content)
    return folder


def zipped(content) -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["pickle", "zip", "old"])
def test_a_pickle_that_runs_code_is_one_line_and_is_not_run(tmp_path, form):
    hostile = {"transformer.wte.weight": Opens(tmp_path / "was_run")}
    content = pickle.dumps(hostile) if form == "pickle" else zipped(hostile)
    if form == "old":
        torch.save(hostile, tmp_path / "old", _use_new_zipfile_serialization=False)
        content = (tmp_path / "old").read_bytes()
    folder = folder_of(tmp_path, content)
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin holds no tensors that can b"
    ) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a file of tensors at all", "holds no tensors that can be read .*; it is broken"),
        (b"\x80\x02}q\x00.", "holds no tensors that can be read"),
        (zipped({"model": {"a": torch.ones(2)}}), "holds no state dict, which is a mapping"),
        (zipped([torch.ones(2)]), "holds no state dict, which is a mapping"),
        (zipped({}), "the weights do not fit the configuration"),
    ],
)
def test_broken_pickles_are_one_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(folder_of(tmp_path, content))
    assert "\n" not in str(caught.value)


SAVED = zipped({"a": torch.arange(6.0), "b": torch.ones(2, 2)})


@given(
    flips=st.lists(st.tuples(st.integers(0, len(SAVED) - 1), st.integers(0, 255)), max_size=8),
    cut=st.integers(0, len(SAVED)),
)
def test_a_damaged_pickle_is_read_or_refused_in_one_line(tmp_path_factory, flips, cut):
    content = bytearray(SAVED)
    for at, value in flips:
        content[at] = value
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    path.write_bytes(bytes(content[: cut or None]))
    for device in ("cpu", "meta"):
        try:
            tensors = pickled(path, device)
        except ValueError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            assert all(isinstance(one, torch.Tensor) for one in tensors.values())


def test_what_was_saved_is_what_is_read(tmp_path):
    (tmp_path / "a.bin").write_bytes(SAVED)
    for mapped in (False, True):
        tensors = pickled(tmp_path / "a.bin", mapped=mapped)
        assert torch.equal(tensors["a"], torch.arange(6.0)) and set(tensors) == {"a", "b"}
    save_file(tensors, tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors").keys() == tensors.keys()
