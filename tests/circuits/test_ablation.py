"""What removed edges carry: against prompts run one at a time, and in a run with every edge
removed.
"""

from __future__ import annotations

import functools

import pytest
import torch

from circuits.ablation import ABLATIONS, Ablation, AblationConfig, fit_ablation
from circuits.ablation.means import writer_means
from circuits.ablation.runs import mixed
from circuits.engine import Engine
from circuits.engine.memory import footprint
from circuits.prompts import InputError, Prompts, prompts_from_records
from tests import tiny

ENGINES = {
    "gpt2": Engine(tiny.gpt2()),
    "bidirectional": Engine(tiny.native(attention_dir="bidirectional")),
    "split input": Engine(tiny.gpt2(), split_input=True),
}
REFERENCE = tiny.prompts(7, seed=1, longest=12)  # some are longer than any of the prompts
PROMPTS = tiny.prompts(5, seed=2, longest=9)


@pytest.fixture(params=ENGINES)
def engine(request) -> Engine:
    return ENGINES[request.param]


def fitted(engine: Engine, name: str, reference: Prompts = REFERENCE, seed: int = 0) -> Ablation:
    return fit_ablation(AblationConfig(name, seed, steps=2), engine, reference)


def alone(engine: Engine, tokens) -> torch.Tensor:
    """Writers of one prompt that is run by itself, without padding: [W, length, D]."""
    return engine.clean(tiny.from_tokens(torch.tensor([list(tokens)]))).writers[:, 0]


def spread(values: torch.Tensor) -> torch.Tensor:
    """[W, B|1, S|1, D] -> [W, B, S, D]"""
    return values.expand(-1, len(PROMPTS), PROMPTS.clean.shape[1], -1)


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-10)


def everything_removed(engine: Engine, ablation: Ablation) -> torch.Tensor:
    """Logits at the scored positions when no edge is left."""
    empty = torch.zeros(engine.graph.exists.shape)
    values = ablation.values(engine, PROMPTS)
    return engine.masked(PROMPTS, empty, values)


def read_out(engine: Engine, writers: torch.Tensor) -> torch.Tensor:
    """Logits at the scored positions from [W, B, S, D], by the bridge's own final norm and
    unembedding.
    """
    bridge = engine.model.bridge
    biases = sum(block.attention.o.bias for block in engine.architecture.blocks)
    residual = writers.sum(0) + biases
    rows = torch.arange(len(PROMPTS))[:, None]
    normed = bridge.ln_final.original_component(residual[rows, PROMPTS.positions])
    return bridge.unembed.original_component(normed)


def scored(logits: torch.Tensor) -> torch.Tensor:
    return logits[PROMPTS.positions >= 0]


# ---- means ---------------------------------------------------------------------------------------


def test_mean_excludes_padding_and_keeps_the_first_position(engine):
    lengths = REFERENCE.lengths.tolist()
    assert len(set(lengths)) > 2, "no padding to exclude"
    runs = [alone(engine, tokens) for tokens in REFERENCE.sequences()]
    first = torch.stack([run[:, 0] for run in runs]).mean(0)
    rest = torch.cat([run[:, 1:] for run in runs], 1).mean(1)
    expected = torch.stack([first] + [rest] * (PROMPTS.clean.shape[1] - 1), 1)[:, None]
    ablation = fitted(engine, "mean")
    close(spread(ablation.writers(engine, PROMPTS)), spread(expected))
    close(scored(everything_removed(engine, ablation)), scored(read_out(engine, spread(expected))))


def test_positional_mean_is_over_the_prompts_that_reach_a_position(engine):
    runs = [alone(engine, tokens) for tokens in REFERENCE.sequences()]
    expected = torch.stack(
        [
            torch.stack([run[:, position] for run in runs if run.shape[1] > position]).mean(0)
            for position in range(PROMPTS.clean.shape[1])
        ],
        1,
    )[:, None]
    ablation = fitted(engine, "positional_mean")
    close(spread(ablation.writers(engine, PROMPTS)), spread(expected))
    close(scored(everything_removed(engine, ablation)), scored(read_out(engine, spread(expected))))


def test_means_do_not_depend_on_the_batches(engine):
    size = footprint(engine, REFERENCE)
    means = (
        2 * 8 * REFERENCE.clean.shape[1] * size.writers * size.width
    )  # float64, and what it is made of
    whole, small = (
        writer_means(engine, REFERENCE, memory=memory)
        for memory in ("2GB", str(means + 2 * size.clean))
    )
    for field in ("first", "rest", "positional"):
        close(getattr(small, field), getattr(whole, field))
    counts = [
        sum(length > p for length in REFERENCE.lengths.tolist())
        for p in range(int(REFERENCE.lengths.max()))
    ]
    assert small.count.tolist() == whole.count.tolist() == counts


def test_positions_that_the_reference_never_had_are_refused(engine):
    short = tiny.prompts(4, seed=3, shortest=4, longest=5)
    ablation = fitted(engine, "positional_mean", short)
    longest = int(short.lengths.max())
    with pytest.raises(
        ValueError, match=rf"position {PROMPTS.clean.shape[1] - 1}, but .* at most {longest} tokens"
    ):
        ablation.values(engine, PROMPTS)
    ablation.values(engine, short)
    fitted(engine, "mean", short).values(engine, PROMPTS)  # which has a value for every position


def test_a_mean_of_first_positions_alone_is_refused_elsewhere(engine):
    single = prompts_from_records([{"clean": [3]}, {"clean": [4]}])
    ablation = fitted(engine, "mean", single)
    close(
        ablation.writers(engine, single)[:, 0, 0],
        sum(alone(engine, [token])[:, 0] for token in (3, 4)) / 2,
    )
    with pytest.raises(ValueError, match="ablation=mean: .* reference prompts have 1 token"):
        ablation.values(engine, PROMPTS)


# ---- other runs ----------------------------------------------------------------------------------


def test_zero_leaves_the_biases(engine):
    ablation = fitted(engine, "zero")
    assert not ablation.writers(engine, PROMPTS).any()
    nothing = torch.zeros_like(
        engine.clean(tiny.from_tokens(PROMPTS.clean, PROMPTS.key_mask)).writers
    )
    close(scored(everything_removed(engine, ablation)), scored(read_out(engine, nothing)))


def test_counterfactual_is_the_clean_run_of_the_corrupt_prompt(engine):
    ablation = fitted(engine, "counterfactual")
    values = ablation.writers(engine, PROMPTS)
    logits = everything_removed(engine, ablation)
    for row, length in enumerate(PROMPTS.lengths.tolist()):
        corrupt = PROMPTS.corrupt[row, :length]
        close(values[:, row, :length], alone(engine, corrupt.tolist()))
        positions = PROMPTS.positions[row][PROMPTS.positions[row] >= 0]
        expected = engine.model.bridge(corrupt[None])[0, positions]
        close(logits[row, : len(positions)], expected)
    with pytest.raises(
        ValueError, match="ablation=counterfactual needs a corrupt twin for each prompt"
    ):
        ablation.values(engine, prompts_from_records([{"clean": [1, 2, 3]}]))


@functools.cache
def donor_runs(engine: Engine) -> list[torch.Tensor]:
    return [alone(engine, tokens) for tokens in REFERENCE.sequences()]


def donor_of(engine: Engine, values: torch.Tensor, row: int) -> int:
    """The reference prompt whose own run the values of a row are."""
    length = int(PROMPTS.lengths[row])
    matches = [
        number
        for number, run in enumerate(donor_runs(engine))
        if run.shape[1] >= length
        and torch.allclose(values[:, row, :length], run[:, :length], atol=1e-10)
    ]
    assert len(matches) == 1, f"{len(matches)} donors give these values"
    return matches[0]


def test_resampled_values_are_those_of_a_donor_that_is_long_enough(engine):
    ablation = fitted(engine, "resample")
    values = ablation.writers(engine, PROMPTS)
    donors = [donor_of(engine, values, row) for row in range(len(PROMPTS))]
    assert (REFERENCE.lengths[donors] >= PROMPTS.lengths).all()
    assert len(set(donors)) > 1 and REFERENCE.lengths[donors].max() > PROMPTS.lengths.max()
    logits = everything_removed(engine, ablation)
    for row, donor in enumerate(donors):
        positions = PROMPTS.positions[row][PROMPTS.positions[row] >= 0]
        expected = engine.model.bridge(torch.tensor([REFERENCE.sequences()[donor]]))[0, positions]
        close(logits[row, : len(positions)], expected)


def test_the_donor_depends_on_seed_and_tokens_alone(engine):
    by_seed = []
    for seed in range(4):
        ablation = fitted(engine, "resample", seed=seed)
        values = ablation.writers(engine, PROMPTS)
        donors = [donor_of(engine, values, row) for row in range(len(PROMPTS))]
        order = PROMPTS.lengths.argsort()[:3].tolist()  # a narrower batch, in another order
        few = PROMPTS.select(order)
        again = ablation.writers(engine, few)
        for place, row in enumerate(order):
            length = int(PROMPTS.lengths[row])
            close(again[:, place, :length], values[:, row, :length])
        by_seed.append(tuple(donors))
    assert len(set(by_seed)) > 1, "four seeds, one draw"


def test_the_only_donor_that_is_long_enough_is_taken(engine):
    longest = prompts_from_records(
        [{"clean": list(range(9))}, *({"clean": [n, n + 1]} for n in range(5))]
    )
    values = fitted(engine, "resample", longest).writers(engine, PROMPTS)
    assert PROMPTS.lengths.min() > 2
    expected = alone(engine, range(9))
    for row, length in enumerate(PROMPTS.lengths.tolist()):
        close(values[:, row, :length], expected[:, :length])


def test_prompts_longer_than_every_donor_are_refused(engine):
    short = tiny.prompts(4, seed=3, shortest=4, longest=5)
    with pytest.raises(
        ValueError,
        match=rf"a prompt has {int(PROMPTS.lengths.max())} tokens, but the longest donor",
    ):
        fitted(engine, "resample", short).values(engine, PROMPTS)


@pytest.mark.parametrize("name", ABLATIONS)
@pytest.mark.parametrize(
    "lengths", [[2, 5, 5], [2, 5, 7], [1, 1, 1], [7]], ids=lambda lengths: str(lengths)
)
def test_able_are_those_that_have_values_alone(name, lengths):
    engine = ENGINES["gpt2"]
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(29, (2, n), generator=draw).tolist() for n in lengths + [4]]
    records = [{"clean": clean, "corrupt": corrupt} for clean, corrupt in rows]
    reference = prompts_from_records(records[:-1])
    prompts = prompts_from_records([*records, records[0]])  # one of them twice, one new
    ablation = fitted(engine, name, reference)

    def has_values(row: int) -> bool:
        try:
            ablation.writers(engine, prompts.select([row]))
        except InputError:
            return False
        return True

    assert ablation.able(prompts).tolist() == [has_values(row) for row in range(len(prompts))]


@pytest.mark.parametrize("name", ABLATIONS)
def test_with_every_edge_kept_the_ablation_does_not_matter(engine, name):
    values = fitted(engine, name).values(engine, PROMPTS)
    logits = engine.masked(
        tiny.from_tokens(PROMPTS.clean, PROMPTS.key_mask), engine.graph.exists, values
    )
    close(
        logits[PROMPTS.key_mask],
        engine.clean(tiny.from_tokens(PROMPTS.clean, PROMPTS.key_mask)).logits[PROMPTS.key_mask],
    )


def test_an_unknown_ablation_is_refused(engine):
    with pytest.raises(
        ValueError, match="ablation='noise', but the ablations are zero, mean, positional_mean"
    ):
        fitted(engine, "noise")


def test_no_prompt_is_its_own_donor():
    engine = Engine(tiny.gpt2())
    reference = prompts_from_records([{"clean": [row, 1, 2]} for row in range(3)])
    for seed in range(8):
        ablation = fit_ablation(AblationConfig("resample", seed), engine, reference)
        own, drawn = (
            engine.clean(tiny.from_tokens(reference.clean)).writers,
            ablation.writers(engine, reference),
        )
        assert all((own[:, row] - drawn[:, row]).abs().max() > 0.1 for row in range(3))
    with pytest.raises(ValueError, match="no reference prompt but itself"):
        fit_ablation(AblationConfig("resample"), engine, reference.select([0])).writers(
            engine, reference.select([0])
        )


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((0,), 9693246245718318424),
        ((0, 5, 7, 5), 15635164938544746423),
        ((3, 1, 4, 1, 5), 5946272274285246446),
        ((2**31 - 1, 0, 86), 15733558336658596733),
    ],
)
def test_what_seeds_the_draw_is_the_same_under_every_python(numbers, expected, monkeypatch):
    """The numbers are fixed here, and `hash` is not asked."""
    monkeypatch.setattr("circuits.ablation.runs.hash", None, raising=False)
    assert mixed(numbers) == expected


def test_the_donors_are_the_same_under_every_python():
    resample = fitted(ENGINES["gpt2"], "resample", seed=3)
    runs = donor_runs(ENGINES["gpt2"])
    assert len(runs) == len(REFERENCE)
    values = resample.writers(ENGINES["gpt2"], PROMPTS)
    assert [donor_of(ENGINES["gpt2"], values, row) for row in range(len(PROMPTS))] == [
        0,
        4,
        6,
        4,
        1,
    ]
