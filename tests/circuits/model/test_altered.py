"""Models whose code was changed: refused by name, also where a comparison would not have told."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from circuits.engine import Engine
from circuits.model.load import from_bridge, from_module
from tests import modules, tiny

MLP = "model.layers.1.mlp"
UP = f"{MLP}.up_proj"
TOKENS = torch.randint(29, (2, 9), generator=torch.Generator().manual_seed(4))


def llama() -> nn.Module:
    return tiny.llama_module()


def same_logits(module: nn.Module) -> None:
    """The module is taken, and the engine computes what it computes."""
    ours = Engine(from_module(module)).logits(tiny.from_tokens(TOKENS))
    with torch.no_grad():
        torch.testing.assert_close(ours, module(TOKENS).logits, atol=1e-4, rtol=1e-4)


def refused(module: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=f"^memory: {message}") as caught:
        from_module(module)
    assert "\n" not in str(caught.value)


# ---- hooks ---------------------------------------------------------------------------------------


def late(module, inputs, output):
    """Changes positions that no comparison on a few tokens reaches."""
    output = output.clone()
    output[:, 20:] += 1.0
    return output


class Steering:
    def __call__(self, module, inputs, output):
        return output + 1.0


@pytest.mark.parametrize("name", tiny.HUGGINGFACE)
@pytest.mark.parametrize(
    ("hook", "named"),
    [
        (late, "late"),
        (lambda *given: None, "<lambda>"),
        (functools.partial(late), "partial"),
        (Steering(), "Steering"),
    ],
)
def test_a_hook_on_any_part_is_refused_and_its_removal_helps(name, hook, named):
    module = tiny.HUGGINGFACE[name]()
    part = next(part for part, one in module.named_modules() if part.endswith(("mlp", "fc1")))
    handle = module.get_submodule(part).register_forward_hook(hook)
    message = rf"{part} has a forward hook \({named}\), and the engine would leave out what it does"
    with pytest.raises(ValueError, match=message.replace("<", ".*<") + r"; remove it: handle\.rem"):
        from_module(module)
    handle.remove()
    from_module(module)


@pytest.mark.parametrize("part", ["", "model", "model.embed_tokens", UP, "model.norm", "lm_head"])
def test_hooks_are_found_wherever_they_are(part):
    module = llama()
    name = (part or "LlamaForCausalLM").replace(".", r"\.")
    handle = module.get_submodule(part).register_forward_hook(late)
    refused(module, rf"{name} has a forward hook \(late\)")
    handle.remove()
    module.get_submodule(part).register_forward_pre_hook(lambda module, inputs: None)
    refused(module, rf"{name} has a forward pre-hook ")


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ],
)
def test_hooks_on_all_modules_are_refused(register):
    module, bridge = llama(), tiny.native_bridge()
    handle = register(lambda module, inputs, output=None: None)
    try:
        refused(module, "torch has a forward (pre-)?hook on all modules")
        with pytest.raises(ValueError, match="hook on all modules"):
            from_bridge(bridge)
    finally:
        handle.remove()
    same_logits(module)


def test_hooks_of_the_backward_pass_change_no_value_and_are_taken():
    module = llama()
    module.get_submodule(UP).register_full_backward_hook(lambda *given: None)
    module.get_submodule(MLP).register_full_backward_pre_hook(lambda *given: None)
    module.get_parameter(f"{UP}.weight").register_hook(lambda gradient: 2 * gradient)
    same_logits(module)


def test_what_transformers_adds_itself_is_taken():
    module = llama()
    module(TOKENS, output_hidden_states=True, output_attentions=True)  # leaves recording hooks
    module.enable_input_require_grads()  # type: ignore[operator]
    assert any(part._forward_hooks for part in module.modules())
    same_logits(module)
    module.activation_checkpointing_enable()  # type: ignore[operator]
    same_logits(module)


def test_a_hook_beside_those_of_transformers_is_found():
    module = llama()
    module(TOKENS, output_hidden_states=True)
    module.get_submodule("model.layers.0").register_forward_hook(late)
    refused(module, r"model\.layers\.0 has a forward hook \(late\)")


# ---- replaced functions --------------------------------------------------------------------------


def loud(original):
    @functools.wraps(original)
    def forward(*inputs, **named):
        return 1.5 * original(*inputs, **named)

    return forward


@pytest.mark.parametrize("part", [MLP, UP, "model.layers.0.input_layernorm"])
def test_a_replaced_forward_is_refused_and_its_removal_helps(part):
    module = llama()
    changed = module.get_submodule(part)
    changed.forward = loud(changed.forward)  # type: ignore[method-assign]
    refused(module, rf"{part}\.forward is replaced on this module \(.*delete the attribute")
    del changed.forward
    same_logits(module)


def test_a_replaced_forward_of_the_whole_model_or_of_its_attention_is_refused():
    module = llama()
    module.forward = types.MethodType(lambda self, *given: None, module)  # type: ignore[assignment]
    refused(module, r"LlamaForCausalLM\.forward is replaced")
    module = modules.gptj_module()
    attention = module.get_submodule("transformer.h.1.attn")
    attention._attn = lambda query, key, value, *rest: (value, None)  # type: ignore[assignment]
    refused(module, r"transformer\.h\.1\.attn\._attn is replaced")


def test_what_changes_no_forward_pass_is_taken():
    module = llama()
    module.generate = lambda *given: None  # type: ignore[assignment]
    part = module.get_submodule(MLP)
    part.forward = part.forward  # type: ignore[method-assign] # bound anew, as accelerate leaves it
    part.note = lambda: "mine"  # type: ignore[assignment]
    same_logits(module)


def test_a_class_of_transformers_that_was_patched_is_refused(monkeypatch):
    from transformers.models.llama import modeling_llama

    module = llama()
    forward = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", loud(forward))
    refused(
        module, r"forward of transformers\.models\.llama\.modeling_llama\.LlamaMLP was replaced"
    )
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    monkeypatch.setattr(nn.Linear, "forward", loud(nn.Linear.forward))
    refused(module, r"forward of torch\.nn\.modules\.linear\.Linear was replaced")


def test_a_function_of_the_family_that_was_patched_is_refused(monkeypatch):
    from transformers.models.llama import modeling_llama

    module = llama()
    rotate = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda *given: rotate(*given))
    refused(module, r"apply_rotary_pos_emb of transformers\.models\.llama.* was replaced .*fresh")


def test_an_attention_function_of_ones_own_is_refused():
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def half(*given, **named):
        output, weights = sdpa_attention_forward(*given, **named)
        return output / 2, weights

    AttentionInterface.register("half", half)
    module = llama()
    module.config._attn_implementation = "half"  # type: ignore[union-attr]
    refused(module, r"half of attention implementation was replaced \(.*half of tests")
    module.config._attn_implementation = "eager"  # type: ignore[union-attr]
    same_logits(module)


def test_a_part_of_another_class_without_weights_of_its_own_is_refused():
    from transformers.models.llama.modeling_llama import LlamaMLP

    class Doubled(LlamaMLP):
        def forward(self, x):
            return 2 * super().forward(x)

    class Renamed(LlamaMLP):
        def note(self):
            return "mine"

    class Quiet(nn.Module):
        def forward(self, x):
            return x

    module = llama()
    module.get_submodule(MLP).__class__ = Doubled
    refused(module, rf"{MLP} is a Doubled \(.*\), whose own computation the engine does not know")
    module.get_submodule(MLP).__class__ = Renamed
    same_logits(module)
    module = tiny.gpt2_module()
    module.set_submodule("transformer.h.0.attn.resid_dropout", Quiet())
    refused(module, r"transformer\.h\.0\.attn\.resid_dropout is a Quiet")


# ---- parametrised weights ------------------------------------------------------------------------


def weight_norm(part: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(part)


@pytest.mark.parametrize(
    ("change", "message", "undo"),
    [
        (
            parametrizations.weight_norm,
            r"\.weight is parametrised, .*remove_parametrizations\(layer, 'weight'\)",
            lambda part: nn.utils.parametrize.remove_parametrizations(part, "weight"),
        ),
        (
            weight_norm,
            r" has a forward pre-hook \(WeightNorm\).*nn\.utils\.remove_weight_norm\(layer\)",
            nn.utils.remove_weight_norm,
        ),
        (
            nn.utils.spectral_norm,
            r" has a forward pre-hook \(SpectralNorm\).*remove_spectral_norm\(layer\)",
            nn.utils.remove_spectral_norm,
        ),
        (
            lambda part: prune.l1_unstructured(part, "weight", 0.5),
            r" has a forward pre-hook \(L1Unstructured\).*prune\.remove\(layer, name\)",
            lambda part: prune.remove(part, "weight"),
        ),
    ],
    ids=["parametrised", "weight norm", "spectral norm", "pruned"],
)
def test_weights_that_are_computed_at_each_use_are_refused_and_the_remedy_helps(
    change, message, undo
):
    module = llama()
    change(module.get_submodule(UP))
    refused(module, UP.replace(".", r"\.") + message)
    undo(module.get_submodule(UP))
    same_logits(module)


# ---- TransformerLens native bridges --------------------------------------------------------------


def test_hooks_on_a_bridge_are_refused_and_the_remedy_helps():
    bridge = tiny.native_bridge()
    bridge.add_hook("blocks.1.mlp.hook_out", lambda x, hook: x + 1)
    with pytest.raises(
        ValueError, match=r"blocks\.1\.mlp.*hook_out has a forward hook .*reset_hooks"
    ):
        from_bridge(bridge)
    bridge.reset_hooks(including_permanent=True)
    Engine(from_bridge(bridge))


def test_a_bridge_that_was_run_is_taken():
    bridge = tiny.native_bridge()
    bridge.run_with_cache(TOKENS)
    bridge(TOKENS)
    Engine(from_bridge(bridge))


@pytest.mark.parametrize("part", ["layers.0.mlp", "layers.1.attn.q", "head"])
def test_hooks_and_replaced_functions_of_the_model_inside_a_bridge_are_refused(part):
    bridge = tiny.native_bridge()
    inner = bridge.original_model.get_submodule(part)
    handle = inner.register_forward_hook(late)
    with pytest.raises(ValueError, match=r"^memory: .* has a forward hook \(late\)"):
        from_bridge(bridge)
    handle.remove()
    inner.forward = loud(inner.forward)
    with pytest.raises(ValueError, match=r"^memory: .*forward is replaced on this module"):
        from_bridge(bridge)


def test_a_patched_class_of_transformer_lens_is_refused(monkeypatch):
    from transformer_lens.model_bridge.sources.native.model import NativeAttention

    bridge = tiny.native_bridge()
    monkeypatch.setattr(NativeAttention, "forward", loud(NativeAttention.forward))
    with pytest.raises(ValueError, match=r"forward of .*NativeAttention was replaced"):
        from_bridge(bridge)
