"""What runs show of their nodes, against HuggingFace, TransformerLens and the computation through
hooks.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from circuits.engine import Engine
from circuits.engine.masked import Seen, Start
from circuits.model.attention import attention_scores
from circuits.model.load import LoadedModel
from tests import tiny
from tests.hooks import bound, read_by, through_hooks

NATIVE = (
    "layer norm",
    "bidirectional",
    "attention only",
    "grouped queries",
    "rotary",
    "soft caps",
    "attention scale",
)
EAGER = {"attn_implementation": "eager"}  # without it OPT's bridge shows no patterns
MODELS: dict[str, LoadedModel] = {
    **{name: tiny.huggingface(name, **EAGER) for name in tiny.HUGGINGFACE},
    **{f"native, {name}": tiny.native(**tiny.NATIVE_VARIANTS[name]) for name in NATIVE},
}
POSITIONAL = (
    "gpt2",
    "llama",
    "gemma2",
    "native, bidirectional",
)  # those whose edges are told apart by position too


@pytest.fixture(params=MODELS)
def named(request) -> tuple[str, Engine]:
    return request.param, Engine(MODELS[request.param])


@pytest.fixture(
    params=[(name, None) for name in MODELS] + [(name, 7) for name in POSITIONAL], ids=str
)
def masked(request) -> tuple[str, Engine, Tensor, Tensor]:
    """A model, tokens, and three masks that keep more and more."""
    name, n_positions = request.param
    factored = Engine(MODELS[name], n_positions=n_positions)
    draw = torch.Generator().manual_seed(7)
    shape = (3, *factored.graph.exists.shape)
    soft = torch.rand(shape, generator=draw, dtype=torch.float64)
    share = torch.tensor([0.1, 0.3, 0.6]).view(3, *(1 for _ in factored.graph.exists.shape))
    masks = (torch.rand(shape, generator=draw) < share) * soft
    return name, factored, tokens(3, 7), masks


def tokens(rows: int, length: int, seed: int = 3) -> Tensor:
    return torch.randint(29, (rows, length), generator=torch.Generator().manual_seed(seed))


def noise_like(writers: Tensor, seed: int = 5) -> Tensor:
    return torch.randn(
        writers.shape, dtype=writers.dtype, generator=torch.Generator().manual_seed(seed)
    )


def close(name: str, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=bound(name), rtol=bound(name))


class Notes:
    """What one run showed, by the name of the node; [K, b, S, D] of outputs, [K, b, S, E] of
    queries and keys.
    """

    def __init__(self, factored: Engine, n_masks: int) -> None:
        self.factored, self.n_masks = factored, n_masks
        self.written: dict[str, Tensor] = {}
        self.queries: dict[str, Tensor] = {}
        self.keys: dict[str, Tensor] = {}  # those that each query head reads

    def __call__(self, seen: Seen) -> None:
        names = [self.factored.graph.writers[writer] for writer in seen.writers]
        assert not self.written.keys() & set(names), "a node is shown once"
        self.written |= dict(zip(names, seen.written.clone(), strict=True))
        if seen.queries is None or seen.keys is None:
            assert names == [f"m{seen.layer}"]
            return
        group = len(names) // len(seen.keys) if seen.kv_of_head is None else None
        for row, name in enumerate(names):
            assert name.startswith(f"a{seen.layer}.")
            key = row // group if seen.kv_of_head is None else seen.kv_of_head[row]
            self.queries[name] = seen.queries[row].clone().unflatten(0, (self.n_masks, -1))
            self.keys[name] = seen.keys[key].clone().unflatten(0, (self.n_masks, -1))

    def equal(
        self, name: str, number: int, seen: dict[str, Tensor], rows: slice = slice(None)
    ) -> None:
        """Compares what a mask's run showed of each node with what hooks saw."""
        graph = self.factored.graph
        for node, written in self.written.items():
            close(name, written[number], seen["written"][graph.writer_index[node]][rows])
        for node in self.queries:
            layer, head = (int(part) for part in node[1:].split(".h"))
            close(name, self.queries[node][number], seen[f"q{layer}"][head][rows])
            close(name, self.keys[node][number], seen[f"k{layer}"][head // graph.kv_group][rows])


# ---- patterns of a plain run ---------------------------------------------------------------------


def patterns(
    factored: Engine, tokens: Tensor, at: Tensor, key_mask: Tensor | None = None
) -> list[Tensor]:
    """[heads, B, P, S] of each layer."""
    clean, architecture = (
        factored.clean(tiny.from_tokens(tokens, key_mask, positions=at), sides=True),
        factored.architecture,
    )
    return [
        attention_scores(architecture, block.attention, q, k, key_mask, at=at).softmax(-1)
        for block, (q, k) in zip(architecture.blocks, clean.sides, strict=True)
    ]


AT = torch.tensor([[8, 2], [0, 5], [7, 7]])


@pytest.mark.parametrize("name", tiny.HUGGINGFACE)
def test_patterns_are_huggingfaces(name):
    module = tiny.HUGGINGFACE[name](attn_implementation="eager").double()
    ids, rows = tokens(3, 9), torch.arange(3)[:, None]
    with torch.no_grad():
        attentions = module(ids, output_attentions=True).attentions
    ours = patterns(Engine(MODELS[name]), ids, AT)
    assert len(ours) == len(attentions) == 2
    for layer, theirs in enumerate(attentions):
        theirs = theirs.transpose(0, 1)[
            :, rows, AT
        ].double()  # several take the softmax itself in float32
        torch.testing.assert_close(ours[layer], theirs, atol=2e-6, rtol=2e-5)


def test_patterns_are_those_of_the_bridge(named):
    name, factored = named
    ids, rows = tokens(3, 9), torch.arange(3)[:, None]
    _, cache = factored.model.bridge.run_with_cache(ids)
    ours = patterns(factored, ids, AT)
    assert len(ours) == factored.graph.n_layers
    for layer, pattern in enumerate(ours):
        close(
            name, pattern, cache[f"blocks.{layer}.attn.hook_pattern"].transpose(0, 1)[:, rows, AT]
        )


def test_patterns_of_a_short_prompt_do_not_see_its_padding(named):
    name, factored = named
    ids = tokens(2, 9)
    key_mask = torch.arange(9) < torch.tensor([[9], [5]])
    together = patterns(factored, ids.where(key_mask, 0), torch.tensor([[8, 3], [4, 2]]), key_mask)
    alone = patterns(factored, ids[1:, :5], torch.tensor([[4, 2]]))
    for padded, pattern in zip(together, alone, strict=True):
        assert not padded[:, 1, :, 5:].any()
        torch.testing.assert_close(padded[:, 1:, :, :5], pattern, atol=1e-6, rtol=1e-6)


def test_observing_a_plain_run_changes_nothing(named):
    _, factored = named
    ids = tokens(3, 9)
    with_sides, without = (
        factored.clean(tiny.from_tokens(ids), sides=True),
        factored.clean(tiny.from_tokens(ids)),
    )
    assert torch.equal(with_sides.logits, without.logits) and torch.equal(
        with_sides.writers, without.writers
    )
    assert without.sides == ()


# ---- nodes under masks ---------------------------------------------------------------------------


def test_nodes_under_masks_equal_the_computation_through_hooks(masked):
    name, factored, ids, masks = masked
    clean = factored.clean(tiny.from_tokens(ids)).writers
    ablated = factored.ablated(noise_like(clean))
    for upstream in (None, clean):
        together = Notes(factored, 3)
        logits = factored.masked(
            tiny.from_tokens(ids), masks, ablated, upstream=upstream, observe=together
        )
        assert torch.equal(
            factored.masked(tiny.from_tokens(ids), masks, ablated, upstream=upstream), logits
        ), "observing changes nothing"
        own = Notes(factored, 3)
        by_example = factored.masked(
            tiny.from_tokens(ids), masks, ablated, upstream=upstream, observe=own, per_example=True
        )
        assert (
            together.written.keys() == own.written.keys()
            and together.queries.keys() == own.queries.keys()
        )
        unseen = factored.masked(
            tiny.from_tokens(ids), masks, ablated, upstream=upstream, per_example=True
        )
        assert torch.equal(unseen, by_example)
        for number, mask in enumerate(masks):
            seen: dict[str, Tensor] = {}
            theirs = through_hooks(
                factored, ids, mask, ablated.writers, upstream=upstream, seen=seen
            )
            close(name, logits[number], theirs)
            close(name, by_example[number], theirs[number])
            together.equal(name, number, seen)
            own.equal(name, number, seen, slice(number, number + 1))
            alone = Notes(factored, 1)
            close(
                name,
                factored.masked(
                    tiny.from_tokens(ids), mask, ablated, upstream=upstream, observe=alone
                ),
                theirs,
            )
            alone.equal(name, 0, seen)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_all_readers_are_given_the_writers_of_another_run(name):
    """Its inputs too."""
    factored, (ids, others) = Engine(MODELS[name]), (tokens(2, 6), tokens(2, 6, seed=4))
    other = factored.clean(tiny.from_tokens(others)).writers
    ablated = factored.ablated(noise_like(other))
    mask = torch.rand(
        factored.graph.exists.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    notes, seen = Notes(factored, 1), {}
    logits = factored.masked(tiny.from_tokens(ids), mask, ablated, upstream=other, observe=notes)
    close(
        name, logits, through_hooks(factored, ids, mask, ablated.writers, upstream=other, seen=seen)
    )
    notes.equal(name, 0, seen)


def test_the_nodes_that_are_shown_are_those_that_the_logits_depend_on(named):
    _, factored = named
    ids, graph = tokens(2, 5), factored.graph
    ablated = factored.ablated(noise_like(factored.clean(tiny.from_tokens(ids)).writers))
    draw, sizes = torch.Generator().manual_seed(1), set()
    for _ in range(8):
        mask = (torch.rand(graph.exists.shape, generator=draw) < 0.15).double()
        notes = Notes(factored, 1)
        factored.masked(tiny.from_tokens(ids), mask, ablated, observe=notes)
        alive = [
            node
            for node, here in zip(
                graph.writers, read_by(graph, mask, 1)[:, 0].tolist(), strict=True
            )
            if here
        ]
        assert list(notes.written) == [node for node in alive if not node.startswith("input")]
        assert list(notes.queries) == [node for node in notes.written if node.startswith("a")]
        sizes.add(len(notes.written))
    assert len(sizes) > 2


@pytest.mark.parametrize("name", ["llama", "gemma2", "native, grouped queries"])
@pytest.mark.parametrize("alive", [(3,), (0, 1), (1, 2), (0, 2, 3), (0, 1, 3)])
def test_each_living_head_is_shown_with_the_keys_that_it_reads(name, alive):
    factored = Engine(MODELS[name])
    ids, graph = tokens(2, 5), factored.graph
    ablated = factored.ablated(noise_like(factored.clean(tiny.from_tokens(ids)).writers))
    mask = torch.rand(
        graph.exists.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    mask[-1] = 0
    mask[-1, [graph.writer_index[f"a1.h{head}"] for head in alive]] = 1
    notes, seen = Notes(factored, 1), {}
    factored.masked(tiny.from_tokens(ids), mask, ablated, observe=notes)
    through_hooks(factored, ids, mask, ablated.writers, seen=seen)
    assert [node for node in notes.queries if node.startswith("a1.")] == [
        f"a1.h{head}" for head in alive
    ]
    notes.equal(name, 0, seen)


def test_a_run_that_starts_later_shows_the_nodes_from_there(named):
    name, factored = named
    ids, graph = tokens(2, 7), factored.graph
    clean = factored.clean(tiny.from_tokens(ids)).writers
    ablated = factored.ablated(noise_like(clean))
    mask = torch.rand(
        graph.exists.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    mask[: graph.first_reader(1)] = 1
    for upstream in (None, clean):
        whole, later = Notes(factored, 1), Notes(factored, 1)
        factored.masked(tiny.from_tokens(ids), mask, ablated, observe=whole, upstream=upstream)
        start = Start(1, clean[: graph.first_writer(1)])
        factored.masked(
            tiny.from_tokens(ids), mask, ablated, start=start, observe=later, upstream=upstream
        )
        assert list(later.written) == list(graph.writers[graph.first_writer(1) :])
        for kind in ("written", "queries", "keys"):
            for node, values in getattr(later, kind).items():
                close(name, values, getattr(whole, kind)[node])


def test_with_all_edges_everything_is_as_in_the_clean_run(masked):
    name, factored, ids, _ = masked
    clean, graph = factored.clean(tiny.from_tokens(ids), sides=True), factored.graph
    ablated = factored.ablated(noise_like(clean.writers))
    for upstream in (None, clean.writers):
        notes = Notes(factored, 1)
        ones = torch.ones(graph.exists.shape)
        logits = factored.masked(
            tiny.from_tokens(ids), ones, ablated, upstream=upstream, observe=notes
        )
        close(name, logits, clean.logits)
        assert list(notes.written) == list(graph.writers[graph.n_inputs :])
        assert list(notes.queries) == [node for node in notes.written if node.startswith("a")]
        seen = {"written": clean.writers}
        for layer, (q, k) in enumerate(clean.sides):
            seen |= {f"q{layer}": q, f"k{layer}": k}
        notes.equal(name, 0, seen)


@pytest.mark.parametrize("n_positions", [None, 4])
def test_gradients_of_what_nodes_one_step_from_the_model_do_equal_finite_differences(n_positions):
    factored = Engine(MODELS["gpt2"], n_positions=n_positions)
    ids, graph = tokens(2, 4), factored.graph
    clean = factored.clean(tiny.from_tokens(ids))
    ablated = factored.ablated(noise_like(clean.writers))
    draw = torch.Generator().manual_seed(2)
    mask = torch.rand(graph.exists.shape, generator=draw, dtype=torch.float64).requires_grad_()
    weight = noise_like(clean.writers, 9)

    def value(mask: Tensor) -> Tensor:
        sums = []

        def add(seen: Seen) -> None:
            difference = seen.written[:, 0] - clean.writers[seen.writers]
            sums.append((difference.square() * weight[seen.writers]).sum())
            if seen.queries is not None and seen.keys is not None:
                sums.append(
                    (seen.queries * weight[1, ..., : seen.queries.shape[-1]]).sum()
                    + seen.keys.square().sum()
                )

        logits = factored.masked(
            tiny.from_tokens(ids), mask, ablated, upstream=clean.writers, observe=add
        )
        return logits[..., :3].square().sum() + sum(sums)

    (gradient,) = torch.autograd.grad(value(mask), mask)
    assert (gradient.abs() > 1e-6).equal(graph.exists), "every edge bears on its own reader's node"
    edges = list(graph.edges())
    for number in torch.randint(len(edges), (60,), generator=draw).tolist():
        step = torch.zeros_like(mask)
        step[edges[number]] = 1e-5
        with torch.no_grad():
            difference = (value(mask + step) - value(mask - step)) / 2e-5
        torch.testing.assert_close(gradient[edges[number]], difference, atol=1e-4, rtol=1e-5)
