"""Which models are refused, and why; each message says what was found and what to do about it.

The engine takes the weights out of a model's projections and norms and computes with them itself.
Whatever a module does beside them (adapters, quantisation, offloading) it would leave out, so such
modules are refused by name, and never computed approximately.

`refuse_folder` and `refuse_weight_files` look at files, `refuse_configuration` at config.json, all
before weights are read; `refuse_module` looks at a HuggingFace module, `refuse_parameters` at the
tensors of any.  Each raises or returns nothing.  `source` is what the message calls the model: its
path, or `memory`.
"""

from __future__ import annotations

import itertools
import json
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Why an architecture is not supported and what to do, by its name; the first row that fits is said.
REASONS = (
    (
        r"^OptimizedModule$|DataParallel$",
        "the model inside it: hand that over (._orig_mod or .module)",
    ),
    (
        r"Mamba|R(wkv|WKV)|Bamba|Zamba|Jamba|FalconH1|RecurrentGemma|NemotronH|Lfm2|Qwen3Next",
        "recurrent (state-space) layers, which have no heads: use a model of attention and MLPs",
    ),
    (
        r"^Falcon",
        "all heads in one fused projection, in some versions ALiBi: use a model with separate "
        "projections",
    ),
    (
        r"^Bloom|^Mpt|^MPT",
        "ALiBi, positions as biases by distance: use a model with learned or rotary positions",
    ),
    (
        r"[Mm]o[Ee]|MOE|Mixtral|GptOss|Deepseek|Dbrx|DBRX|Switch|Llama4|Grok|MiniMax",
        "a mixture of experts, in which each token has its own MLPs: use a dense model",
    ),
    (
        r"Llava|VL|Vision|Audio|Speech|Whisper|Omni|Idefics|PaliGemma|Mllama|Gemma3For|Gemma3n|Gemma4|ImageText",
        "images or sound beside text: use a model of text alone",
    ),
    (
        r"T5|Bart|Marian|Pegasus|M2M100|^LED|EncoderDecoder|ForConditionalGeneration",
        "an encoder beside the decoder: use a decoder alone",
    ),
    (r"ForMaskedLM$|ForPreTraining$|^BertLMHead", "an encoder: use a decoder (ForCausalLM)"),
    (
        r"Model$|For\w*Classification$|ForQuestionAnswering$",
        "no output over the vocabulary: load it with AutoModelForCausalLM",
    ),
)

# The weights of a HuggingFace folder, in the order in which transformers looks for them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

_PLAIN = (
    "torch.nn.",
    "transformers.models.",
    "transformers.pytorch_utils",
)  # whose classes are what they seem
_ADAPTER = re.compile(r"lora_|(^|\.)base_layer(\.|$)")  # names that peft gives
_QUANTISED = re.compile(
    r"[48]bit|quant|gptq|awq|hqq|fp[48]|bitlinear|eetq|aqlm|vptq|spqr|higgs", re.IGNORECASE
)
_DEQUANTISE = "the engine computes with float weights; dequantise the model (module.dequantize()) and save it in float"


# ---- files and configuration ---------------------------------------------------------------------


def refuse_folder(folder: Path) -> None:
    """Refuses folders of adapters, and folders of no HuggingFace model.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: there is an adapter.
    """
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds adapter_config.json, an adapter that is not merged into its model; "
            "merge it first "
            "(PeftModel.merge_and_unload()) and save the whole, or delete the file if the weights "
            "are merged already"
        )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no config.json, so it is no HuggingFace model folder"
        )


def refuse_weight_files(folder: Path) -> None:
    """Refuses weights that are not all there; of safetensors files only the headers are read.

    Raises:
        FileNotFoundError: there are no weights, or a shard is missing.
        ValueError: a file is broken, or lacks tensors that the index places in it.
    """
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{folder} holds no weights ({' or '.join(WEIGHT_FILES)}); download or save them there"
        )
    shards = _shards(path) if path.suffix == ".json" else {path.name: set()}
    for name, wanted in sorted(shards.items()):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} lacks {name}, one of the {len(shards)} shards that {path.name} names; "
                "download it again"
            )
        if lacking := sorted(wanted - _tensor_names(folder / name, wanted)):
            raise ValueError(
                f"{folder / name} lacks {len(lacking)} of the {len(wanted)} tensors that "
                f"{path.name} places there, the "
                f"first is {lacking[0]}; download or save the model again"
            )


def _shards(index: Path) -> dict[str, set[str]]:
    """The files that an index names, each with its tensors."""
    try:
        places = json.loads(index.read_text())["weight_map"].items()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{index} is no index of shards ({first_line(error)}); download it again"
        ) from error
    shards: dict[str, set[str]] = {}
    for tensor, name in places:
        shards.setdefault(name, set()).add(tensor)
    return shards


def _tensor_names(path: Path, wanted: set[str]) -> set[str]:
    """The tensors that a file holds; of a pickle, which must be read to know them, all that are
    wanted.
    """
    from safetensors import SafetensorError, safe_open

    broken = f"{path} is no file of tensors, perhaps it was cut short; download or save it again"
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return set(file.keys())
        except SafetensorError as error:
            raise ValueError(f"{broken} ({first_line(error)})") from error
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped and not zipfile.is_zipfile(path) or not path.stat().st_size:
        raise ValueError(broken)
    return wanted


def refuse_configuration(source: str, fields: Mapping[str, Any]) -> None:
    """Refuses architectures that are not supported, and quantised weights; `fields` are
    config.json's.

    Raises:
        ValueError: it is one of these.
    """
    refuse_architecture(source, fields.get("architectures") or [])
    if quantised := fields.get("quantization_config"):
        raise ValueError(
            f"{source}: the weights are quantised, says config.json (quant_method="
            f"{quantised.get('quant_method', 'unknown')!r}), but {_DEQUANTISE}"
        )


def refuse_keys(source: str, module: Any, report: Mapping[str, Any]) -> None:
    """Refuses weights that name other tensors than their configuration, by transformers' report on
    loading.

    Raises:
        ValueError: keys are missing, unexpected or of another shape.
    """
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        found = sorted(map(str, report.get(problem) or ()))
        if not found:
            continue
        remedy = "is config.json of this model? Otherwise download or save the model again"
        if problem == "missing_keys" and found[0] in (type(module)._tied_weights_keys or ()):
            remedy = "if it is the input embedding's, set tie_word_embeddings=True in config.json"
        raise ValueError(
            f"{source}: the weights do not fit the configuration: {len(found)} "
            f"{problem.replace('_', ' ')}, "
            f"the first is {found[0]}; {remedy}"
        )


def refuse_architecture(source: str, names: Iterable[str]) -> None:
    """Refuses architectures of which none is supported.

    Raises:
        ValueError: none of the names is supported.
    """
    from circuits.model.families import FAMILIES

    names = list(names)
    if any(name in FAMILIES for name in names):
        return
    reasons = (
        f". {name} has {why}"
        for name in names
        for pattern, why in REASONS
        if re.search(pattern, name)
    )
    raise ValueError(
        f"{source}: architecture {', '.join(names) or 'not stated'} is not supported; "
        f"supported are {', '.join(FAMILIES)}{next(reasons, '')}"
    )


def refuse_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Refuses a dtype in which this device cannot do what a model does, found by doing it.

    Raises:
        ValueError: it cannot.
    """
    try:
        x = torch.ones(2, 4, 8, device=device).to(dtype)  # [heads, pos, width]
        F.layer_norm(F.linear(x, x[0]), (4,))
        F.scaled_dot_product_attention(x, x, x, is_causal=True)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{dtype} cannot be computed with on {device} ({first_line(error)}); use float32: "
            "dtype=float32, "
            "or module.float()"
        ) from error


# ---- modules -------------------------------------------------------------------------------------


def refuse_module(source: str, module: Any) -> None:
    """Refuses a HuggingFace module that the engine would not compute as it stands.

    Raises: ValueError: adapters, quantised or offloaded weights, an unsupported architecture,
        layers that compute
            something of their own, tied weights that differ, sizes that are not stated, or
            `refuse_parameters`.
    """
    name = type(module).__name__
    _refuse_adapters(source, module)
    refuse_architecture(source, [name])
    _refuse_quantised(source, module)
    _refuse_offloaded(source, module)
    _refuse_own_computations(source, module)
    if name == "GPTNeoXForCausalLM" and not module.config.attention_bias:
        raise ValueError(
            f"{source}: GPTNeoXForCausalLM with attention_bias=False cannot be wrapped by "
            "TransformerLens; set "
            "attention_bias=True and give query_key_value and dense biases of zeros, which "
            "computes the same"
        )
    refuse_parameters(source, module)
    _refuse_untied(source, module)
    _refuse_sizes(source, module)


def refuse_parameters(source: str, module: nn.Module) -> None:
    """Refuses parameters without values, of several devices or dtypes, of no float dtype, or not
    finite.

    Raises:
        ValueError: there is one of these; the first is named.
    """
    plain = lambda name: name.replace("_original_component.", "")  # noqa: E731 (of a bridge)
    parameters = [(plain(name), tensor) for name, tensor in module.named_parameters()]
    for name, tensor in (*parameters, *module.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"{source}: {name} is on the meta device, which holds no values; load the module "
                "with from_pretrained, "
                "or build it on a real device and load its weights into it"
            )
    _refuse_different(
        source, parameters, "device", "move the module to one device: module.to('cpu')"
    )
    for name, tensor in parameters:
        _refuse_type(source, name, tensor)
    _refuse_different(source, parameters, "dtype", "cast the module to one dtype: module.float()")
    refuse_dtype(parameters[0][1].dtype, parameters[0][1].device)
    for name, tensor in parameters:
        if not torch.isfinite(tensor).all():
            count = tensor.numel() - int(torch.isfinite(tensor).sum())
            raise ValueError(
                f"{source}: {name} is not finite (NaN or infinite) in {count} of its "
                f"{tensor.numel()} values as "
                f"{tensor.dtype}; take an earlier checkpoint, or dtype=float32 if only a smaller "
                "type cannot hold them"
            )


def _refuse_type(source: str, name: str, tensor: Tensor) -> None:
    """Refuses what is no plain tensor (sharded, quantised, fake), and what is not float."""
    kind = type(tensor.data)
    if kind is not Tensor:
        raise ValueError(
            f"{source}: {name} is a {kind.__name__}, no plain tensor; gather or dequantise the "
            "module first"
        )
    if not tensor.is_floating_point():
        raise ValueError(
            f"{source}: {name} holds {tensor.dtype}, but the engine computes with float weights; "
            "dequantise the "
            "module, or convert it to float"
        )


def _refuse_different(
    source: str, parameters: Sequence[tuple[str, Tensor]], field: str, remedy: str
) -> None:
    first, tensor = parameters[0]
    for name, other in parameters:
        if getattr(other, field) != getattr(tensor, field):
            raise ValueError(
                f"{source}: {first} has {field} {getattr(tensor, field)} and {name} "
                f"{getattr(other, field)}; {remedy}"
            )


def _refuse_adapters(source: str, module: nn.Module) -> None:
    from circuits.model.families import FAMILIES

    names = (name for name, _ in itertools.chain(module.named_modules(), module.named_parameters()))
    found = next((name for name in names if _ADAPTER.search(name)), None)
    # A merged model may keep peft_config, so alone it tells only of wrappers, such as PeftModel.
    if found is None and hasattr(module, "peft_config") and type(module).__name__ not in FAMILIES:
        found = f"{type(module).__name__}.peft_config"
    if found is not None:
        raise ValueError(
            f"{source}: {found} belongs to an adapter (LoRA or another) that is not merged into "
            "the weights, and the "
            "engine would leave it out; merge first: module = peft_model.merge_and_unload()"
        )


def _refuse_quantised(source: str, module: Any) -> None:
    quantised = getattr(module.config, "quantization_config", None) or getattr(
        module, "is_quantized", False
    )
    method = getattr(module, "quantization_method", None) or (quantised and "unknown method")
    if method:
        raise ValueError(
            f"{source}: the module is quantised ({getattr(method, 'value', method)}), but "
            f"{_DEQUANTISE}"
        )


def _refuse_offloaded(source: str, module: nn.Module) -> None:
    for name, part in module.named_modules():
        hook = getattr(part, "_hf_hook", None)  # accelerate's
        if any(getattr(one, "offload", False) for one in (hook, *getattr(hook, "hooks", ()))):
            raise ValueError(
                f"{source}: {name or 'the module'} is offloaded by accelerate, so its weights are "
                "not there between "
                "calls; load the whole model on one device (device_map='cpu'), or bring its "
                "weights back with "
                "accelerate.hooks.remove_hook_from_submodules(module)"
            )


def _refuse_own_computations(source: str, module: nn.Module) -> None:
    """Refuses layers with weights that are not the plain ones of torch and transformers."""
    for name, part in module.named_modules():
        kind = type(part)
        if isinstance(part, nn.Linear):
            plain = kind.forward is nn.Linear.forward
        else:
            plain = kind.__module__.startswith(_PLAIN)
        if plain:
            continue
        if _QUANTISED.search(kind.__name__) or kind.__module__.startswith("torch.ao."):
            raise ValueError(f"{source}: {name} is a quantised {kind.__name__}, but {_DEQUANTISE}")
        if any(
            tensor is not None for tensor in (*part._parameters.values(), *part._buffers.values())
        ):
            raise ValueError(
                f"{source}: {name} is a {kind.__name__} ({kind.__module__}), whose own computation "
                "the engine does not "
                "know; replace it with the plain torch or transformers layer that computes the same"
            )


def _refuse_untied(source: str, module: Any) -> None:
    """Refuses embeddings that differ where the configuration says that they are one."""
    ends = module.get_input_embeddings(), module.get_output_embeddings()
    if not module.config.tie_word_embeddings or None in ends:
        return
    first, last = (end.weight for end in ends)
    if first is last or torch.equal(first, last):
        return
    names = {id(tensor): name for name, tensor in module.named_parameters(remove_duplicate=False)}
    raise ValueError(
        f"{source}: the configuration ties {names[id(last)]} to {names[id(first)]} "
        "(tie_word_embeddings=True), but "
        "their values differ; if they are meant to, set tie_word_embeddings=False in the "
        "configuration (config.json), "
        "else call module.tie_weights()"
    )


def _refuse_sizes(source: str, module: Any) -> None:
    config, rows = module.config, len(module.get_input_embeddings().weight)
    context = getattr(config, "max_position_embeddings", None)
    if not isinstance(context, int) or context < 1:
        raise ValueError(
            f"{source}: max_position_embeddings={context}, but it must be the length in tokens of "
            "the longest text, "
            "at least 1; set it in the configuration"
        )
    if config.vocab_size > rows:
        raise ValueError(
            f"{source}: vocab_size={config.vocab_size}, but the embedding has {rows} rows; set "
            f"vocab_size={rows}, or "
            f"call module.resize_token_embeddings({config.vocab_size})"
        )


def first_line(error: Exception) -> str:
    """What an error says, on one line and not too long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:300]
