"""Which models are refused, and why; each message says what was found and what to do about it.

The engine takes the weights out of a model's projections and norms and computes with them itself.
Whatever a module does beside them (adapters, quantisation, offloading) it would leave out, so such
modules are refused by name, and never computed approximately.

`refuse_configuration` looks at config.json, before weights are read; `refuse_module` looks at a
HuggingFace module, `refuse_parameters` at the tensors of any.  Each raises a ValueError or returns
nothing.  `source` is what the message calls the model: its path, or `memory`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuits.model.altered import computes_as_its_class, refuse_altered, refuse_altered_code

# Why an architecture is not supported and what to do, by its name; the first that fits is said.
REASONS = {
    r"^OptimizedModule$|DataParallel$": (
        "the model inside it: hand that over (._orig_mod or .module)"
    ),
    r"Mamba|R(wkv|WKV)|Bamba|Zamba|Jamba|FalconH1|RecurrentGemma|NemotronH|Lfm2|Qwen3Next": (
        "recurrent (state-space) layers, which have no heads: use a model of attention and MLPs"
    ),
    r"^Falcon": (
        "all heads in one fused projection, in some versions ALiBi: use a model with separate "
        "projections"
    ),
    r"^Bloom|^Mpt|^MPT": (
        "ALiBi, positions as biases by distance: use a model with learned or rotary positions"
    ),
    r"[Mm]o[Ee]|MOE|Mixtral|GptOss|Deepseek|Dbrx|DBRX|Switch|Llama4|Grok|MiniMax": (
        "a mixture of experts, in which each token has its own MLPs: use a dense model"
    ),
    r"Llava|VL|Vision|Audio|Speech|Whisper|Omni|Idefics|PaliGemma|Mllama|Gemma3ForConditional|Gemma3n|Gemma4"
    r"|ImageText": "images or sound beside text: use a model of text alone",
    r"T5|Bart|Marian|Pegasus|M2M100|^LED|EncoderDecoder|ForConditionalGeneration": (
        "an encoder beside the decoder: use a decoder alone"
    ),
    r"ForMaskedLM$|ForPreTraining$|^BertLMHead": "an encoder: use a decoder (ForCausalLM)",
    r"Model$|For\w*Classification$|ForQuestionAnswering$": (
        "no output over the vocabulary: load it with AutoModelForCausalLM"
    ),
}

# Packages whose classes are what they seem.
_PLAIN = ("torch.nn.", "transformers.models.", "transformers.pytorch_utils")
_ADAPTER = re.compile(r"lora_|(^|\.)base_layer(\.|$)")  # names that peft gives
_QUANTISED = re.compile("(?i)[48]bit|quant|gptq|awq|hqq|fp[48]|bitlinear|eetq|aqlm|vptq|spqr|higgs")
_DEQUANTISE = (
    "the engine computes with float weights; dequantise the model (module.dequantize()) and save "
    "it in float"
)


# The most that a size in config.json can be.
_MOST = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 10_000),
    **dict.fromkeys(
        (
            *("hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "ffn_dim"),
            *("num_attention_heads", "num_heads", "n_head", "num_key_value_heads", "head_dim"),
        ),
        1_000_000,
    ),
    **dict.fromkeys(
        ("vocab_size", "max_position_embeddings", "n_positions", "n_ctx"), 1_000_000_000
    ),
}


def refuse_configuration(source: str, fields: Mapping[str, Any]) -> None:
    """Refuses, by config.json's fields, architectures not supported, quantised weights, and sizes
    that no model has."""
    architectures = fields.get("architectures") or []
    if not isinstance(architectures, list):
        raise ValueError(
            f"{source}: config.json has architectures={_brief(architectures)}, but it must be a "
            "list of names"
        )
    _refuse_architecture(source, map(str, architectures))
    _refuse_stated_sizes(source, fields)
    if quantised := fields.get("quantization_config"):
        if not isinstance(quantised, Mapping):
            quantised = {"quant_method": quantised}
        raise ValueError(
            f"{source}: the weights are quantised, says config.json "
            f"(quant_method={quantised.get('quant_method', 'unknown')!r}), but {_DEQUANTISE}"
        )


def _refuse_stated_sizes(source: str, fields: Mapping[str, Any]) -> None:
    """Refuses sizes that are no whole numbers, or that transformers would build for ever."""
    for name, value in fields.items():
        most = _MOST.get(name)
        if most is None or value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ValueError(
                f"{source}: config.json has {name}={_brief(value)}, but it must be a whole number "
                f"between 1 and {most}; download or save the model again"
            )


def _brief(value: Any) -> str:
    """A value as a message can hold it."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _refuse_architecture(source: str, names: Iterable[str]) -> None:
    """Refuses architectures of which none is supported."""
    from circuits.model.families import FAMILIES

    names = list(names)
    if any(name in FAMILIES for name in names):
        return
    reasons = (
        f". {name} has {why}"
        for name in names
        for pattern, why in REASONS.items()
        if re.search(pattern, name)
    )
    raise ValueError(
        f"{source}: architecture {', '.join(names) or 'not stated'} is not supported; supported "
        f"are {', '.join(FAMILIES)}{next(reasons, '')}"
    )


def refuse_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Refuses a dtype in which this device cannot do what a model does, found by doing it."""
    try:
        x = torch.ones(2, 4, 8, device=device).to(dtype)  # [heads, pos, width]
        F.layer_norm(F.linear(x, x[0]), (4,))
        F.scaled_dot_product_attention(x, x, x, is_causal=True)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{dtype} cannot be computed with on {device} ({first_line(error)}); use float32: "
            "dtype=float32, or module.float()"
        ) from error


def refuse_module(source: str, module: Any) -> None:
    """Refuses a HuggingFace module that the engine would not compute as it stands.

    That is for adapters, quantised or offloaded weights, an unsupported architecture, layers that
    compute something of their own, hooks and replaced functions, tied weights that differ, sizes
    not stated or other ones, and parameters.
    """
    name = type(module).__name__
    _refuse_adapters(source, module)
    _refuse_architecture(source, [name])
    _refuse_quantised(source, module)
    _refuse_offloaded(source, module)
    _refuse_own_computations(source, module)
    refuse_altered(source, module)
    refuse_altered_code(source, module)
    if name == "GPTNeoXForCausalLM" and not module.config.attention_bias:
        raise ValueError(
            f"{source}: GPTNeoXForCausalLM with attention_bias=False cannot be wrapped by "
            "TransformerLens; set attention_bias=True and give query_key_value and dense biases of "
            "zeros, which computes the same"
        )
    refuse_parameters(source, module)
    _refuse_untied(source, module)
    _refuse_sizes(source, module)


def refuse_parameters(source: str, module: nn.Module) -> None:
    """Refuses parameters without finite float values, on several devices or of several dtypes."""
    parameters = [  # without what a bridge puts into their names
        (name.replace("_original_component.", ""), tensor)
        for name, tensor in module.named_parameters()
    ]
    for name, tensor in (*parameters, *module.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"{source}: {name} is on the meta device, which holds no values; load the module "
                "with from_pretrained, or build it on a real device and load its weights into it"
            )
    one_device = "move the module to one device: module.to('cpu')"
    _refuse_different(source, parameters, "device", one_device)
    for name, tensor in parameters:
        _refuse_type(source, name, tensor)
    _refuse_different(source, parameters, "dtype", "cast the module to one dtype: module.float()")
    refuse_dtype(parameters[0][1].dtype, parameters[0][1].device)
    for name, tensor in parameters:
        _refuse_infinite(source, name, tensor)


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
            "dequantise the module, or convert it to float"
        )


def _refuse_infinite(source: str, name: str, tensor: Tensor) -> None:
    if not tensor.numel() or torch.stack(tensor.aminmax()).isfinite().all():
        return  # NaN is both; one pass without the copies that isfinite makes of large tensors
    if count := tensor.numel() - int(torch.isfinite(tensor).sum()):
        raise ValueError(
            f"{source}: {name} is not finite (NaN or infinite) in {count} of its {tensor.numel()} "
            f"values as {tensor.dtype}; take an earlier checkpoint, or dtype=float32 if only a "
            "smaller type cannot hold them"
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
            "the weights, and the engine would leave it out; merge first: module = "
            "peft_model.merge_and_unload()"
        )


def _refuse_quantised(source: str, module: Any) -> None:
    stated = getattr(module.config, "quantization_config", None)
    quantised = stated or getattr(module, "is_quantized", False)
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
                "not there between calls; load the whole model on one device (device_map='cpu'), "
                "or bring its weights back with "
                "accelerate.hooks.remove_hook_from_submodules(module)"
            )


def _refuse_own_computations(source: str, module: nn.Module) -> None:
    """Refuses layers that are not the plain ones of torch and transformers."""
    for name, part in module.named_modules():
        kind = type(part)
        if _is_plain(part):
            continue
        if _QUANTISED.search(kind.__name__) or kind.__module__.startswith("torch.ao."):
            raise ValueError(f"{source}: {name} is a quantised {kind.__name__}, but {_DEQUANTISE}")
        if not _is_called_or_known(name, part):
            raise ValueError(
                f"{source}: {name} is a {kind.__name__} ({kind.__module__}), whose own computation "
                "the engine does not know; replace it with the plain torch or transformers layer "
                "that computes the same"
            )


def _is_plain(part: nn.Module) -> bool:
    kind = type(part)
    if isinstance(part, nn.Linear):
        return kind.forward is nn.Linear.forward
    return kind.__module__.startswith(_PLAIN)


def _is_called_or_known(name: str, part: nn.Module) -> bool:
    """Whether the engine calls a layer of another class, or that computes what its bases do."""
    tensors = (*part._parameters.values(), *part._buffers.values())
    if any(tensor is not None for tensor in tensors):
        return False
    is_activation = name.rpartition(".")[2].startswith("act") and not part._modules
    return is_activation or computes_as_its_class(part)


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
        "(tie_word_embeddings=True), but their values differ; if they are meant to, set "
        "tie_word_embeddings=False in the configuration (config.json), else call "
        "module.tie_weights()"
    )


def _refuse_sizes(source: str, module: Any) -> None:
    config, rows = module.config, len(module.get_input_embeddings().weight)
    _refuse_layers(source, module)
    context = getattr(config, "max_position_embeddings", None)
    if not isinstance(context, int) or context < 1:
        raise ValueError(
            f"{source}: max_position_embeddings={context}, but it must be the length in tokens of "
            "the longest text, at least 1; set it in the configuration"
        )
    if config.vocab_size > rows:
        raise ValueError(
            f"{source}: vocab_size={config.vocab_size}, but the embedding has {rows} rows; set "
            f"vocab_size={rows}, or call module.resize_token_embeddings({config.vocab_size})"
        )


def _refuse_layers(source: str, module: Any) -> None:
    """Refuses other layers than the configuration's, as where some were cut off."""
    base, stated = module.base_model, module.config.num_hidden_layers
    name, layers = next(
        (name, part) for name, part in base.named_modules() if isinstance(part, nn.ModuleList)
    )
    if len(layers) != stated:
        raise ValueError(
            f"{source}: the model has {len(layers)} layers ({name}), but its configuration says "
            f"num_hidden_layers={stated}; if some were cut off on purpose, set "
            f"module.config.num_hidden_layers={len(layers)}, else load the whole model"
        )
    for place, layer in enumerate(layers):
        for inside, part in layer.named_modules():
            if getattr(part, "layer_idx", None) not in (None, place):
                raise ValueError(
                    f"{source}: {name}.{place}.{inside} says that it is in layer {part.layer_idx} "
                    "(layer_idx), as where layers before it were cut off; set its layer_idx to "
                    f"{place}, and so in all layers"
                )


def first_line(error: BaseException) -> str:
    """What an error says, on one line and not too long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:300]
