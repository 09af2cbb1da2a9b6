"""What the descriptions of families share: known configuration fields, the parts of a bridge."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from circuits.model.architecture import Activation, Linear, Norm, Rotary
from circuits.model.config_reads import fields_read

log = logging.getLogger(__name__)

# Fields of any HuggingFace configuration that change nothing of what a decoder computes.
INERT = frozenset(
    "transformers_version architectures output_hidden_states output_attentions return_dict dtype "
    "torch_dtype chunk_size_feed_forward is_encoder_decoder id2label label2id problem_type "
    "use_cache bos_token_id eos_token_id pad_token_id sep_token_id initializer_range _name_or_path "
    "model_type tie_word_embeddings task_specific_params _attn_implementation attn_implementation "
    "pretraining_tp vocab_size name_or_path predict_special_tokens _num_labels use_bfloat16 "
    "output_past gradient_checkpointing".split()
)

# What to do about a field that is refused, by a part of its name.
REMEDIES = {
    "quantization": "dequantise the model and save it in float",
    "alibi": "biases by distance are not supported; use a model with learned or rotary positions",
    "expert": "mixtures of experts are not supported; use a dense model",
    "moe": "mixtures of experts are not supported; use a dense model",
    "peft": "merge the adapter first: merge_and_unload()",
    "lora": "merge the adapter first: merge_and_unload()",
}


def refuse_unknown(family: str, config: Any, honoured: str) -> None:
    """Raises ValueError for a field that is set (not None or False), not honoured, not inert.

    Fields that the model's own code does not read are inert too, and are named in one note.  Not so
    those that `REMEDIES` knows: weights that were trained with experts or ALiBi are of another
    model, though this one's code does not ask.
    """
    known = INERT.union(honoured.split())
    fields = {
        field: value
        for field, value in config.to_dict().items()
        if not (field in known or value is None or value is False)
    }
    read = fields_read(config) if fields else set()
    for field, value in fields.items():
        remedy = next((what for name, what in REMEDIES.items() if name in field.lower()), None)
        if field in read or remedy is not None:
            remedy = remedy or "remove it if the weights do not need it, or use another model"
            raise ValueError(
                f"{family}: configuration field {field}={value!r} is not honoured by the engine, "
                f"which would then compute another function than the model; {remedy}"
            )
    if fields:
        log.warning(
            "%s: the model's code does not read these configuration fields, so they are ignored: "
            "%s",
            family,
            ", ".join(fields),
        )


def part(bridge_part: Any) -> Any:
    """The module behind a bridge component."""
    return bridge_part.original_component


def projection(bridge_part: Any) -> Linear:
    """A projection of a bridge, whichever way round it stores its weight."""
    module: Any = part(bridge_part)
    return Linear(module, stored_in_out=type(module).__name__ == "Conv1D")


def qkvo(attention: Any) -> Iterator[Linear]:
    """The projections of a bridge's attention, in the order of `Attention`'s fields."""
    return (projection(getattr(attention, side)) for side in "qkvo")


def activation(module: Any) -> Activation:
    """The activation of an MLP module, by its fastest equal."""
    # HuggingFace writes GPT-2's GELU in eight operations.
    if type(module).__name__ == "NewGELUActivation":
        return lambda x: F.gelu(x, approximate="tanh")
    return module


def layer_norm(bridge_part: Any) -> Norm:
    """A LayerNorm of a bridge."""
    return Norm("layer", part(bridge_part).eps, part(bridge_part))


def rotary(family: str, bridge: Any, config: Any, kind: str | None = None) -> Rotary:
    """Rotary positions in halves, by the model's own tables; ValueError if by length of text.

    `kind` is a type of layers, where each has tables of its own (Gemma 3).
    """
    parameters = config.rope_parameters or {}
    parameters = parameters if kind is None else parameters[kind]
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in ("default", "linear", "llama3", "yarn"):
        raise ValueError(
            f"{family}: rope_type={rope_type!r} depends on the length of the text and is not "
            "supported, only 'default', 'linear', 'llama3' and 'yarn'"
        )
    embedding: Callable[..., tuple[Tensor, Tensor]] = part(bridge.rotary_emb)

    own = () if kind is None else (kind,)

    def tables(positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = embedding(like, torch.arange(positions, device=like.device)[None], *own)
        return cos[0], sin[0]

    return Rotary(tables, pairs="halves")
