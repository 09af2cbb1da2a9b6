"""Models whose code was changed after they were made: hooks, replaced functions, parametrisations.

The engine computes with a model's weights, so it would leave out what such a change does to the
forward pass; a comparison on some tokens cannot rule that out, as a change may wait for other
tokens or later positions.  So each change is found and refused by name, whether it is harmless or
not.  Taken are hooks of the backward pass, and what transformers and accelerate add themselves to
record outputs or to place a model on one device, which changes no value.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

# Packages whose functions compute what the engine knows of.
_KNOWN = frozenset({"torch", "transformers", "transformer_lens"})
# Modules whose hooks only record; what they record is changed by hooks of one's own, seen apart.
_RECORDERS = ("transformers.", "transformer_lens.model_bridge.generalized_components.")
_HOOKS = {"_forward_pre_hooks": "forward pre-hook", "_forward_hooks": "forward hook"}
_GLOBAL = {f"_global{attribute}": kind for attribute, kind in _HOOKS.items()}
# What undoes a change of torch's own, by the name of its hook.
_UNDONE = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm(layer)",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm(layer)",
}
_HANDLE = "remove it: handle.remove(), with the handle that registering it returned"


def refuse_altered(source: str, module: nn.Module, *, remove: str = _HANDLE) -> None:
    """Refuses a module that has hooks, replaced methods or parametrised weights, by their names.

    Args:
        source: what the message calls the model.
        remove: what the message says to do about a hook.

    Raises:
        ValueError: there is one.
    """
    for name, kind in _GLOBAL.items():
        for hook in getattr(torch_module, name).values():
            _refuse(source, f"torch has a {kind} on all modules", hook, _HANDLE)
    for name, part in module.named_modules():
        name = name.replace("_original_component.", "") or type(part).__name__  # a bridge's
        _refuse_parametrised(source, name, part)
        _refuse_hooks(source, name, part, remove)
        for method in _replaced(part, root=part is module):
            raise ValueError(
                f"{source}: {name}.{method} is replaced on this module "
                f"({_named(vars(part)[method])}), and the engine would compute what its class "
                f"does; delete the attribute ({method!r}) from it, or load the model anew"
            )


def _refuse_parametrised(source: str, name: str, part: nn.Module) -> None:
    if parametrize.is_parametrized(part):
        parameter = next(iter(part.parametrizations))  # type: ignore[arg-type]
        raise ValueError(
            f"{source}: {name}.{parameter} is parametrised, computed anew from other tensors at "
            "each use; make it a plain weight: torch.nn.utils.parametrize."
            f"remove_parametrizations(layer, {parameter!r})"
        )


def _refuse_hooks(source: str, name: str, part: nn.Module, remove: str) -> None:
    for attribute, kind in _HOOKS.items():
        for hook in getattr(part, attribute).values():
            if not _scope(hook).startswith(_RECORDERS):
                _refuse(source, f"{name} has a {kind}", hook, _undo(hook, remove))


def refuse_altered_code(source: str, module: nn.Module) -> None:
    """Refuses a module of transformers or TransformerLens whose own functions were replaced.

    That is in the file of its family, in the classes of its parts, or as its attention function.

    Raises:
        ValueError: there is one.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    family = sys.modules[type(module).__module__]
    kinds = dict.fromkeys(type(part) for part in module.modules())
    config: Any = getattr(module, "config", None)  # TransformerLens's models have none
    chosen = getattr(config, "_attn_implementation", "eager")
    attention: Mapping[str, Any] = {chosen: ALL_ATTENTION_FUNCTIONS.get(chosen)}
    places = {
        family.__name__: (vars(family), _KNOWN | sys.stdlib_module_names),
        "attention implementation": (attention, _KNOWN),
        **{f"{kind.__module__}.{kind.__name__}": (_own_functions(kind), _KNOWN) for kind in kinds},
    }
    for place, (functions, packages) in places.items():
        for name, function in functions.items():
            if isinstance(function, FunctionType) and not _comes_from(function, packages):
                raise ValueError(
                    f"{source}: {name} of {place} was replaced ({_named(function)} of "
                    f"{function.__module__}), and the engine would compute what the original "
                    "does; undo it, or load the model in a fresh process without the patch"
                )


def computes_as_its_class(part: nn.Module) -> bool:
    """Whether the forward pass of a module is torch's or transformers' own code."""
    return all(_comes_from(getattr(type(part), name), _KNOWN) for name in ("forward", "__call__"))


def _refuse(source: str, what: str, hook: Any, remedy: str) -> None:
    raise ValueError(
        f"{source}: {what} ({_named(hook)}), and the engine would leave out what it does; {remedy}"
    )


def _undo(hook: Any, remove: str) -> str:
    from torch.nn.utils.prune import BasePruningMethod

    if isinstance(hook, BasePruningMethod):
        return "make pruning permanent: torch.nn.utils.prune.remove(layer, name)"
    known = _UNDONE.get(type(hook).__name__)
    return remove if known is None else f"make it a plain weight: {known}"


def _replaced(part: nn.Module, *, root: bool) -> Iterator[str]:
    """Methods of a module's class that the module has in another version of its own.

    Of the whole model only its forward pass counts: accelerate and others replace its `to`.
    """
    kind = type(part)
    for name, value in vars(part).items():
        original = getattr(kind, name, None)
        if not callable(original) or isinstance(value, nn.Module) or not callable(value):
            continue
        if root and name not in ("forward", "_call_impl"):
            continue
        same = getattr(value, "__func__", None) is original and value.__self__ is part
        if not same and not (name == "forward" and _places_only(part)):
            yield name


def _places_only(part: Any) -> bool:
    """Whether a module's forward is accelerate's, which moves its inputs to one device."""
    hook = getattr(part, "_hf_hook", None)
    if hook is None:
        return False
    from accelerate.hooks import AlignDevicesHook, SequentialHook

    hooks = hook.hooks if type(hook) is SequentialHook else (hook,)
    before = getattr(getattr(part, "_old_forward", None), "__func__", None)
    return (
        all(type(one) is AlignDevicesHook for one in hooks)
        and getattr(part.forward, "func", part.forward).__module__ == "accelerate.hooks"
        and before is type(part).forward
    )


def _own_functions(kind: type) -> dict[str, Any]:
    """The methods of a class that a model of transformers computes with, by their names."""
    known = kind.__module__.partition(".")[0] in _KNOWN
    names = ["forward", "__call__"] if known else []
    for base in kind.__mro__:
        names += vars(base) if base.__module__.startswith("transformers.models.") else ()
    return {name: getattr(kind, name) for name in names}


def _comes_from(function: Callable[..., Any] | None, packages: frozenset[str]) -> bool:
    """Whether a function, and each that it wraps, was defined in one of these packages."""
    while function is not None:
        if _scope(function).partition(".")[0] not in packages:
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def _scope(function: Any) -> str:
    """The module in which a function was defined, which `functools.wraps` does not hide."""
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    scope = getattr(function, "__globals__", {})
    return scope.get("__name__", type(function).__module__)


def _named(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
