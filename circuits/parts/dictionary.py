"""Dictionaries: sparse autoencoders and transcoders, as SAELens writes them.

A folder holds `cfg.json` and `sae_weights.safetensors`.  With x what the encoder reads,

    value = sum_f z_f d_f + b + error,     z = activation((x - c) W + a),

d_f the rows of the decoder, b its bias, and c = b where `apply_b_dec_to_input` is set, else 0.  A
sparse autoencoder reads the value itself; a transcoder reads what goes into an MLP, and its value
is what the MLP writes.

    standard    relu                              W_enc [D, F], b_enc [F], W_dec [F, D], b_dec [D]
    jumprelu    relu, 0 up to a threshold         threshold [F] as well
    topk        relu of the k largest             `k` in cfg.json
    gated       relu(p exp(r_mag) + b_mag) where  b_gate, b_mag, r_mag [F] in place of b_enc
                p + b_gate > 0, p = (x - c) W

and `transcoder`, `jumprelu_transcoder` alike.  All else is refused by name: where the activations
were scaled for the autoencoder, its value is not this sum.

Formulas: Bricken et al. 2023; Rajamanoharan et al. 2024, arXiv 2404.16014 and 2407.14435; Gao et
al. 2024, arXiv 2406.04093; Dunefsky et al. 2024, arXiv 2406.11944.

Shapes: d_model D, features F.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.files import own_file, read_json, read_tensors
from circuits.prompts.errors import quote

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

ARCHITECTURES = ("standard", "jumprelu", "topk", "gated", "transcoder", "jumprelu_transcoder")
# What an autoencoder reads and rebuilds: the site, and how many blocks later it stands.
VALUES = {
    "hook_resid_pre": ("r", 0),
    "hook_in": ("r", 0),
    "hook_resid_post": ("r", 1),
    "hook_out": ("r", 1),
    "hook_mlp_out": ("m", 0),
}
Reads = Literal["value", "before norm", "behind norm", "norm without gain"]
# What a transcoder reads.  SAELens trains on TransformerLens models with the gain of a norm folded
# into what follows, so that `hook_normalized` is without it.
INPUTS: Mapping[str, Reads] = {
    "hook_mlp_in": "before norm",
    "hook_resid_mid": "before norm",
    "ln2.hook_normalized": "norm without gain",
    "mlp.hook_in": "behind norm",
}
_HOOK = re.compile(r"blocks\.(0|[1-9][0-9]{0,5})\.([a-z0-9_.]+)")


@dataclass(frozen=True)
class Hook:
    """Where a dictionary reads and writes."""

    site: Literal["m", "r"]  # what an MLP writes, or the residual stream before a block
    layer: int
    reads: Reads
    # how TransformerLens had loaded the model, where it has LayerNorms:
    centred: bool = False  # the mean over the D numbers was taken off what is written
    unfolded: bool = False  # gains stood in the norms


@dataclass(frozen=True, eq=False)
class Dictionary:
    """An encoder and a decoder at a site.

    >>> identity = torch.eye(3)
    >>> weights = {"W_enc": identity, "W_dec": identity, "b_enc": torch.zeros(3)}
    >>> dictionary = Dictionary("eye", Hook("r", 1, "value"), {**weights, "b_dec": torch.zeros(3)})
    >>> dictionary.encode(torch.tensor([2.0, -1.0, 0.5]))
    tensor([2.0000, 0.0000, 0.5000])
    """

    origin: str  # for messages: its folder
    hook: Hook
    weights: Mapping[str, Tensor]  # by SAELens's names
    k: int | None = None  # how many features may be active at once
    centre_input: bool = False  # b_dec is taken off what it reads
    by_norm: bool = False  # the k largest are chosen with each d_f at length 1

    @property
    def features(self) -> int:
        return self.weights["W_dec"].shape[0]

    @property
    def decoder(self) -> Float[Tensor, "F D"]:
        return self.weights["W_dec"]

    @property
    def bias(self) -> Float[Tensor, "D"]:
        return self.weights["b_dec"]

    def encode(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch F"]:
        """The features' values z."""
        own = self.weights
        read = (x - own["b_dec"] if self.centre_input else x) @ own["W_enc"]
        if "b_gate" in own:
            size = (read * own["r_mag"].exp() + own["b_mag"]).relu()
            return size * (read + own["b_gate"] > 0)
        before = read + own["b_enc"]
        if self.k is not None:
            return self._largest(before)
        if "threshold" in own:
            return before.relu() * (before > own["threshold"])
        return before.relu()

    def _largest(self, before: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
        assert self.k is not None
        lengths = self.decoder.norm(dim=-1) if self.by_norm else None
        order = before if lengths is None else before * lengths
        chosen = order.topk(self.k, dim=-1).indices
        return torch.zeros_like(before).scatter(-1, chosen, before.gather(-1, chosen).relu())

    def rebuilt(self, z: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch D"]:
        """What the features say that the value is: sum_f z_f d_f + b."""
        return z @ self.decoder + self.bias

    def to(self, device: torch.device, dtype: torch.dtype) -> Dictionary:
        """The same with other tensors' device and type."""
        weights = {name: tensor.to(device, dtype) for name, tensor in self.weights.items()}
        return Dictionary(self.origin, self.hook, weights, self.k, self.centre_input, self.by_norm)


def read_dictionary(folder: str | Path) -> Dictionary:
    """Reads a dictionary from its folder; nothing in it can run code.

    Raises:
        FileNotFoundError: it lacks one of the two files.
        ValueError: it cannot be read, is of a kind or at a place that is not supported, or its
            tensors lack something, have other shapes than they should, or are not finite.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not own_file(folder, name).is_file():
            raise FileNotFoundError(
                f"no {folder / name}: a dictionary is a folder with {CONFIG} and {WEIGHTS}, as "
                "SAELens's save_model writes it"
            )
    try:
        told = read_json(folder / CONFIG)
        if not isinstance(told, dict):
            raise ValueError("it holds no mapping")
        return _read(folder, _Config(told))
    except ValueError as error:
        raise ValueError(f"dictionary {folder} cannot be used: {error}") from error


def _read(folder: Path, config: _Config) -> Dictionary:
    hook, k, centre = config.hook(), config.k, config.centre_input
    weights = _checked(config, read_tensors(folder / WEIGHTS))
    return Dictionary(str(folder), hook, weights, k, centre, config.flag(RESCALED))


RESCALED, CENTRED = "rescale_acts_by_decoder_norm", "center_writing_weights"
_WANTED = {  # fields that change what is computed, and the values with which it is the sum above
    "normalize_activations": ("none", False, None),
    "reshape_activations": ("none", None),
    "hook_head_index": (None,),
    "hook_head_index_out": (None,),
    "finetuning_scaling_factor": (False, None),
    "activation_fn": ("relu", "topk", None),
}
_REMEDIES = {
    "normalize_activations": "; fold the scaling into the weights before saving "
    "(fold_activation_norm_scaling_factor), or use a dictionary without it",
}


class _Config:
    """What `cfg.json` says: fields of the autoencoder and, since SAELens 6, `metadata` of where it
    was trained, which older files have beside the others.
    """

    def __init__(self, told: Mapping[str, Any]) -> None:
        metadata = told.get("metadata", told.get("meta")) or {}
        if not isinstance(metadata, Mapping):
            raise ValueError(f"metadata is {quote(metadata)}, but it must be a mapping")
        self.told = {**metadata, **told}
        self.told.setdefault("activation_fn", told.get("activation_fn_str"))
        self.architecture = self.told.get("architecture", "standard")
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"architecture={quote(self.architecture)} is not supported; supported are "
                f"{', '.join(ARCHITECTURES)}"
            )
        for name, allowed in _WANTED.items():
            value = self.told.get(name)
            if not any(type(value) is type(one) and value == one for one in allowed):
                raise ValueError(
                    f"{name}={quote(value)} is not supported, only {allowed[0]!r}"
                    f"{_REMEDIES.get(name, '')}"
                )
        self.d_in, self.d_sae = self.size("d_in"), self.size("d_sae")
        self.transcodes = self.architecture.endswith("transcoder") or bool(
            self.told.get("hook_name_out")
        )
        self.d_out = self.size("d_out") if "d_out" in self.told else self.d_in

    @property
    def centre_input(self) -> bool:
        """SAELens takes nothing off what a transcoder reads, whatever the field says."""
        told = self.told.get("apply_b_dec_to_input", True)
        return not self.transcodes and self.flag("apply_b_dec_to_input", default=told)

    @property
    def k(self) -> int | None:
        """How many features may be active at once."""
        if self.architecture != "topk" and self.told.get("activation_fn") != "topk":
            return None
        extra = self.told.get("activation_fn_kwargs") or {}
        if "k" not in self.told and isinstance(extra, Mapping) and "k" in extra:
            self.told["k"] = extra["k"]
        k = self.size("k")
        if k > self.d_sae:
            raise ValueError(f"k={k}, but there are d_sae={self.d_sae} features")
        return k

    def size(self, name: str) -> int:
        """A field that is a size."""
        value = self.told.get(name)
        if type(value) is not int or not 1 <= value <= 2**31:
            raise ValueError(f"{name} is {quote(value)}, but it must be a number of at least 1")
        return value

    def flag(self, name: str, *, default: Any = False) -> bool:
        """A field that is true or false."""
        value = self.told.get(name, default)
        if type(value) is not bool:
            raise ValueError(f"{name} is {quote(value)}, but it must be true or false")
        return value

    def hook(self) -> Hook:
        """Where it reads and writes."""
        name = self.told.get("hook_name")
        if not self.transcodes:
            layer, site, after = _placed(name, "hook_name", VALUES)
            reads: Reads = "value"
        else:
            out = "hook_name_out"
            layer, site, after = _placed(self.told.get(out), out, {"hook_mlp_out": ("m", 0)})
            read_at, reads = _placed(
                name, "hook_name", {key: (one,) for key, one in INPUTS.items()}
            )
            if read_at != layer:
                raise ValueError(f"it reads block {read_at} and writes block {layer}; only one MLP")
        told = self.told.get("hook_layer")
        if told is not None and told != layer:
            raise ValueError(f"hook_layer={quote(told)}, but hook_name={quote(name)}")
        loading = self.told.get("model_from_pretrained_kwargs") or {}
        if not isinstance(loading, Mapping):
            raise ValueError(f"model_from_pretrained_kwargs is {quote(loading)}, but no mapping")
        centred, unfolded = loading.get(CENTRED) is True, loading.get("fold_ln") is False
        return Hook(site, layer + after, reads, centred, unfolded)


def _placed(name: Any, field: str, places: Mapping[str, tuple]) -> tuple:
    """The block of a hook's name, and what stands for the rest of it."""
    match = _HOOK.fullmatch(name) if isinstance(name, str) else None
    if match is None or match[2] not in places:
        known = ", ".join(f"blocks.N.{place}" for place in places)
        raise ValueError(f"{field}={quote(name)} is not supported; supported are {known}")
    return (int(match[1]), *places[match[2]])


def _checked(config: _Config, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are needed; ValueError for others than these."""
    features, (d_in, d_out) = (config.d_sae,), (config.d_in, config.d_out)
    shapes = {"W_enc": (d_in, *features), "W_dec": (*features, d_out), "b_dec": (d_out,)}
    gated = config.architecture == "gated"
    shapes |= {name: features for name in (("b_gate", "b_mag", "r_mag") if gated else ("b_enc",))}
    if config.architecture.startswith("jumprelu"):
        shapes["threshold"] = features
    ones = weights.get("scaling_factor")  # older files have it, with nothing in it
    weights = {name: tensor for name, tensor in weights.items() if name != "scaling_factor"}
    if ones is not None and not (ones == 1).all():
        raise ValueError("its features are rescaled (scaling_factor), which is not supported")
    if lacking := [name for name in shapes if name not in weights]:
        raise ValueError(f"{WEIGHTS} lacks {', '.join(lacking)} of {config.architecture}")
    if others := sorted(set(weights) - set(shapes)):
        raise ValueError(f"{WEIGHTS} holds {', '.join(others)}, which is not supported")
    for name, shape in shapes.items():
        _check_tensor(name, weights[name], shape)
    return dict(weights)


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, but cfg.json makes it {shape}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}, but it must be float")
    if not math.isfinite(tensor.double().abs().sum().item()):
        raise ValueError(f"{name} is not finite")
