"""Backward rules against the same rules written out in one forward pass: a value is the model's,
and what a rule takes for a number is detached.
"""

from __future__ import annotations

import pytest
import torch

from circuits.engine import Engine
from circuits.engine.rules import RULES, under
from circuits.model.attention import _rotate
from circuits.prompts import Prompts
from tests import tiny

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


def halved(x: torch.Tensor) -> torch.Tensor:
    return x / 2 + (x / 2).detach()


def slow(engine: Engine, prompts: Prompts, scalar, rule: str) -> torch.Tensor:
    """Gradients of `scalar(logits)` in an addend of each reader's own input, [R, B, S, D]."""
    architecture, graph = engine.architecture, engine.graph
    plain, relp = rule == "plain", rule.startswith("relp")
    embedded = engine.embed(prompts).sum(0)
    addends = embedded.new_zeros(len(graph.readers), *embedded.shape).requires_grad_()

    def normed(norm, x):
        if norm is None or norm.kind == "none":
            return x
        weight, bias = (getattr(norm.module, name, None) for name in ("weight", "bias"))
        x = x - x.mean(-1, keepdim=True) if norm.kind == "layer" else x
        size = (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        y = x / (size if plain else size.detach())
        y = y if weight is None else y * (weight + norm.offset)
        return y if bias is None else y + bias

    def active(f, x):
        return x * (f(x) / x).detach() if relp else f(x)

    def product(x):
        return x if plain else halved(x)

    def softmax(scores):
        p = scores.softmax(-1)
        if rule == "relp":
            return p.detach()
        if rule != "gim":
            return p
        softer = (scores / 2).softmax(-1)
        return p.detach() + 2 * (softer - softer.detach())

    def heads(layer, x):
        block, first = architecture.blocks[layer], graph.first_reader(layer)
        attention, width = block.attention, architecture.head_width
        sides, row = [], first
        for name, count in (("q", graph.n_heads), ("k", graph.kv_heads), ("v", graph.kv_heads)):
            projection, own_norm = getattr(attention, name), getattr(attention, f"{name}_norm", 0)
            side = []
            for head in range(count):
                read = normed(block.norm1, x + addends[row + head])
                made = normed(projection.norm, read @ projection.weight.T + bias_of(projection))
                side.append(made[..., head * width : (head + 1) * width])
            side = torch.stack([normed(own_norm or None, one) for one in side])
            if attention.rotary is not None and name != "v":
                cos, sin = attention.rotary.tables(x.shape[1], x)
                side = _rotate(side, cos, sin, attention.rotary.pairs)
            sides.append(side)
            row += count
        return attended(attention, *sides)

    def attended(attention, q, k, v):
        k, v = (side.repeat_interleave(graph.kv_group, 0) for side in (k, v))
        scores = q @ k.mT * attention.scale
        scores = halved(scores) if rule == "gim" else scores
        if (cap := attention.soft_cap) is not None:
            scores = cap * torch.tanh(scores / cap)
        place = torch.arange(q.shape[2])
        back = place[:, None] - place
        allowed = (
            back >= 0 if graph.causal else prompts.key_mask[:, None, :].expand(-1, len(q[0, 0]), -1)
        )
        if attention.window is not None:
            allowed = allowed & (back < attention.window)
        z = softmax(scores.masked_fill(~allowed, float("-inf"))) @ v
        z = halved(z) if rule == "gim" else z
        return z.movedim(0, -2).flatten(-2) @ attention.o.weight.T + bias_of(attention.o)

    def feed_forward(block, x):
        mlp = block.mlp
        hidden = active(mlp.activation, (mlp.gate or mlp.up)(x))
        hidden = product(hidden * mlp.up(x)) if mlp.gate else hidden
        return normed(block.post_norm2, mlp.down(normed(mlp.inner_norm, hidden)))

    x = embedded
    for layer, block in enumerate(architecture.blocks):
        before = x
        x = x + normed(block.post_norm1, heads(layer, x))
        if block.mlp is not None:
            own = addends[graph.first_reader(layer + 1) - 1]
            x = x + feed_forward(
                block, normed(block.norm2, (before if graph.parallel else x) + own)
            )
    logits = architecture.unembedded(normed(architecture.final_norm, x + addends[-1]))
    at = prompts.positions.clamp(min=0)[..., None].expand(-1, -1, logits.shape[-1])
    return torch.autograd.grad(scalar(logits.gather(1, at)), addends)[0]


def bias_of(projection) -> torch.Tensor | float:
    return 0.0 if projection.bias is None else projection.bias


def asked(engine: Engine):
    """A scalar of the logits at scored positions, and one that keeps the logits that it saw."""
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
    expected = slow(engine, PROMPTS, scalar, rule)
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
    found = {rule: slow(engine, PROMPTS, scalar, rule) for rule in able}
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
