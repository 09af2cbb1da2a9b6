"""How a run folder says which model its circuit was found on, and finding that model again.

path, dtype, prepend_bos, split_input, head    how it was loaded
weight_hash                                    of its tensors
architecture                                   what a changed copy of it has in common with it
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from circuits.circuit import Circuit
from circuits.files import restored
from circuits.foreign import EAP_IG
from circuits.model.load import LoadedModel, ModelConfig
from mad.known_models import recorded, refuse_unknown


@dataclass(frozen=True)
class Reference:
    """A run folder's word on its model."""

    config: ModelConfig
    weight_hash: str
    architecture: Mapping[str, Any] | None  # None: written before it was recorded

    @classmethod
    def of(cls, circuit: Circuit, source: Path) -> Reference:
        """What a circuit says; ValueError where it says nothing, or what makes no sense."""
        if circuit.about.get("read_from") == EAP_IG:
            raise ValueError(
                f"{source} is an {EAP_IG}, which names no model and no trusted prompts; it can be "
                "drawn (`madcap plot`), but to score find a circuit with `madcap extract`"
            )
        told = circuit.about.get("model")
        told = dict(told) if isinstance(told, Mapping) else {}
        digest, facts = told.pop("weight_hash", None), told.pop("architecture", None)
        if not isinstance(digest, str):
            raise ValueError(
                f"the circuit in {source} does not say which model it was found on; extract it "
                "again"
            )
        if facts is not None and not isinstance(facts, Mapping):
            raise ValueError(f"{source}: model.architecture is {facts!r}; it must be a mapping")
        return cls(restored(ModelConfig, told, f"{source}: model"), digest, facts)

    def named(self, source: Path, model: str | None, head: str | None, device: str) -> ModelConfig:
        """What to load: what the user names, or else what the folder does.

        Raises:
            ValueError: the folder names a model that the user has never named.
        """
        told = self.config
        refuse_unknown(
            source, told.path if model is None else None, told.head if head is None else None
        )
        return replace(told, path=model or told.path, head=head or told.head, device=device)

    def check_architecture(self, model: LoadedModel, allow_other_weights: bool) -> None:
        """Raises ValueError for a model that is no copy of the one that the circuit is of.

        Other weights are no copy where vocabulary, width or family are others.
        """
        if self.architecture is None:
            if allow_other_weights and model.weight_hash != self.weight_hash:
                raise ValueError(
                    "allow_other_weights=true, but the circuit does not say the architecture of "
                    "its model, which the other one must share; extract it again"
                )
            return
        found = architecture(model)
        differ = [name for name in found if _differs(self.architecture.get(name), found[name])]
        if differ:
            theirs, ours = (
                ", ".join(f"{name} {_short(facts[name])}" for name in differ)
                for facts in (self.architecture, found)
            )
            raise ValueError(
                f"the circuit was found on a model of {theirs}, but this one has {ours}; give that "
                "model, or a fine-tuned or attacked copy of it"
            )


def model_reference(config: ModelConfig, model: LoadedModel) -> dict[str, Any]:
    """How to load the same model again, and to know it."""
    return {
        "path": recorded(config.path),
        "dtype": config.dtype,
        "prepend_bos": model.prepend_bos,
        "split_input": config.split_input,
        "head": None if config.head is None else recorded(config.head),
        "weight_hash": model.weight_hash,
        "architecture": architecture(model),
    }


def architecture(model: LoadedModel) -> dict[str, Any]:
    """What a model has in common with each fine-tuned or attacked copy of it; None: not known."""
    config = model.bridge.cfg
    return {
        "family": "native" if model.hf_config is None else model.hf_config.model_type,
        "d_model": config.d_model,
        "d_head": config.d_head,
        "d_mlp": config.d_mlp,
        "vocabulary": model.vocabulary,
        "outputs": model.outputs,
        "tokenizer": None if model.tokenizer is None else _tokenizer_hash(model.tokenizer),
    }


def _tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary, without the tokens that a fine-tune may add to it."""
    added = tokenizer.get_added_vocab()
    own = {token: number for token, number in tokenizer.get_vocab().items() if token not in added}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def _differs(theirs: Any, ours: Any) -> bool:
    return theirs is not None and ours is not None and theirs != ours


def _short(fact: Any) -> str:
    return f"{fact[:16]}..." if isinstance(fact, str) and len(fact) > 20 else str(fact)
