"""A minibatch is what preparing its prompts by themselves gives, whatever memory held."""

from __future__ import annotations

import pytest
import torch

from circuits.ablation import ABLATIONS, AblationConfig, fit_ablation
from circuits.engine import Engine
from circuits.metrics import METRICS
from circuits.minibatches import minibatch
from circuits.objective import prepare
from tests import tiny
from tests.budget import memory_for

ENGINES = {
    "gpt2": Engine(tiny.gpt2()),
    "gemma2": Engine(tiny.huggingface("gemma2")),
    "bidirectional": Engine(tiny.native(attention_dir="bidirectional")),
}
PROMPTS = tiny.prompts(11, seed=3)
REFERENCE = tiny.prompts(9, seed=4, longest=12)


@pytest.mark.parametrize("rows", [[0, 1, 2], [9, 2, 5], [7, 7, 10, 0], list(range(11))])
@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("name", ENGINES)
def test_a_minibatch_is_its_prompts_prepared(name, ablation, rows):
    engine = ENGINES[name]
    fitted = fit_ablation(AblationConfig(ablation, steps=2), engine, REFERENCE)
    four, one = (int(memory_for(size, engine, PROMPTS, fitted)) for size in (4, 1))
    budgets = "2GB", str(four), str(one // 2 + 1)
    held = [prepare(engine, PROMPTS, METRICS["kl"], fitted, memory=memory) for memory in budgets]
    kept = [len(ours.batches.kept) / len(ours.batches) for ours in held]
    assert kept[0] == 1 and kept[2] == 0
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(engine.graph.exists.shape, generator=generator)
    own = PROMPTS.select(sorted(rows))
    expected = engine.masked(own, mask, fitted.values(engine, own))
    for prepared in held:
        drawn = minibatch(prepared.batches, torch.tensor(rows))
        assert drawn.prompts.ids == own.ids
        scored = own.positions >= 0
        got = engine.masked(drawn.prompts, mask, drawn.ablated)
        for ours, theirs in ((drawn.logits, engine.logits(own)), (got, expected)):
            torch.testing.assert_close(ours[scored], theirs[scored], atol=1e-9, rtol=1e-7)
