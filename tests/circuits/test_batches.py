"""Work done in batches is the work done at once, whatever a result is made of."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from circuits.batches import in_batches, joined, over_batches
from circuits.engine import Engine
from circuits.engine.memory import TooLittleMemory, footprint
from tests import tiny

ENGINE = Engine(tiny.gpt2())
PROMPTS = tiny.prompts(7, seed=4)


@dataclass(frozen=True)
class Result:
    """Something of each prompt, in a dataclass with a field that is the same for all."""

    logits: torch.Tensor
    lengths: torch.Tensor
    name: str = "result"


def each(size) -> int:
    return size.clean


def memory_for(n_prompts: int) -> str:
    return str(n_prompts * footprint(ENGINE, PROMPTS).clean)


@pytest.mark.parametrize("at_once", [1, 3, 7])
def test_results_of_batches_are_those_of_all_prompts_in_order(at_once):
    def work(batch) -> Result:
        return Result(ENGINE.logits(batch)[:, :1], batch.lengths)

    ours = over_batches(work, ENGINE, PROMPTS, each, memory=memory_for(at_once))
    torch.testing.assert_close(ours.logits, ENGINE.logits(PROMPTS)[:, :1])
    assert torch.equal(ours.lengths, PROMPTS.lengths) and ours.name == "result"


@pytest.mark.parametrize(("shared", "sizes"), [(0, [3, 3, 1]), (1, [2, 2, 2, 1])])
def test_as_many_prompts_at_a_time_as_fit_beside_what_they_share(shared, sizes):
    """`shared` prompts' bytes are taken before any prompt is."""

    def besides(size) -> int:
        return shared * size.clean

    batches = in_batches(ENGINE, PROMPTS, each, memory=memory_for(3), shared=besides)
    assert [len(batch) for batch in batches] == sizes


def test_less_memory_than_one_prompt_takes_is_refused():
    with pytest.raises(TooLittleMemory, match="raise memory, or use shorter prompts"):
        in_batches(ENGINE, PROMPTS, each, memory=str(footprint(ENGINE, PROMPTS).clean - 1))


def test_joined_goes_along_the_first_axis_and_into_dataclasses():
    one, two = torch.ones(2, 3), torch.zeros(1, 3)
    assert torch.equal(joined([one, two]), torch.cat((one, two)))
    both = joined([Result(one, one[:, 0]), Result(two, two[:, 0])])
    assert torch.equal(both.logits, torch.cat((one, two))) and len(both.lengths) == 3
    assert joined(["same", "same"]) == "same"
