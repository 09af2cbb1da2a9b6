"""Which fields of its configuration a HuggingFace model's own code reads, found by watching it.

A field that nothing reads while the model is built and run changes nothing of what it computes.
Published configurations have many: of older versions, of other programs, of training.
"""

from __future__ import annotations

import copy
from typing import Any

import torch


def fields_read(config: Any) -> set[str]:
    """The names that a model asks its configuration for while it is built and run on two tokens.

    It is built of this very configuration, without weights (on the meta device), so that fields
    that are read only under the value of another one count as the model itself treats them.

    >>> from transformers import GPT2Config
    >>> config = GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, vocab_size=29)
    >>> sorted({"scale_attn_weights", "n_inner", "n_special"} & fields_read(config))
    ['n_inner', 'scale_attn_weights']
    """
    from transformers import AutoModelForCausalLM

    read: set[str] = set()
    kind = type(config)

    class Watched(kind):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    watched = copy.deepcopy(config)
    object.__setattr__(watched, "__class__", Watched)
    with torch.device("meta"), torch.no_grad():
        made: Any = AutoModelForCausalLM._model_mapping[kind]
        model = made(watched)
        tokens = torch.zeros(1, 2, dtype=torch.long)
        model.eval()(tokens, use_cache=True)
    return read | {config.attribute_map.get(name, name) for name in read}
