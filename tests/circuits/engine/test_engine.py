"""The engine against the bridge, HuggingFace, a computation through hooks, and itself."""

from __future__ import annotations

import re

import pytest
import torch

from circuits.engine import Engine
from circuits.engine import engine as engine_module
from circuits.engine.masked import Start
from circuits.engine.plain import Record, residual_stream
from circuits.model.families import describe
from tests import tiny
from tests.changes import no_bias
from tests.features import MUTATIONS
from tests.hooks import bound, read_by, through_hooks

MODELS = tiny.models()


@pytest.fixture(params=list(MODELS))
def named_engine(request) -> tuple[str, Engine]:
    return request.param, Engine(MODELS[request.param])


def tokens_for(factored: Engine, rows: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randint(29, (rows, length), generator=torch.Generator().manual_seed(3))


def random_ablated(
    factored: Engine, tokens: torch.Tensor, batch: int | None = None, pos: int | None = None
):
    clean = factored.clean(tiny.from_tokens(tokens)).writers
    shape = (len(clean), batch or clean.shape[1], pos or clean.shape[2], clean.shape[3])
    noise = torch.randn(shape, dtype=clean.dtype, generator=torch.Generator().manual_seed(5))
    return factored.ablated(noise)


def random_masks(factored: Engine, count: int, kept: float = 0.6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    shape = (count, *factored.graph.exists.shape)
    soft = torch.rand(shape, generator=generator)
    return (torch.rand(shape, generator=generator) < kept) * soft


def test_engine_is_bridge_is_huggingface(named_engine):
    name, factored = named_engine
    clean = factored.clean(tiny.from_tokens(factored.model.probe_tokens))
    bridge = factored.model.bridge(factored.model.probe_tokens)
    assert clean.logits.std() > 0.3, "weights too small to show anything"
    torch.testing.assert_close(clean.logits, bridge, atol=bound(name), rtol=bound(name))
    torch.testing.assert_close(
        clean.logits, factored.model.probe_logits, atol=bound(name), rtol=bound(name)
    )


def test_logits_without_writers(named_engine):
    _, factored = named_engine
    tokens = tokens_for(factored)
    torch.testing.assert_close(
        factored.logits(tiny.from_tokens(tokens)), factored.clean(tiny.from_tokens(tokens)).logits
    )


def test_random_masks_equal_the_computation_through_hooks(named_engine):
    name, factored = named_engine
    tokens = tokens_for(factored)
    ablated = random_ablated(factored, tokens)
    for mask in torch.cat(
        (random_masks(factored, 2), random_masks(factored, 4, kept=0.15))
    ).double():
        ours = factored.masked(tiny.from_tokens(tokens), mask, ablated)
        theirs = through_hooks(factored, tokens, mask, ablated.writers)
        torch.testing.assert_close(ours, theirs, atol=bound(name), rtol=bound(name))


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "neox",
        "gemma2",
        "olmo2",
        "native, no norm",
        "native, grouped queries",
        "native, attention only",
    ],
)
def test_each_single_edge_equals_the_computation_through_hooks(name):
    factored = Engine(MODELS[name])
    tokens = tokens_for(factored, rows=2, length=5)
    ablated = random_ablated(factored, tokens)
    edges = list(factored.graph.edges())
    masks = torch.ones(len(edges), *factored.graph.exists.shape, dtype=torch.float64)
    for row, (reader, writer) in enumerate(edges):
        masks[row, reader, writer] = 0
    batched = factored.masked(tiny.from_tokens(tokens), masks, ablated)
    clean = factored.clean(tiny.from_tokens(tokens)).logits
    for row in range(0, len(edges), 3):
        theirs = through_hooks(factored, tokens, masks[row], ablated.writers)
        torch.testing.assert_close(batched[row], theirs, atol=bound(name), rtol=bound(name))
        assert not torch.allclose(theirs, clean, atol=1e-6), "this edge shows in no logit"


def test_all_ones_is_the_clean_model(named_engine):
    name, factored = named_engine
    tokens = tokens_for(factored)
    ones = torch.ones(factored.graph.exists.shape)
    logits = factored.masked(tiny.from_tokens(tokens), ones, random_ablated(factored, tokens))
    torch.testing.assert_close(
        logits, factored.clean(tiny.from_tokens(tokens)).logits, atol=bound(name), rtol=bound(name)
    )


def test_all_zeros_is_every_reader_on_ablated_input(named_engine):
    name, factored = named_engine
    tokens = tokens_for(factored)
    ablated = random_ablated(factored, tokens)
    zeros = torch.zeros(factored.graph.exists.shape, dtype=torch.float64)
    biases = sum(
        b.attention.o.bias for b in factored.architecture.blocks if b.attention.o.bias is not None
    )
    final = factored.model.bridge.ln_final.original_component(ablated.writers.sum(0) + biases)
    logits = factored.model.bridge.unembed.original_component(final)
    cap = factored.architecture.logit_cap
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    torch.testing.assert_close(
        factored.masked(tiny.from_tokens(tokens), zeros, ablated),
        logits,
        atol=bound(name),
        rtol=bound(name),
    )


def test_edges_into_what_the_logits_do_not_depend_on_change_nothing(named_engine):
    """Head 0 of the last layer is read by nobody; with Gemma 2 it still enters its layer's
    post-norm.
    """
    name, factored = named_engine
    graph, tokens = factored.graph, tokens_for(factored)
    ablated = random_ablated(factored, tokens)
    with_dead_end = torch.ones(graph.exists.shape)
    with_dead_end[:, graph.writer_index[f"a{graph.n_layers - 1}.h0"]] = 0
    without = with_dead_end.clone()
    without[graph.reader_index[f"a{graph.n_layers - 1}.h0<q>"]] = 0
    grad = with_dead_end.clone().requires_grad_()
    values = [
        factored.masked(tiny.from_tokens(tokens), mask, ablated).detach()
        for mask in (with_dead_end, without, grad)
    ]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], atol=bound(name), rtol=bound(name))


def test_read_writers_are_the_ancestors_of_the_logits(named_engine):
    _, factored = named_engine
    graph = factored.graph
    kept = random_masks(factored, 5, kept=0.2) * graph.exists != 0
    for row, mask in zip(graph.read(kept)[0][..., 0], kept, strict=True):
        assert torch.equal(row, read_by(graph, mask, 1)[:, 0])


# ---- edges per position --------------------------------------------------------------------------


@pytest.fixture(
    params=[
        "gpt2",
        "llama",
        "neox",
        "mistral",
        "gemma2",
        "olmo2",
        "gptj",
        "native, bidirectional",
        "native, grouped queries",
        "native, attention only",
    ]
)
def positional(request) -> tuple[str, Engine]:
    return request.param, Engine(MODELS[request.param], n_positions=7)


def test_masks_per_position_equal_the_computation_through_hooks(positional):
    name, factored = positional
    tokens = tokens_for(factored, length=7)
    ablated = random_ablated(factored, tokens)
    for mask in torch.cat(
        (random_masks(factored, 2), random_masks(factored, 3, kept=0.1))
    ).double():
        ours = factored.masked(tiny.from_tokens(tokens), mask, ablated)
        theirs = through_hooks(factored, tokens, mask, ablated.writers)
        torch.testing.assert_close(ours, theirs, atol=bound(name), rtol=bound(name))


def test_one_mask_for_all_positions_is_the_mask_without_positions(positional):
    name, factored = positional
    plain = Engine(MODELS[name])
    tokens = tokens_for(factored, length=7)
    ablated = random_ablated(factored, tokens, 1, 1)
    masks = random_masks(plain, 3)
    ours = factored.masked(
        tiny.from_tokens(tokens), masks[..., None].expand(-1, -1, -1, 7), ablated
    )
    torch.testing.assert_close(
        ours,
        plain.masked(tiny.from_tokens(tokens), masks, ablated),
        atol=bound(name),
        rtol=bound(name),
    )


def test_masks_per_position_in_batches_by_example_and_with_gradients(positional):
    name, factored = positional
    tokens = tokens_for(factored, length=7)
    masks, scored = random_masks(factored, 3, kept=0.3), torch.tensor([[2, 6], [0, -1], [5, 4]])
    ablated = random_ablated(factored, tokens)
    for grad in (False, True):
        given = masks.clone().requires_grad_(grad)
        batched = factored.masked(
            tiny.from_tokens(tokens, positions=scored), given, ablated
        ).detach()
        single = torch.stack(
            [factored.masked(tiny.from_tokens(tokens), mask, ablated) for mask in masks]
        )
        at = single[:, torch.arange(3)[:, None], scored]
        torch.testing.assert_close(batched, at, atol=bound(name), rtol=bound(name))
        own = factored.masked(
            tiny.from_tokens(tokens, positions=scored), given, ablated, per_example=True
        ).detach()
        torch.testing.assert_close(
            own, at[torch.arange(3), torch.arange(3)], atol=bound(name), rtol=bound(name)
        )


def test_prompts_of_another_length_than_the_edges_positions_are_refused():
    factored = Engine(MODELS["gpt2"], n_positions=7)
    tokens = tokens_for(factored, length=8)
    with pytest.raises(
        ValueError, match="prompts of 8 tokens, but edges are told apart by position .* exactly 7"
    ):
        factored.masked(
            tiny.from_tokens(tokens), random_masks(factored, 1)[0], random_ablated(factored, tokens)
        )
    with pytest.raises(ValueError, match="prompts of 5 tokens, but"):
        key_mask = torch.arange(7) < torch.tensor([7, 5, 7])[:, None]
        ablated = random_ablated(factored, tokens[:, :7])
        factored.masked(
            tiny.from_tokens(tokens[:, :7], key_mask), random_masks(factored, 1)[0], ablated
        )
    with pytest.raises(ValueError, match="writers at 7 positions"):
        factored.masked(
            tiny.from_tokens(tokens[:, :7]),
            random_masks(Engine(MODELS["gpt2"]), 1)[0],
            random_ablated(factored, tokens),
        )


# ---- masks in batches ----------------------------------------------------------------------------


def test_masks_batched_equal_one_at_a_time(named_engine):
    name, factored = named_engine
    tokens = tokens_for(factored)
    for kept in (0.6, 0.1):
        masks = random_masks(factored, 4, kept)
        for ablated in (random_ablated(factored, tokens), random_ablated(factored, tokens, 1, 1)):
            batched = factored.masked(tiny.from_tokens(tokens), masks, ablated)
            single = torch.stack(
                [factored.masked(tiny.from_tokens(tokens), mask, ablated) for mask in masks]
            )
            torch.testing.assert_close(batched, single, atol=bound(name), rtol=bound(name))


def test_one_mask_per_example(named_engine):
    name, factored = named_engine
    tokens = tokens_for(factored)
    masks = random_masks(factored, 3)
    positions = torch.tensor([[2, 8], [0, -1], [5, 4]])
    for ablated in (random_ablated(factored, tokens), random_ablated(factored, tokens, 1)):
        everything = factored.masked(tiny.from_tokens(tokens, positions=positions), masks, ablated)
        own = everything[torch.arange(3), torch.arange(3)]
        for grad in (False, True):
            ours = factored.masked(
                tiny.from_tokens(tokens, positions=positions),
                masks.clone().requires_grad_(grad),
                ablated,
                per_example=True,
            )
            torch.testing.assert_close(ours.detach(), own, atol=bound(name), rtol=bound(name))


def test_suffix_run_from_a_cached_prefix(named_engine):
    name, factored = named_engine
    tokens = tokens_for(factored)
    ablated, clean = random_ablated(factored, tokens), factored.clean(tiny.from_tokens(tokens))
    masks = random_masks(factored, 3)
    masks[:, : factored.graph.first_reader(1)] = 1
    start = Start(1, clean.writers[: factored.graph.first_writer(1)])
    suffix = factored.masked(tiny.from_tokens(tokens), masks, ablated, start=start)
    torch.testing.assert_close(
        suffix,
        factored.masked(tiny.from_tokens(tokens), masks, ablated),
        atol=bound(name),
        rtol=bound(name),
    )


def test_a_run_that_starts_later_refuses_a_mask_that_removes_edges_before(named_engine):
    _, factored = named_engine
    tokens = tokens_for(factored)
    ablated, clean = random_ablated(factored, tokens), factored.clean(tiny.from_tokens(tokens))
    graph = factored.graph
    mask = graph.exists.float()
    mask[graph.first_reader(1) - 1, 0] = 0
    start = Start(1, clean.writers[: graph.first_writer(1)])
    edge = re.escape(graph.edge_name(graph.first_reader(1) - 1, 0))
    with pytest.raises(
        ValueError, match=f"starts at block 1, .* removes edges before it, .*{edge}"
    ):
        factored.masked(tiny.from_tokens(tokens), mask, ablated, start=start)


def test_gradients_in_mask_and_reader_inputs_equal_finite_differences():
    factored = Engine(MODELS["gpt2"])
    tokens = tokens_for(factored, rows=2, length=4)
    ablated = random_ablated(factored, tokens)
    mask = random_masks(factored, 1)[0].double().requires_grad_()
    prefix = factored.embed(tiny.from_tokens(tokens)).detach().clone().requires_grad_()

    def value(mask, prefix):
        return (
            factored.masked(tiny.from_tokens(tokens), mask, ablated, start=Start(0, prefix))[
                :, -1, :3
            ]
            .pow(2)
            .sum()
        )

    assert torch.autograd.gradcheck(value, (mask, prefix), eps=1e-6, atol=1e-4)


def test_gradients_reach_the_weights():
    model = tiny.gpt2()
    factored = Engine(model)
    tokens = tokens_for(factored)
    ablated = random_ablated(factored, tokens)
    mask = torch.ones(factored.graph.exists.shape)
    model.bridge.requires_grad_()
    weight = model.bridge.blocks[0].attn.q.original_component.weight
    ours = torch.autograd.grad(
        factored.masked(tiny.from_tokens(tokens), mask, ablated)[:, -1, 0].sum(), weight
    )[0]
    theirs = torch.autograd.grad(model.bridge(tokens)[:, -1, 0].sum(), weight)[0]
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        weight.mul_(2)
    torch.testing.assert_close(factored.logits(tiny.from_tokens(tokens)), model.bridge(tokens))


def test_gradients_reach_a_single_weight_that_is_trained():
    model = tiny.gpt2()
    factored = Engine(model)
    tokens = tokens_for(factored)
    ablated = random_ablated(factored, tokens)
    weight = model.bridge.blocks[1].mlp.out.original_component.weight.requires_grad_()
    logits = factored.masked(
        tiny.from_tokens(tokens), torch.ones(factored.graph.exists.shape), ablated
    )
    ours = torch.autograd.grad(logits[:, -1, 0].sum(), weight)[0]
    theirs = torch.autograd.grad(model.bridge(tokens)[:, -1, 0].sum(), weight)[0]
    torch.testing.assert_close(ours, theirs)


def test_right_padding_changes_nothing(named_engine):
    name, factored = named_engine
    tokens = tokens_for(factored, rows=2, length=9)
    lengths = torch.tensor([9, 5])
    key_mask = torch.arange(9) < lengths[:, None]
    padded = tokens.where(key_mask, 0)
    ablated = random_ablated(factored, padded, 1, 1)
    mask = random_masks(factored, 1)[0]
    clean, masked = (
        factored.clean(tiny.from_tokens(padded, key_mask)).logits,
        factored.masked(tiny.from_tokens(padded, key_mask), mask, ablated),
    )
    for row, length in enumerate(lengths.tolist()):
        alone = tokens[row : row + 1, :length]
        torch.testing.assert_close(
            clean[row, :length],
            factored.clean(tiny.from_tokens(alone)).logits[0],
            atol=1e-6,
            rtol=1e-6,
        )
        only = factored.masked(tiny.from_tokens(alone), mask, ablated)
        torch.testing.assert_close(masked[row, :length], only[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_what_writers_write_reaches_a_buffer_of_any_strides_or_is_refused(name):
    """Heads are written through `out=` into a view of the buffer, never into a copy of it."""
    engine = Engine(MODELS[name])
    prompts = tiny.from_tokens(tokens_for(engine))
    expected, embedded = engine.writers(prompts), engine.embed(prompts)
    n_inputs = len(embedded)
    strided = expected.new_zeros(*expected.shape, 2)[..., 0]
    residual_stream(engine.architecture, prompts, embedded.sum(0), Record(strided))
    torch.testing.assert_close(strided[n_inputs:], expected[n_inputs:])
    turned = torch.zeros_like(expected).transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        residual_stream(engine.architecture, prompts, embedded.sum(0), Record(turned))


def test_split_input_splits_token_and_position():
    whole, split = Engine(MODELS["gpt2"]), Engine(MODELS["gpt2"], split_input=True)
    tokens = tokens_for(whole)
    assert split.graph.writers[:2] == ("input.token", "input.position")
    torch.testing.assert_close(
        split.embed(tiny.from_tokens(tokens)).sum(0), whole.embed(tiny.from_tokens(tokens))[0]
    )
    torch.testing.assert_close(
        split.clean(tiny.from_tokens(tokens)).logits, whole.clean(tiny.from_tokens(tokens)).logits
    )
    with pytest.raises(ValueError, match="no position embedding"):
        Engine(MODELS["llama"], split_input=True)


def test_reader_gradients_are_the_derivative_of_each_readers_own_input(named_engine):
    name, factored = named_engine
    graph, tokens = factored.graph, tokens_for(factored, rows=2, length=5)
    clean = factored.clean(tiny.from_tokens(tokens))
    differences = torch.randn_like(clean.writers)
    ablated = factored.ablated(clean.writers - differences)
    mask = torch.ones(graph.exists.shape, dtype=torch.float64, requires_grad=True)

    def objective(logits):
        return logits[:, -1, :4].pow(2).sum()

    (by_mask,) = torch.autograd.grad(
        objective(factored.masked(tiny.from_tokens(tokens), mask, ablated)), mask
    )
    ours = torch.zeros_like(by_mask)
    for first, gradients in factored.reader_gradients(
        tiny.from_tokens(tokens), clean.writers[: graph.n_inputs].sum(0), objective
    ):
        upstream = graph.upstream[first]
        ours[first : first + len(gradients), :upstream] = (
            gradients.flatten(1) @ differences[:upstream].flatten(1).T
        )
    scale = by_mask.abs().max()
    torch.testing.assert_close(ours / scale, by_mask / scale, atol=10 * bound(name), rtol=0)


# ---- switching any feature off must be noticed ---------------------------------------------------


@pytest.mark.parametrize(
    ("name", "feature", "mutate"), MUTATIONS, ids=[f"{n}: {f}" for n, f, _ in MUTATIONS]
)
def test_switching_a_feature_off_is_noticed(name, feature, mutate, monkeypatch):
    """At construction, or by the bound that the comparison with the bridge is held to above."""
    monkeypatch.setattr(engine_module, "describe", lambda *arguments: mutate(describe(*arguments)))
    try:
        mutated = Engine(MODELS[name])
    except ValueError as error:
        assert "the engine and" in str(error) and "differ by" in str(error)
    else:
        tokens = MODELS[name].probe_tokens
        difference = (
            (mutated.logits(tiny.from_tokens(tokens)) - MODELS[name].bridge(tokens)).abs().max()
        )
        assert difference > 10 * bound(name)


def test_key_bias_is_read_under_a_mask():
    """A key bias cancels in the softmax of a plain run; with rotary positions it does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            engine_module, "describe", lambda *arguments: no_bias("k")(describe(*arguments))
        )
        with pytest.raises(ValueError, match="differ by"):
            Engine(MODELS["llama"])


# ---- refusals ------------------------------------------------------------------------------------


def test_a_field_that_is_read_and_not_honoured_is_refused_by_name():
    model = tiny.gpt2()
    model.hf_config.add_cross_attention = True
    with pytest.raises(ValueError, match="add_cross_attention"):
        Engine(model)


def test_a_field_nobody_knows_is_refused_by_name():
    model = tiny.llama()
    model.hf_config.quantization_config = {"bits": 4}
    with pytest.raises(ValueError, match="quantization_config"):
        Engine(model)


def test_native_fields_that_the_native_model_ignores_are_refused():
    with pytest.raises(ValueError, match="use_qk_norm"):
        Engine(tiny.native(use_qk_norm=True))


def test_other_architectures_are_refused_by_name():
    model = tiny.gpt2()
    model.bridge.cfg.architecture = "MambaForCausalLM"
    with pytest.raises(ValueError, match="MambaForCausalLM"):
        Engine(model)


def test_inputs_beyond_the_context_and_masks_of_another_graph_are_refused():
    factored = Engine(MODELS["gpt2"])
    with pytest.raises(ValueError, match="17 tokens, but the model's context is 16"):
        factored.clean(tiny.from_tokens(torch.zeros(1, 17, dtype=torch.long)))
    tokens = tokens_for(factored)
    with pytest.raises(ValueError, match="the graph has"):
        factored.masked(
            tiny.from_tokens(tokens), torch.ones(3, 4), random_ablated(factored, tokens)
        )


def test_weights_that_are_not_finite_are_refused():
    module = tiny.gpt2_module()
    with torch.no_grad():
        module.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        from circuits.model.load import from_module

        Engine(from_module(module))
