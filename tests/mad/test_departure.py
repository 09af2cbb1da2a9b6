"""Departures against loops over prompts, nodes, heads and positions of the computation through
hooks.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from circuits.ablation import ABLATIONS, Ablation, AblationConfig, fit_ablation
from circuits.engine import Engine
from circuits.engine.memory import TooLittleMemory, footprint
from circuits.prompts import Prompts, prompts_from_records
from mad.departure import Departure, departure
from tests import tiny
from tests.hooks import read_by, through_hooks

LENGTH = 7  # where edges are told apart by position
# Post-norms, soft-caps and windows (Gemma 2); queries normed together (OLMo 2); grouped queries and
# rotary positions; parallel; all positions read.
MODELS = {
    "gpt2": tiny.gpt2(),
    "gemma2": tiny.huggingface("gemma2"),
    "olmo2": tiny.huggingface("olmo2"),
    "qwen3": tiny.huggingface("qwen3"),
    "neox": tiny.huggingface("neox"),
    "bidirectional": tiny.native(attention_dir="bidirectional"),
    "attention only": tiny.native(attn_only=True),
}
ENGINES = {name: Engine(model) for name, model in MODELS.items()}
ENGINES |= {
    f"{name}, positions": Engine(MODELS[name], n_positions=LENGTH) for name in ("gpt2", "gemma2")
}


@pytest.fixture(params=ENGINES)
def engine(request) -> Engine:
    return ENGINES[request.param]


def prompts(engine: Engine, count: int, seed: int) -> Prompts:
    """With 1 to 3 scored positions each; of different lengths where the engine takes them."""
    same = {} if engine.graph.n_positions is None else {"shortest": LENGTH, "longest": LENGTH}
    return tiny.prompts(count, seed, **same)


def fitted(engine: Engine, name: str = "mean") -> Ablation:
    same = {} if engine.graph.n_positions is None else {"shortest": LENGTH, "longest": LENGTH}
    return fit_ablation(AblationConfig(name), engine, tiny.prompts(12, 9, **same))


def circuit(engine: Engine, kept: float, seed: int = 0) -> Tensor:
    return (
        torch.rand(engine.graph.exists.shape, generator=torch.Generator().manual_seed(seed)) < kept
    ) & (engine.graph.exists)


def log_odds(pattern: Tensor, key: int) -> float:
    """Of a key against all others, from probabilities; 0 where there are no others."""
    others = [share for place, share in enumerate(pattern.tolist()) if place != key]
    return math.log(pattern[key].item() / sum(others)) if sum(others) else 0.0


def slow(engine: Engine, mask: Tensor, ablation: Ablation, prompts: Prompts) -> list[dict]:
    """For each prompt and node what departs, as (squared gap, log-odds gap)."""
    graph, found = engine.graph, []
    for row, ids in enumerate(prompts.sequences()):
        tokens, one = torch.tensor([ids]), prompts.select([row])
        removed = ablation.writers(engine, one)
        model, made, gaps = {}, {}, {}
        through_hooks(engine, tokens, torch.ones(graph.exists.shape), removed, seen=model)
        through_hooks(engine, tokens, mask.double(), removed, seen=made)
        positions = [position for position in one.positions[0].tolist() if position >= 0]
        alive = read_by(graph, mask.double(), len(ids)).any(1)
        for writer, name in enumerate(graph.writers):
            if writer < graph.n_inputs or not alive[writer]:
                continue
            squares, odds = 0.0, 0.0
            for p in positions:
                ours, theirs = model["written"][writer][0, p], made["written"][writer][0, p]
                squares += sum(
                    (a - b) ** 2 for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)
                )
                if name.startswith("a"):
                    layer, head = (int(part) for part in name[1:].split(".h"))
                    ours, theirs = (
                        seen[f"pattern{layer}"][0, head, p].double() for seen in (model, made)
                    )
                    key = int(ours.argmax())
                    odds += log_odds(ours, key) - log_odds(theirs, key)
            gaps[name] = squares / len(positions), odds / len(positions)
        found.append(gaps)
    return found


def equal(ours: Departure, expected: list[dict]) -> None:
    heads = [name for name in expected[0] if name.startswith("a")]
    assert list(ours.node_names) == list(expected[0])
    assert list(ours.head_names) == heads
    nodes = torch.tensor([[gaps[name][0] for name in ours.node_names] for gaps in expected])
    routing = torch.tensor([[gaps[name][1] for name in heads] for gaps in expected])
    for mine, theirs in ((ours.nodes, nodes), (ours.routing, routing)):
        assert theirs.numel() and (theirs.abs() > 1e-3).any(), "nothing departs"
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


def same(ours: Departure, expected: Departure) -> None:
    assert (ours.node_names, ours.head_names) == (expected.node_names, expected.head_names)
    for name in ("routing", "nodes"):
        mine, theirs = getattr(ours, name), getattr(expected, name)
        assert mine.dtype == torch.float32 and mine.device.type == "cpu"
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_departures_are_those_of_a_loop(name):
    engine = ENGINES[name]
    new, means = prompts(engine, 4, 1), fitted(engine)
    mask = circuit(engine, 0.4 if engine.graph.n_positions is None else 0.15)
    found = departure(engine, mask, means, new)
    equal(found, slow(engine, mask, means, new))
    if (
        name == "gemma2"
    ):  # a head that is not alive enters the others' post-norm with its inputs ablated
        assert 0 < sum(head.startswith("a1.") for head in found.head_names) < engine.graph.n_heads


@pytest.mark.parametrize("name", ABLATIONS)
def test_departures_under_every_ablation(name):
    engine = ENGINES["gpt2"]
    new, mask = prompts(engine, 3, 2), circuit(engine, 0.4)
    config = AblationConfig(name, steps=2)
    ablation = fit_ablation(config, engine, tiny.prompts(12, 9, shortest=9))
    equal(departure(engine, mask, ablation, new), slow(engine, mask, ablation, new))


def test_nothing_departs_from_a_complete_circuit(engine):
    found = departure(engine, engine.graph.exists, fitted(engine), prompts(engine, 4, 1))
    assert found.node_names == engine.graph.writers[engine.graph.n_inputs :]
    assert found.head_names == tuple(name for name in found.node_names if name.startswith("a"))
    for values in (found.nodes, found.routing):
        assert values.numel() and values.abs().max() < 1e-4


def test_a_departure_is_handed_on():
    engine = ENGINES["gpt2"]
    graph, mask = engine.graph, engine.graph.exists.clone()
    mask[graph.reader_index["m0"], graph.writer_index["a0.h1"]] = False
    found = departure(engine, mask, fitted(engine), prompts(engine, 4, 1))
    changed = (found.nodes > 1e-6).any(0).tolist()
    departed = [name for name, here in zip(found.node_names, changed, strict=True) if here]
    assert departed == list(graph.writers[graph.writer_index["m0"] :])


def test_nothing_departs_from_a_circuit_without_nodes(engine):
    mask = torch.zeros_like(engine.graph.exists)
    mask[-1, 0] = True
    new = prompts(engine, 3, 1)
    found = departure(engine, mask, fitted(engine), new)
    assert found.routing.shape == found.nodes.shape == (3, 0)
    assert found.head_names == found.node_names == ()


def test_scored_positions_are_averaged(engine):
    lengths = [9, 5] if engine.graph.n_positions is None else [LENGTH, LENGTH]
    draw = torch.Generator().manual_seed(4)
    rows = [torch.randint(29, (length,), generator=draw).tolist() for length in lengths]
    mask, means = circuit(engine, 0.5), fitted(engine)

    def at(positions: list[list[int]]) -> Departure:
        records = [
            {"clean": row, "positions": here} for row, here in zip(rows, positions, strict=True)
        ]
        return departure(engine, mask, means, prompts_from_records(records))

    first, second, third = at([[1], [2]]), at([[3], [2]]), at([[4], [2]])
    together = at([[1, 3, 4], [2]])
    for name in ("routing", "nodes"):
        parts = [getattr(one, name) for one in (first, second, third)]
        torch.testing.assert_close(getattr(together, name), sum(parts) / 3, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(parts[0][0], parts[1][0], atol=1e-3)
        assert torch.allclose(parts[0][1], parts[1][1], atol=1e-5)


def test_padding_and_memory_change_nothing(engine):
    new, means, mask = prompts(engine, 7, 3), fitted(engine), circuit(engine, 0.5)
    together = departure(engine, mask, means, new)
    size = footprint(engine, new)
    enough = size.shared(False) + size.mask + size.observed
    for memory in (enough, enough + 2 * size.observed):
        same(departure(engine, mask, means, new, memory=str(memory)), together)
    alone = [departure(engine, mask, means, new.select([row])) for row in range(7)]
    joined = [torch.cat([getattr(one, name) for one in alone]) for name in ("routing", "nodes")]
    same(Departure(*joined, alone[0].head_names, alone[0].node_names), together)
    with pytest.raises(TooLittleMemory, match=f"one prompt of {new.clean.shape[1]} tokens"):
        departure(engine, mask, means, new, memory=str(enough - 1))


def test_ablated_values_of_each_prompt_take_memory():
    engine = ENGINES["gpt2"]
    new, twins, mask = tiny.prompts(5, 3), fitted(engine, "counterfactual"), circuit(engine, 0.5)
    size = footprint(engine, new)
    enough = size.mask + size.observed + size.prepared(True)
    same(
        departure(engine, mask, twins, new, memory=str(enough)), departure(engine, mask, twins, new)
    )
    with pytest.raises(TooLittleMemory):
        departure(engine, mask, twins, new, memory=str(enough - 1))


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "bidirectional"])
def test_a_head_that_sees_one_key_is_routed_nowhere_else(name):
    engine = ENGINES[name]
    length = engine.graph.n_positions or 6
    new = prompts_from_records([{"clean": [*range(3, length + 3)], "positions": [0]}])
    found = departure(engine, circuit(engine, 0.6), fitted(engine), new)
    assert found.head_names and torch.equal(found.routing, torch.zeros_like(found.routing))
    assert found.nodes.max() > 1e-3, "the node departs all the same"


def test_a_prompt_of_one_token():
    engine = ENGINES["bidirectional"]
    new = prompts_from_records([{"clean": [5]}, {"clean": [5, 6, 7, 8]}])
    found = departure(engine, circuit(engine, 0.6), fitted(engine), new)
    assert torch.equal(found.routing[0], torch.zeros_like(found.routing[0])), (
        "its padding is no key"
    )
    assert found.routing[1].abs().max() > 0.1 and found.nodes.isfinite().all()


def test_other_lengths_are_refused_where_edges_have_positions():
    engine = ENGINES["gpt2, positions"]
    with pytest.raises(ValueError, match="prompts of 5 tokens, but edges .* exactly 7"):
        departure(
            engine, circuit(engine, 0.5), fitted(engine), tiny.prompts(3, 1, shortest=5, longest=5)
        )
