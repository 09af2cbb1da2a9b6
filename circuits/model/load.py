"""Loads a model as a TransformerLens bridge, with what is needed to check and to identify it.

Five sources: a HuggingFace hub name, a local HuggingFace folder, a GGUF file, a TransformerLens
state dict (`X.pt` or `X.safetensors`) beside its `X.config.json`, and an `nn.Module` in memory.
Wrapping changes a HuggingFace module (GPT-2's q, k and v are split off), so the logits of the
unwrapped model on random tokens are taken first, its tensors are hashed first, and a model handed
over in memory is copied first.  Parameters come back frozen: call `bridge.requires_grad_()` to
train them.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuits.collector import collector_paused
from circuits.model.altered import refuse_altered, refuse_altered_code
from circuits.model.gguf import gguf_file, read_gguf
from circuits.model.huggingface import read_module, read_tokenizer
from circuits.model.output_head import OutputHead, load_output_head
from circuits.model.refusals import first_line, refuse_dtype, refuse_module, refuse_parameters
from circuits.model.state_dicts import DTYPES, read_bridge
from circuits.prompts.collation import prompts_from_records
from circuits.prompts.prompts import Prompts
from circuits.prompts.tokens import begins_with_bos

PACKAGES = ("circuits", "abstraction", "mad")  # that `pkg://` looks into


@dataclass
class ModelConfig:
    """Which model to load, and how."""

    # hub name, HuggingFace folder, X.gguf, X.pt | X.safetensors beside X.config.json, or
    # pkg://PACKAGE/...
    path: str = "???"
    device: str = "cpu"  # any torch device
    dtype: str = "float32"  # float32, float64, bfloat16 or float16; scores are float32 all the same
    # begin each text with the tokenizer's BOS; null: as the tokenizer itself does
    prepend_bos: bool | None = None
    split_input: bool = False  # token and position embeddings as two writers
    # X.safetensors with weight [outputs, d_model] and bias, read in place of the LM head
    head: str | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A bridge, where it came from, and what its source computed before it was wrapped."""

    bridge: Any  # transformer_lens TransformerBridge
    hf_config: Any | None  # None for TransformerLens native models
    tokenizer: Any | None
    path: str
    weight_hash: str  # of the source tensors, before any cast
    prepend_bos: bool
    probe_tokens: Int[Tensor, "B S"]
    probe_logits: Float[Tensor, "B S V"]
    split_input: bool = False  # the engine takes token and position embeddings as two writers
    head: OutputHead | None = None  # read in place of the model's own

    @property
    def context(self) -> int:
        return self.bridge.cfg.n_ctx

    @property
    def vocabulary(self) -> int:
        return self.bridge.cfg.d_vocab

    @property
    def outputs(self) -> int:
        """How many logits there are: answers are below this."""
        if self.head is not None:
            return self.head.outputs
        own = getattr(self.bridge.cfg, "d_vocab_out", -1)
        return own if own > 0 else self.vocabulary

    def prompts(self, records: Iterable[Mapping[str, Any]]) -> Prompts:
        """Records as this model's prompts, by its tokenizer, BOS, context and vocabulary."""
        return prompts_from_records(
            records,
            tokenizer=self.tokenizer,
            prepend_bos=self.prepend_bos,
            max_length=self.context,
            vocabulary=self.vocabulary,
            outputs=self.outputs,
        )


@collector_paused()
def load_model(config: ModelConfig | str | Path) -> LoadedModel:
    """Returns the model that a configuration names, or a path alone: `load_model("gpt2")`.

    >>> model = load_model("pkg://mad/models/recall_redirect")
    >>> model.context, model.vocabulary
    (12, 87)

    Raises:
        FileNotFoundError: the file or folder is missing, or a hub name cannot be reached.
        ValueError: a device or dtype that cannot be computed with, weights that do not fit their
            configuration, or a model that is refused (`circuits.model.refusals`).
    """
    config = ModelConfig(str(config)) if isinstance(config, str | Path) else config
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype={config.dtype!r}, but it must be one of {', '.join(DTYPES)}")
    _check_device(config.device)
    refuse_dtype(DTYPES[config.dtype], torch.device(config.device))
    path = local_path(config.path)
    if path.suffix in (".pt", ".pth", ".safetensors"):
        loaded = _load_state_dict(path, config)
    else:
        loaded = _load_huggingface(path, config)
    loaded = replace(loaded, split_input=config.split_input)
    return loaded if config.head is None else _with_head(loaded, local_path(config.head))


def _with_head(loaded: LoadedModel, path: Path) -> LoadedModel:
    """The model with another head, which counts as weights."""
    head = load_output_head(path)
    both = loaded.weight_hash + weight_hash(head.state_dict())
    return replace(loaded, head=head, weight_hash=hashlib.sha256(both.encode()).hexdigest())


def _check_device(name: str) -> None:
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={name!r} cannot be used here ({first_line(error)}); use cpu, or another "
            "machine"
        ) from error
    if device.type == "meta":
        raise ValueError("device='meta' holds no values to compute with; use cpu")


def local_path(path: str) -> Path:
    """A path with `~` resolved, and `pkg://PACKAGE/...`, a file that madcap brings along.

    Nothing is imported, and no other package is looked into: paths come from files, too.

    >>> local_path("pkg://mad/models/recall_redirect").name
    'recall_redirect'

    Raises:
        ValueError: `pkg://` with another package, or that leads out of it.
    """
    if not path.startswith("pkg://"):
        return Path(path).expanduser()
    package, _, inside = path.removeprefix("pkg://").partition("/")
    spec = find_spec(package) if package in PACKAGES else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{path}: pkg:// is for what comes with madcap, in {', '.join(PACKAGES)}; give the "
            "path of the file or folder instead"
        )
    folder = Path(spec.submodule_search_locations[0])
    if not (folder / inside).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} leads out of the package {package}; give a path without pkg://")
    return folder / inside


@collector_paused()
def from_module(
    module: nn.Module,
    *,
    tokenizer: Any | None = None,
    path: str = "memory",
    prepend_bos: bool | None = None,
) -> LoadedModel:
    """Returns a HuggingFace module in memory as a loaded model, from a copy of it.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> config = GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, vocab_size=29)
    >>> from_module(GPT2LMHeadModel(config)).outputs
    29

    Raises:
        ValueError: it has no HuggingFace configuration, or is refused (`circuits.model.refusals`).
    """
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise ValueError(
            f"{type(module).__name__} has no HuggingFace configuration; for other modules build a "
            "TransformerLens bridge and use from_bridge"
        )
    refuse_module(path, module)
    digest = weight_hash(module.state_dict())
    return _wrap(copy.deepcopy(module), digest, tokenizer, path, prepend_bos)


def from_bridge(bridge: Any, *, tokenizer: Any | None = None, path: str = "memory") -> LoadedModel:
    """Returns a TransformerLens native bridge as a loaded model.

    >>> from transformer_lens.config import TransformerBridgeConfig
    >>> from transformer_lens.model_bridge import TransformerBridge
    >>> sizes = {"d_model": 8, "d_head": 4, "n_layers": 1, "n_heads": 2, "n_ctx": 16, "d_vocab": 29}
    >>> config = TransformerBridgeConfig(**sizes, act_fn="gelu")
    >>> from_bridge(TransformerBridge.boot_native(config)).outputs
    29

    Raises:
        ValueError: the bridge wraps another kind of model, whose source is no longer at hand to
            compare with; it has hooks or replaced functions; or its parameters have no values, are
            not finite or of several dtypes.
    """
    if bridge.cfg.architecture != "TransformerLensNative":
        raise ValueError(
            f"from_bridge takes TransformerLens native bridges, not {bridge.cfg.architecture!r}: "
            "wrapping has already changed the module; hand the module itself to from_module, or "
            "its folder to load_model"
        )
    for part in (bridge, bridge.original_model):
        refuse_altered(
            path, part, remove="remove all: bridge.reset_hooks(including_permanent=True)"
        )
        refuse_altered_code(path, part)
    refuse_parameters(path, bridge.original_model)
    return _from_native(bridge, weight_hash(bridge.state_dict()), tokenizer, path)


def weight_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, types, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)  # without a copy
    return digest.hexdigest()


def _load_huggingface(path: Path, config: ModelConfig) -> LoadedModel:
    """A folder or a GGUF file, or else what the hub has by that name."""
    local = path.exists()
    no_hub_name = config.path.startswith((".", "/", "~", "pkg://")) or config.path.count("/") > 1
    if not local and no_hub_name:
        raise FileNotFoundError(
            f"no model at {config.path}: give a HuggingFace folder, X.gguf, X.pt with "
            "X.config.json, or a hub name"
        )
    source = str(path) if local else config.path
    if (file := gguf_file(path)) is not None:
        module, tokenizer = read_gguf(file)
    else:
        module = read_module(source, local=local)
        tokenizer = read_tokenizer(source, local=local)
    digest = weight_hash(module.state_dict())
    _place(module, config)
    refuse_module(source, module)
    return _wrap(module, digest, tokenizer, config.path, config.prepend_bos)


def _load_state_dict(path: Path, config: ModelConfig) -> LoadedModel:
    if config.prepend_bos:
        raise ValueError(
            f"prepend_bos=true, but {path.name} comes without a tokenizer to name BOS; put it in "
            "the prompts"
        )
    bridge, tensors = read_bridge(path, config.device)
    _place(bridge.original_model, config)  # bridge.to() prints
    bridge.cfg.dtype = DTYPES[config.dtype]
    refuse_parameters(str(path), bridge.original_model)
    return _from_native(bridge, weight_hash(tensors), None, config.path)


def _place(module: nn.Module, config: ModelConfig) -> None:
    """Moves a model; derived buffers, such as rotary frequencies, keep their precision.

    A number that was rounded to the dtype of the file (Gemma's scale of embeddings) is made anew.
    """
    derived = [
        (part, name, buffer)
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name in part._non_persistent_buffers_set
    ]
    module.to(device=config.device, dtype=DTYPES[config.dtype])
    for part, name, buffer in derived:
        number = getattr(part, f"scalar_{name}", None)
        buffer = buffer if number is None else torch.tensor(number, dtype=torch.float32)
        setattr(part, name, buffer.to(config.device))


def _wrap(
    module: nn.Module, digest: str, tokenizer: Any | None, path: str, prepend_bos: bool | None
) -> LoadedModel:
    """Takes the module's own logits, then wraps it (which changes it)."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    module = module.eval()
    config: Any = module.config
    tokens = _probe(config.vocab_size, config.max_position_embeddings, module)
    with torch.no_grad():
        logits = module(tokens, use_cache=False).logits
    bridge: Any = build_bridge_from_module(
        module, architecture=type(module).__name__, hf_config=config
    )
    bridge.eval().requires_grad_(False)
    if tokenizer is not None:
        _give_tokenizer(bridge, tokenizer)
    if prepend_bos is None:
        prepend_bos = begins_with_bos(tokenizer)
    return LoadedModel(bridge, config, tokenizer, path, digest, prepend_bos, tokens, logits)


def _from_native(bridge: Any, digest: str, tokenizer: Any | None, path: str) -> LoadedModel:
    """A native bridge with its own logits."""
    bridge.eval().requires_grad_(False)
    tokens = _probe(bridge.cfg.d_vocab, bridge.cfg.n_ctx, bridge)
    with torch.no_grad():
        logits = bridge.original_model(tokens)
    return LoadedModel(bridge, None, tokenizer, path, digest, False, tokens, logits)


def _probe(vocabulary: int, context: int, module: nn.Module) -> Int[Tensor, "B S"]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (2, min(context, 16)), generator=generator)
    return tokens.to(next(module.parameters()).device)


def _give_tokenizer(bridge: Any, tokenizer: Any) -> None:
    """For calls of the bridge with text, which need a token to pad with.

    The bridge's builder would read the tokenizer once more, from where it was first, and give ours
    the special tokens that it lacks, so that prompts came to be encoded in another way.
    """
    tokens = tokenizer.encode("a")
    bridge.cfg.tokenizer_prepends_bos = begins_with_bos(tokenizer)
    bridge.cfg.tokenizer_appends_eos = len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    bridge.tokenizer = tokenizer
