"""What the timing code leaves alone."""

from __future__ import annotations

import pytest
import torch

from mad.benchmark.speed import Shape, time_engine


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_timing_leaves_the_callers_random_state_alone(family):
    shape = Shape("tiny", family, 1, 2, 8, 16, batch=4, positions=5)
    before = torch.random.get_rng_state()
    timings = time_engine(shape)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {timing.shape for timing in timings} == {"tiny"}
    forwards = {timing.work: timing.bridge_forwards for timing in timings}
    assert forwards["bridge forward"] == 1.0 and all(cost > 0 for cost in forwards.values())
