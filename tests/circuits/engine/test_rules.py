"""Backward rules against the same rules written out in one forward pass, and the values that they
leave alone.
"""

from __future__ import annotations

import pytest
import torch

from circuits.engine import Engine
from circuits.engine.rules import RULES, under
from tests import tiny
from tests.slow_gradients import slow_gradients

ENGINES = {
    "layer norm": Engine(tiny.gpt2(n_embd=8, n_head=2)),
    "rms norm, gated, grouped queries": Engine(tiny.huggingface("llama")),
    "gain less 1": Engine(tiny.huggingface("gemma")),
    "norm of each head's queries": Engine(tiny.huggingface("qwen3")),
    "norm of all queries, post-norms": Engine(tiny.huggingface("olmo2")),
    "parallel": Engine(tiny.huggingface("neox")),
    "post-norms, caps, window": Engine(tiny.huggingface("gemma2")),
    "norm without parameters": Engine(tiny.native(normalization_type="LNPre", n_heads=2)),
    "no norm, bidirectional": Engine(
        tiny.native(normalization_type=None, attention_dir="bidirectional", n_heads=2)
    ),
    "attention only": Engine(tiny.native(attn_only=True, n_heads=2)),
    "solu_ln": Engine(tiny.native(act_fn="solu_ln", n_heads=2)),
}
CAPPED = "post-norms, caps, window"
PROMPTS = tiny.prompts(3, seed=4, longest=6)


def asked(engine: Engine):
    """A scalar of the logits at scored positions."""
    weights = torch.randn(*PROMPTS.positions.shape, engine.model.outputs, dtype=engine.dtype)
    weights *= (PROMPTS.positions >= 0)[..., None]
    return lambda logits: (logits * weights).sum()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ENGINES)
def test_a_rule_is_what_it_says_and_leaves_the_values_alone(name, rule):
    engine, seen = ENGINES[name], []
    if name == CAPPED and rule.startswith("relp"):
        pytest.skip("refused, see below")
    scalar = asked(engine)

    def keeping(logits):
        seen.append(logits.detach())
        return scalar(logits)

    ours = torch.zeros(len(engine.graph.readers), *engine.embed(PROMPTS)[0].shape).double()
    embedded = engine.embed(PROMPTS).sum(0)
    for first, gradients in engine.reader_gradients(PROMPTS, embedded, keeping, rule=rule):
        ours[first : first + len(gradients)] = gradients
    expected = slow_gradients(engine, PROMPTS, scalar, rule)
    torch.testing.assert_close(ours, expected, atol=1e-9 * float(expected.abs().max()), rtol=1e-6)
    assert expected.abs().max() > 1e-3
    for _ in engine.reader_gradients(PROMPTS, embedded, keeping):
        pass
    assert torch.equal(*seen), "another value"


@pytest.mark.parametrize("name", ENGINES)
def test_rules_differ_from_one_another(name):
    """Otherwise the test above would not notice a rule that does nothing."""
    engine = ENGINES[name]
    scalar = asked(engine)
    able = [rule for rule in RULES if name != CAPPED or not rule.startswith("relp")]
    found = {rule: slow_gradients(engine, PROMPTS, scalar, rule) for rule in able}
    for one in able:
        for other in able[: able.index(one)]:
            assert (found[one] - found[other]).abs().max() > 1e-6, (one, other)


def test_under_relp_queries_and_keys_get_no_gradient_unlike_under_relp_qk():
    engine = ENGINES["layer norm"]
    sizes = {}
    for rule in ("relp", "relp_qk"):
        embedded = engine.embed(PROMPTS).sum(0)
        gradients = dict(engine.reader_gradients(PROMPTS, embedded, asked(engine), rule=rule))
        queries_and_keys, values = gradients[engine.graph.first_reader(1)].split([4, 2])
        sizes[rule] = queries_and_keys.abs().max() > 0
        assert values.abs().max() > 0
    assert sizes == {"relp": False, "relp_qk": True}


def test_the_plain_rule_is_the_model_itself():
    architecture = ENGINES["layer norm"].architecture
    assert under("plain", architecture) is architecture


@pytest.mark.parametrize("rule", ["relp", "relp_qk"])
def test_what_a_rule_does_not_define_is_refused_by_name(rule):
    with pytest.raises(
        ValueError, match=f"rule={rule} does not define .* soft-cap of logits .*gim"
    ):
        under(rule, ENGINES[CAPPED].architecture)


def test_soft_caps_of_scores_alone_are_refused_where_the_pattern_has_a_gradient():
    architecture = Engine(tiny.native(attn_scores_soft_cap=2.0)).architecture
    under("relp", architecture)
    with pytest.raises(ValueError, match="soft-cap of attention scores"):
        under("relp_qk", architecture)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="rule='lrp', but the rules are plain, relp, relp_qk, gim"):
        under("lrp", ENGINES["layer norm"].architecture)
