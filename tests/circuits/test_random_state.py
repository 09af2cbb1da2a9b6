"""What only looks at prompts, or times work, draws nothing: the caller's random state stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from circuits.batches import joined, over_batches
from circuits.engine import Engine
from circuits.prompts import Prompts
from circuits.prompts.errors import InputError
from circuits.timing import seconds
from tests import tiny

TOKENS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 0]])
LENGTHS = torch.tensor([4, 3])
PROMPTS = Prompts.from_tokens(TOKENS, lengths=LENGTHS)
ENGINE = Engine(tiny.gpt2())


def state() -> tuple:
    """Of torch and numpy; Python's own is drawn from by the checks of types."""
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()


@pytest.fixture(autouse=True)
def nothing_is_drawn():
    before = state()
    yield
    assert state() == before


def test_prompts_from_tokens_are_scored_at_all_real_tokens_or_where_one_says():
    assert PROMPTS.positions.tolist() == [[0, 1, 2, 3], [0, 1, 2, -1]]
    assert PROMPTS.sequences() == [(3, 1, 4, 1), (5, 9, 2)]
    assert PROMPTS.ids == ("prompt 1", "prompt 2") and PROMPTS.answers is None
    last = Prompts.from_tokens(TOKENS, positions=torch.tensor([[3], [3]]))
    assert last.positions.tolist() == [[3], [3]] and last.lengths.tolist() == [4, 4]


def test_values_at_scored_positions_and_their_mean_leave_padding_out():
    values = torch.arange(2 * 2 * 4 * 3.0).view(2, 2, 4, 3)
    positions = torch.tensor([[2, 0], [1, -1]])
    prompts = Prompts.from_tokens(TOKENS, lengths=LENGTHS, positions=positions)
    there = prompts.at_scored(values)
    assert there.shape == (2, 2, 2, 3)
    assert torch.equal(there[:, 0], values[:, 0, [2, 0]])
    assert torch.equal(there[:, 1, 0], values[:, 1, 1])
    means = prompts.mean_over_scored(torch.tensor([[1.0, 3.0], [5.0, 1e9]]))
    assert means.tolist() == [2.0, 5.0]


def test_prompts_of_another_length_than_edges_by_position_are_refused():
    Prompts.from_tokens(TOKENS).check_length(4)
    PROMPTS.check_length(None)
    with pytest.raises(InputError, match="prompts of 3 tokens, but edges are told apart"):
        PROMPTS.check_length(4)


def test_work_in_batches_draws_nothing():
    logits = over_batches(ENGINE.logits, ENGINE, PROMPTS, lambda size: size.plain, memory="1GB")
    torch.testing.assert_close(logits, ENGINE.logits(PROMPTS))
    assert torch.equal(joined([TOKENS, TOKENS]), torch.cat((TOKENS, TOKENS)))


@pytest.mark.parametrize("repeats", [1, 3, 4])
def test_work_is_timed_as_often_as_asked_and_the_median_returned(repeats, monkeypatch):
    clock = iter([0, 5, 10, 11, 20, 22, 30, 39])  # 5, 1, 2 and 9 seconds
    monkeypatch.setattr("circuits.timing.time.perf_counter", lambda: next(clock))
    done = []
    taken = seconds(torch.device("cpu"), lambda: done.append(1), repeats)
    assert len(done) == repeats and taken == {1: 5, 3: 2, 4: 5}[repeats]
