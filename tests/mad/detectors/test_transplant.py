"""Transplants against one slow run through hooks for each prompt and host."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from circuits.ablation import AblationConfig, fit_ablation
from circuits.batches import joined
from circuits.circuit import Circuit
from circuits.discovery import EAPIG
from circuits.engine import Engine
from circuits.engine.memory import TooLittleMemory, footprint
from circuits.extraction import extract
from circuits.prompts import InputError, Prompts, prompts_from_records
from circuits.selection import Selection, random_circuits
from mad import redrawn
from mad.attribution import explanation_bytes
from mad.detector import Context, Explained, ExplainingDetector
from mad.detectors import DETECTORS, transplant
from mad.detectors.alignment import aligned
from mad.detectors.transplant import (
    Fast,
    Strict,
    fit_transplant,
    model_logits,
    pair_bytes,
    restore_transplant,
)
from tests import tiny
from tests.hooks import through_hooks

LENGTH = 7  # where edges are told apart by position
MODELS = {
    "gpt2": tiny.gpt2(),
    "gemma2": tiny.huggingface("gemma2"),
    "qwen3": tiny.huggingface("qwen3"),
    "bidirectional": tiny.native(attention_dir="bidirectional"),
}
ENGINES = {name: Engine(model) for name, model in MODELS.items()}
ENGINES |= {
    f"{name}, positions": Engine(MODELS[name], n_positions=LENGTH) for name in ("gpt2", "gemma2")
}
ENGINES["split input"] = Engine(MODELS["gpt2"], split_input=True)


@pytest.fixture(params=ENGINES)
def engine(request) -> Engine:
    return ENGINES[request.param]


@pytest.fixture
def context() -> Context:
    return of("gpt2")


def of(name: str) -> Context:
    engine = ENGINES[name]
    return Context(engine, Circuit(engine.graph, circuit(engine), circuit(engine).float()))


def circuit(engine: Engine) -> Tensor:
    (kept,) = random_circuits(engine.graph, engine.graph.n_edges // 3, 1, seed=1)
    return kept


def some(
    engine: Engine, lengths: list[int], seed: int, n_scored: list[int] | None = None
) -> Prompts:
    """Random prompts of these lengths, where edges have no position, with so many scored positions
    each.
    """
    draw = torch.Generator().manual_seed(seed)
    records = []
    for row, length in enumerate(lengths):
        length = engine.graph.n_positions or length
        count = min((n_scored or [1, 2])[row % len(n_scored or [1, 2])], length)
        positions = torch.randperm(length, generator=draw)[:count].tolist()
        if engine.graph.n_positions is not None and length - 1 not in positions:
            positions[-1] = length - 1  # where edges have places, so has what is scored
        records.append(
            {"clean": torch.randint(29, (length,), generator=draw).tolist(), "positions": positions}
        )
    return prompts_from_records(records)


def hosts_of(engine: Engine) -> Prompts:
    """The longest first, those with most scored positions first and last."""
    return some(engine, [9, 4, 6, 1, 8], 0, [2, 1, 1, 1, 2])


def prompts_of(engine: Engine) -> Prompts:
    return some(engine, [5, 9, 1, 2, 7], 10)


def transplanted(engine: Engine, mask: Tensor, *given, **named) -> Tensor:
    """With a single circuit, [B, K]."""
    return transplant.transplanted(engine, mask[None].float(), *given, **named)[0]


def explain(detector: ExplainingDetector, prompts: Prompts, **named) -> Explained:
    """All explanations together."""
    return joined(list(detector.explain(prompts, **named)))


def kl(model: Tensor, other: Tensor) -> float:
    p, q = model.double().softmax(-1).tolist(), other.double().softmax(-1).tolist()
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


@cache
def everything(engine: Engine, tokens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Logits of a prompt [S, V], and what every writer writes on it [W, S, D]."""
    ids, ones, seen = torch.tensor([tokens]), torch.ones(engine.graph.exists.shape), {}
    nothing = torch.zeros(
        len(engine.graph.writers), 1, 1, engine.architecture.width, dtype=torch.float64
    )
    logits = through_hooks(engine, ids, ones, nothing, seen=seen)
    return logits[0], seen["written"][:, 0]


def place(position: int, host: int, donor: int) -> int:
    """The position of a prompt of `donor` tokens that stands where `position` of `host` tokens
    does.
    """
    if position == 0 or donor == 1:
        return 0
    return min(max(donor - (host - position), 1), donor - 1)


def slow(engine: Engine, mask: Tensor, hosts: Prompts, prompts: Prompts) -> Tensor:
    """Prompts up to their last scored position, where that makes no difference to what is before;
    the others whole.
    """
    result = torch.zeros(len(prompts), len(hosts))
    for row, tokens in enumerate(prompts.sequences()):
        end = int(prompts.positions[row].max()) + 1
        tokens = tokens[:end] if engine.graph.causal else tokens
        _, writers = everything(engine, tokens)
        for column, host in enumerate(hosts.sequences()):
            model, _ = everything(engine, host)
            host_end = int(hosts.positions[column].max()) + 1 + len(tokens) - end
            places = [place(position, host_end, len(tokens)) for position in range(len(host))]
            given = torch.stack([writers[:, there] for there in places], 1)[:, None]  # [W, 1, T, D]
            made = through_hooks(engine, torch.tensor([host]), mask.double(), given)[0]
            scored = [position for position in hosts.positions[column].tolist() if position >= 0]
            result[row, column] = sum(kl(model[p], made[p]) for p in scored) / len(scored)
    return result


COSTS = {"masked": lambda size: size.masked(), "explanation": explanation_bytes}


def budget(
    engine: Engine, hosts: Prompts, prompts: Prompts, pairs: int, work: str = "masked"
) -> str:
    """The least memory for so many pairs at once."""
    each, shared = pair_bytes(engine, hosts, prompts, COSTS[work])
    return str(shared + pairs * each)


# ---- scores --------------------------------------------------------------------------------------


def test_transplants_are_slow_runs_of_the_hosts(engine):
    hosts, new, mask = hosts_of(engine), prompts_of(engine), circuit(engine)
    expected = slow(engine, mask, hosts, new)
    assert expected.std() > 1e-2
    found = transplanted(engine, mask, hosts, new)
    assert found.dtype == torch.float32 and found.device.type == "cpu"
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    others = torch.stack([mask, engine.graph.exists, torch.zeros_like(mask)]).float()
    several = transplant.transplanted(engine, others, hosts, new)
    assert several.shape == (3, 5, 5) and several[1].abs().max() < 1e-6
    torch.testing.assert_close(several[0], found)
    torch.testing.assert_close(several[2], transplanted(engine, others[2], hosts, new))
    references = [everything(engine, host)[0] for host in hosts.sequences()]
    known = torch.stack(
        [logits[row] for logits, row in zip(references, hosts.positions, strict=True)]
    )
    torch.testing.assert_close(
        transplanted(engine, mask, hosts, new, known), expected, atol=2e-5, rtol=1e-4
    )


def test_the_score_is_the_mean_over_the_first_trusted_prompts(context):
    trusted, new, engine = hosts_of(context.engine), prompts_of(context.engine), context.engine
    expected = slow(engine, circuit(engine), trusted, new)
    for config, count in ((Fast(hosts=4), 4), (Strict(hosts=5, circuits=1), 5), (Fast(hosts=1), 1)):
        score = fit_transplant(config, context, trusted).score(new)
        torch.testing.assert_close(score, expected[:, :count].mean(1), atol=2e-5, rtol=1e-4)
        assert score.dtype == torch.float32 and score.device.type == "cpu"


def test_trusted_prompts_with_twins_and_answers_score_the_same(context):
    trusted = tiny.prompts(3, 1)
    bare = prompts_from_records(
        [{key: record[key] for key in ("clean", "positions")} for record in tiny.records(3, 1)]
    )
    one, other = (fit_transplant(Fast(hosts=3), context, given) for given in (trusted, bare))
    assert torch.equal(
        one.score(prompts_of(context.engine)), other.score(prompts_of(context.engine))
    )


def test_a_prompt_transplanted_into_itself_changes_nothing(engine):
    hosts = hosts_of(engine)
    found = transplanted(engine, circuit(engine), hosts, hosts)
    assert found.diagonal().abs().max() < 1e-6
    assert (found > 1e-3).sum() >= 15, "another prompt hardly ever changes nothing"


def test_nothing_is_put_in_through_a_complete_circuit(engine):
    found = transplanted(engine, engine.graph.exists, hosts_of(engine), prompts_of(engine))
    assert found.abs().max() < 1e-6


@pytest.mark.parametrize("n_scored", [(1, 1), (2, 1), (2, 2)])
def test_hosts_with_one_and_with_two_scored_positions(context, n_scored):
    engine, mask = context.engine, circuit(context.engine)
    hosts, new = (
        some(engine, lengths, seed, [count])
        for lengths, seed, count in zip([[6, 8, 5], [7, 6, 4]], (3, 4), n_scored)
    )
    torch.testing.assert_close(
        transplanted(engine, mask, hosts, new), slow(engine, mask, hosts, new), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("config", [Fast(hosts=3), Strict(hosts=3, circuits=1)], ids=str)
def test_scored_at_a_position_a_prompt_has_the_score_of_what_it_is_up_to_there(context, config):
    trusted = prompts_from_records(
        [{"clean": record["clean"]} for record in tiny.records(3, 1, shortest=5, longest=9)]
    )
    detector, record = fit_transplant(config, context, trusted), tiny.records(1, 2, shortest=9)[0]
    places = range(len(record["clean"]))
    inside = [{"clean": record["clean"], "positions": [place]} for place in places]
    cut = [{"clean": record["clean"][: place + 1]} for place in places]
    found, expected = (prompts_from_records(records) for records in (inside, cut))
    scores = detector.score(found)
    assert len({round(score, 4) for score in scores.tolist()}) > 5
    torch.testing.assert_close(scores, detector.score(expected), atol=1e-6, rtol=1e-5)
    ours, theirs = explain(detector, found), explain(detector, expected)
    torch.testing.assert_close(ours.shares, theirs.shares, atol=1e-4, rtol=1e-3)


def test_positions_that_hosts_cannot_honour_are_refused(context):
    engine = context.engine
    one = fit_transplant(Fast(hosts=3), context, some(engine, [6, 8, 5], 3, [1]))
    several = some(engine, [7, 6], 4, [1, 2])
    for work in (one.score, partial(explain, one)):
        with pytest.raises(InputError, match="positions names several tokens, but .* at one each"):
            work(several)
    placed = of("gpt2, positions")
    detector = fit_transplant(Fast(), placed, hosts_of(placed.engine))
    elsewhere = prompts_from_records([{"clean": [1] * LENGTH, "positions": [3]}])
    with pytest.raises(InputError, match=r"positions ends at 3, but .* end at \[6\]; score there"):
        detector.score(elsewhere)


def test_scores_are_the_same_each_time(context):
    trusted, new = hosts_of(context.engine), prompts_of(context.engine)
    scores = [fit_transplant(Fast(), context, trusted).score(new) for _ in range(2)]
    assert torch.equal(*scores)


# ---- places --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("donor", "host", "places"),
    [
        (4, 4, [0, 1, 2, 3]),
        (6, 4, [0, 3, 4, 5]),
        (4, 6, [0, 1, 1, 1, 2, 3]),
        (2, 5, [0, 1, 1, 1, 1]),
        (5, 2, [0, 4]),
        (1, 4, [0, 0, 0, 0]),
        (4, 1, [0]),
        (1, 1, [0]),
    ],
)
def test_ends_are_aligned_and_first_tokens_are(donor, host, places):
    found = aligned(torch.tensor([donor]), torch.tensor([[donor - host]]), host)
    assert found.shape == (1, 1, host) and found.flatten().tolist() == places
    assert [place(position, host, donor) for position in range(host)] == places


def test_prompts_and_hosts_of_all_lengths_are_aligned_at_once():
    lengths, hosts = torch.tensor([5, 1, 3, 9]), torch.tensor([4, 9, 1, 5, 3])
    found = aligned(lengths, lengths[:, None] - hosts, 9)
    assert found.shape == (4, 5, 9)
    for row, donor in enumerate(lengths.tolist()):
        for column, host in enumerate(hosts.tolist()):
            for position in range(host):
                assert found[row, column, position] == place(position, host, donor)


def test_what_a_prompt_gives_is_one_row_for_all_hosts_where_it_can_be(monkeypatch):
    engine, real, rows = ENGINES["gpt2"], Engine.ablated, []

    def noting(self, writers, place):
        rows.append((writers.shape[1], len(place.rows)))
        return real(self, writers, place)

    monkeypatch.setattr(Engine, "ablated", noting)
    for hosts, new in (([6, 6, 6], [6]), ([6, 5, 6], [6]), ([6, 6, 6], [6, 4]), ([6, 6], [5])):
        prompts = [
            prompts_from_records([{"clean": list(range(length))} for length in lengths])
            for lengths in (hosts, new)
        ]
        transplanted(engine, circuit(engine), *prompts)
    assert rows == [(1, 1), (1, 3), (2, 6), (1, 1)]


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bidirectional", "gpt2, positions"])
def test_few_pairs_at_once_are_as_good_as_many(name):
    """With fewer pairs than hosts they are run in parts, some of them shorter and with fewer scored
    positions.
    """
    engine = ENGINES[name]
    hosts, new, mask = hosts_of(engine), prompts_of(engine), circuit(engine)
    expected = transplanted(engine, mask, hosts, new)
    for pairs in (1, 2, 3, 11):
        found = transplanted(engine, mask, hosts, new, memory=budget(engine, hosts, new, pairs))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_only_as_many_pairs_as_fit_are_run_at_once(context, monkeypatch):
    engine = context.engine
    hosts, new, mask = hosts_of(engine), prompts_of(engine), circuit(engine)
    reference = model_logits(engine, hosts)
    real, sizes = Engine.masked, []

    def counting(self, tokens, *rest, **named):
        sizes.append(len(tokens))
        return real(self, tokens, *rest, **named)

    monkeypatch.setattr(Engine, "masked", counting)
    for pairs, expected in ((2, 5 * [2, 2, 1]), (5, 5 * [5]), (10, [10, 10, 5]), (100, [25])):
        sizes.clear()
        transplanted(engine, mask, hosts, new, reference, memory=budget(engine, hosts, new, pairs))
        assert sizes == expected


def test_memory_for_no_pair_is_refused(context):
    engine = context.engine
    hosts, new = hosts_of(engine), prompts_of(engine)
    detector = fit_transplant(Strict(hosts=5, circuits=1), context, hosts)
    few = budget(engine, hosts, new, 1)
    for score in (
        detector.score,
        lambda new, memory: transplanted(engine, circuit(engine), hosts, new, memory=memory),
    ):
        score(new, memory=few)
        with pytest.raises(TooLittleMemory, match="one prompt of 9 tokens"):
            score(new, memory=str(int(few) - 1))
    with pytest.raises(TooLittleMemory):
        fit_transplant(Strict(hosts=5, circuits=1), context, hosts, memory="1kB")
    with pytest.raises(TooLittleMemory):
        restore_transplant(detector.config, context, detector.state(), memory="1kB")


def test_logits_of_the_model_at_scored_positions(engine):
    hosts = hosts_of(engine)
    plain = footprint(engine, hosts).plain
    for memory in (str(plain), str(2 * plain), "2GB"):
        logits = model_logits(engine, hosts, memory=memory)
        assert logits.shape == (5, 2, 29)
        for row, (host, positions) in enumerate(
            zip(hosts.sequences(), hosts.positions.tolist(), strict=True)
        ):
            scored = [position for position in positions if position >= 0]
            alone = everything(engine, host)[0][scored]
            torch.testing.assert_close(logits[row, : len(scored)], alone, atol=2e-5, rtol=2e-5)


# ---- explanations --------------------------------------------------------------------------------


def fixed(name: str, steps: int, hosts: int = 3):
    context = of(name)
    return fit_transplant(
        Fast(hosts=hosts, explain_steps=steps), context, some(context.engine, [8, 4, 6], 0)
    )


@pytest.mark.parametrize("name", ["gpt2", "gpt2, positions", "gemma2"])
def test_shares_sum_to_the_score_and_are_of_edges_off_the_circuit(name):
    detector = fixed(name, 200 if name == "gemma2" else 100, hosts=2)
    new = some(detector.engine, [7, 3], 11)
    assert detector.score(new).min() > 1e-2
    explained = explain(detector, new)
    assert isinstance(detector, ExplainingDetector)
    assert explained.shares.shape == (2, *detector.engine.graph.exists.shape)
    kept, exists = detector.circuit.mask != 0, detector.engine.graph.exists
    assert (explained.shares[:, kept | ~exists] == 0).all() and (
        explained.shares[:, exists & ~kept] != 0
    ).any()
    torch.testing.assert_close(
        explained.residual, 1 - explained.shares.flatten(1).sum(1), atol=1e-6, rtol=0
    )
    assert explained.residual.abs().max() < 0.05


@pytest.mark.parametrize("steps", [1, 4])
def test_shares_are_integrals_of_single_gradients_by_finite_differences(context, steps):
    """Derivatives along an edge, of each host at its own points: 1/6, 1/2, 5/6 of each part."""
    engine, detector = context.engine, fixed("gpt2", steps)
    new, mask = some(engine, [7], 11), circuit(engine)
    off, per_host = engine.graph.exists & ~mask, 1 if steps == 1 else 2
    shares, score = (
        explain(detector, new).shares[0],
        slow(engine, mask, detector.hosts, new).mean().item(),
    )

    def moved(nudge: Tensor) -> float:
        total = 0.0
        for host in range(3):
            for point in range(per_host):
                at = mask + (point + (1 + 2 * host) / 6) / per_host * off.double() + nudge
                total += slow(engine, at, detector.hosts.select([host]), new).item()
        return total / 3 / per_host

    largest = sorted(off.nonzero().tolist(), key=lambda edge: -shares[tuple(edge)].abs().item())
    for edge in [*largest[:2], largest[20]]:
        step = torch.zeros(off.shape, dtype=torch.float64)
        step[tuple(edge)] = 1e-3
        expected = -(moved(step) - moved(-step)) / 2e-3 / score
        assert shares[tuple(edge)].item() == pytest.approx(expected, rel=1e-2, abs=1e-4)
        assert abs(expected) > 1e-3


def test_explaining_one_prompt_equals_explaining_it_among_others():
    detector = fixed("gpt2", 3)
    several = some(detector.engine, [8, 1, 5, 6], 12)
    together = explain(detector, several)
    alone = [explain(detector, several.select([row])) for row in range(4)]
    torch.testing.assert_close(
        together.shares, torch.cat([one.shares for one in alone]), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        together.residual, torch.cat([one.residual for one in alone]), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("pairs", [1, 2, 4, 7])
@pytest.mark.parametrize("name", ["gpt2", "gpt2, positions"])
def test_explanations_do_not_depend_on_the_memory(name, pairs):
    detector = fixed(name, 3)
    new = some(detector.engine, [8, 1, 5], 12)
    few = budget(detector.engine, detector.hosts, new, pairs, "explanation")
    ours, expected = explain(detector, new, memory=few), explain(detector, new)
    torch.testing.assert_close(ours.shares, expected.shares, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.residual, expected.residual, atol=1e-5, rtol=1e-4)
    if pairs == 1:
        with pytest.raises(TooLittleMemory):
            explain(detector, new, memory=str(int(few) - 1))


def test_an_explanation_takes_a_pass_of_each_host_and_no_score_that_is_known(context, monkeypatch):
    """Counted in rows: 5 of a score; then 5 for rounding, and 5 that are differentiated."""
    engine, real, rows = context.engine, Engine.masked, []
    detector, new = fit_transplant(Fast(hosts=5), context, hosts_of(engine)), some(engine, [7], 11)

    def counting(self, prompts, mask, *rest, **named):
        rows.append((len(prompts), mask.requires_grad))
        return real(self, prompts, mask, *rest, **named)

    monkeypatch.setattr(Engine, "masked", counting)
    scores = detector.score(new)
    assert rows == [(5, False)]
    for steps, passes in ((1, 1), (5, 1), (6, 2), (16, 4)):
        rows.clear()
        asked = replace(detector, config=Fast(hosts=5, explain_steps=steps))
        known = joined(list(asked.explain(new, scores=scores)))
        assert rows == [(5, False)] + passes * [(5, True)]
        assert torch.equal(known.shares, explain(asked, new).shares)


def test_with_few_points_the_largest_shares_are_those_of_many():
    many, few = (fixed("gpt2", steps) for steps in (300, 16))
    new = some(many.engine, [7, 3, 9], 11)
    exact, cheap = explain(many, new).shares.flatten(1), explain(few, new).shares.flatten(1)
    assert torch.cosine_similarity(exact, cheap).min() > 0.99
    assert torch.equal(exact.abs().argmax(1), cheap.abs().argmax(1))


def test_a_score_of_nothing_has_no_shares(context):
    engine = context.engine
    detector = fit_transplant(Fast(), context, hosts_of(engine))
    detector = replace(detector, masks=engine.graph.exists.to(detector.masks)[None])
    explained = explain(detector, prompts_of(engine))
    assert not explained.shares.any() and explained.residual.isfinite().all()


def test_noise_is_the_score_with_every_edge_kept(context):
    engine, new = context.engine, prompts_of(context.engine)
    detector = fit_transplant(Fast(hosts=3), context, hosts_of(engine))
    least = torch.finfo(torch.float64 if engine.dtype == torch.float64 else torch.float32).eps
    moved = transplanted(engine, engine.graph.exists, detector.hosts, new)
    assert moved.abs().max() < 1e-5, "0 but for rounding"
    slow = moved.abs().mean(1)
    noise = detector.noise(new)
    torch.testing.assert_close(noise, slow.clamp(min=least), atol=least, rtol=0)
    assert (noise < 1e-3 * detector.score(new)).all()
    assert torch.equal(explain(detector, new).noise, noise.float())


# ---- several circuits ----------------------------------------------------------------------------


def with_circuits(detector, count: int):
    """A detector with random circuits beside its own."""
    more = random_circuits(
        detector.engine.graph, detector.engine.graph.n_edges // 2, count - 1, seed=2
    )
    return replace(
        detector, masks=torch.stack([detector.circuit.mask, *(mask.float() for mask in more)])
    )


def test_scores_and_shares_are_means_over_circuits():
    detector = with_circuits(fixed("gpt2", 4), 3)
    new = some(detector.engine, [7, 3, 9], 11)
    alone = [replace(detector, masks=mask[None]) for mask in detector.masks]
    scores = torch.stack([one.score(new) for one in alone])
    assert scores.std(0).min() > 1e-3
    torch.testing.assert_close(detector.score(new), scores.mean(0))
    explained = [explain(one, new) for one in alone]
    parts = torch.stack(
        [one.shares * score[:, None, None] for one, score in zip(explained, scores, strict=True)]
    )
    expected = parts.mean(0) / scores.mean(0)[:, None, None]
    torch.testing.assert_close(explain(detector, new).shares, expected, atol=1e-5, rtol=1e-4)
    few = budget(detector.engine, detector.hosts, new, 2, "explanation")
    torch.testing.assert_close(
        explain(detector, new, memory=few).shares, expected, atol=1e-5, rtol=1e-4
    )


@pytest.fixture(scope="module")
def extracted() -> Context:
    engine = ENGINES["gpt2"]
    discovery, evaluation = tiny.prompts(6, 21, longest=7), tiny.prompts(4, 22, longest=7)
    found = extract(
        engine,
        discovery,
        evaluation,
        EAPIG(steps=2),
        metric="kl",
        ablation=AblationConfig("mean"),
        selection=Selection(edges=20),
        random_draws=0,
    )
    return Context(engine, found.circuit)


def test_further_circuits_are_those_that_its_method_finds_on_redrawn_prompts(
    extracted, monkeypatch
):
    trusted, real, given = tiny.prompts(20, 23), redrawn.rediscover, []

    def noting(circuit, engine, prompts, **named):
        given.append(prompts)
        return real(circuit, engine, prompts, **named)

    monkeypatch.setattr(redrawn, "rediscover", noting)
    config = Strict(hosts=4, circuits=3)
    detector = fit_transplant(config, extracted, trusted)
    assert len(given) == 2 and detector.masks.shape == (3, *extracted.engine.graph.exists.shape)
    assert torch.equal(detector.masks[0], extracted.circuit.mask)
    for prompts, mask in zip(given, detector.masks[1:], strict=True):
        assert len(prompts) == 6, "as many as the first was found on"
        assert set(prompts.ids) <= set(trusted.ids[4:]), "not the hosts"
        again = extract(
            extracted.engine,
            prompts,
            tiny.prompts(4, 22, longest=7),
            EAPIG(steps=2),
            metric="kl",
            ablation=AblationConfig("mean"),
            selection=Selection(edges=20),
            random_draws=0,
        )
        assert torch.equal(again.circuit.mask, mask)
    assert given[0].ids != given[1].ids and not torch.equal(detector.masks[1], detector.masks[2])
    new = tiny.prompts(3, 24)
    assert torch.equal(detector.score(new), fit_transplant(config, extracted, trusted).score(new))
    assert not torch.equal(
        detector.score(new), fit_transplant(Fast(hosts=4), extracted, trusted).score(new)
    )
    assert torch.equal(
        detector.hosts.clean, fit_transplant(Fast(hosts=4), extracted, trusted).hosts.clean
    )


def test_circuits_that_cannot_be_found_again_are_refused(extracted, context):
    trusted = tiny.prompts(5, 23)
    message = (
        "circuits=2 and hosts=4 need at least 6 trusted prompts to fit on, but there are 5; "
        "give more, or lower"
    )
    with pytest.raises(ValueError, match=message):
        fit_transplant(Strict(hosts=4, circuits=2), extracted, trusted)
    with pytest.raises(ValueError, match="the circuit does not say by which method it was found"):
        fit_transplant(Strict(hosts=2, circuits=2), context, trusted)


# ---- saved, and refused --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gemma2, positions"])
def test_a_restored_detector_scores_and_explains_the_same(name):
    context, one = of(name), fixed(name, 2)
    for detector in (one, with_circuits(one, 3)):
        state = {key: value.clone() for key, value in detector.state().items()}
        config = replace(detector.config, circuits=1 + len(state.get("masks", ())))
        again = restore_transplant(config, context, state)
        new = some(context.engine, [7, 3, 9], 11)
        assert torch.equal(detector.score(new), again.score(new))
        assert torch.equal(explain(detector, new).shares, explain(again, new).shares)
        assert all(map(torch.equal, detector.state().values(), again.state().values()))


def test_fast_and_strict_differ_in_their_hosts_and_circuits_alone(context):
    for kind in (DETECTORS["fast"], DETECTORS["strict"]):
        assert (kind.fit, kind.restore) == (fit_transplant, restore_transplant)
    fast, strict = DETECTORS["fast"].schema, DETECTORS["strict"].schema
    settings = [
        {
            name: value
            for name, value in asdict(config()).items()
            if name not in ("name", "hosts", "circuits")
        }
        for config in (fast, strict)
    ]
    assert settings[0] == settings[1] != {}
    assert (fast().name, strict().name) == ("fast", "strict")
    assert fast().hosts == strict().hosts and fast().circuits < strict().circuits
    new, trusted = prompts_of(context.engine), hosts_of(context.engine)
    one, other = (
        fit_transplant(config(hosts=3, circuits=1), context, trusted) for config in (fast, strict)
    )
    assert torch.equal(one.score(new), other.score(new))
    assert torch.equal(explain(one, new).shares, explain(other, new).shares)


@pytest.mark.parametrize("config", [Fast, Strict])
def test_settings_out_of_range_and_too_few_trusted_prompts_are_refused(context, config):
    trusted = hosts_of(context.engine)
    for setting in ("hosts", "circuits", "explain_steps"):
        for value in (0, -3):
            with pytest.raises(ValueError, match=f"{setting}={value}, but at least 1 is needed"):
                config(**{setting: value}).check()
            with pytest.raises(ValueError, match=f"{setting}={value}, but at least 1"):
                fit_transplant(config(**{setting: value}), context, trusted)
        config(**{setting: 1}).check()  # the bound itself
    with pytest.raises(ValueError, match="hosts=4 need at least 6 trusted prompts.*there are 5;"):
        fit_transplant(config(hosts=4, circuits=2), context, trusted)
    with pytest.raises(ValueError, match="need at least 1 trusted prompts"):
        fit_transplant(config(circuits=1), context, trusted.select(slice(0)))
    with pytest.raises(ValueError, match=f"detector {config.name} .*run `madcap extract` first"):
        fit_transplant(config(hosts=2, circuits=1), Context(context.engine), trusted)


def test_all_trusted_prompts_are_hosts_where_there_are_too_few(context, caplog):
    trusted, new = hosts_of(context.engine), prompts_of(context.engine)
    detector = fit_transplant(Fast(), context, trusted)
    assert "hosts=16, but there are 5 trusted prompts" in caplog.text
    assert detector.config == Fast(hosts=5), "what is saved says so"
    assert torch.equal(
        detector.score(new), fit_transplant(Fast(hosts=5), context, trusted).score(new)
    )


def test_other_lengths_are_refused_where_edges_have_positions():
    context = of("gpt2, positions")
    detector = fit_transplant(Fast(), context, hosts_of(context.engine))
    other = tiny.prompts(3, 1, shortest=5, longest=6)
    for work in (detector.score, partial(explain, detector)):
        with pytest.raises(
            ValueError,
            match="prompts of 5 tokens, but edges are told apart by position .* exactly 7",
        ):
            work(other)
    with pytest.raises(ValueError, match="exactly 7"):
        fit_transplant(Fast(hosts=3), context, other).score(hosts_of(context.engine))


def test_a_transplant_is_the_counterfactual_ablation_of_the_host(context):
    """Where both are of one length: the same run as with the prompt as the host's corrupt twin."""
    engine, mask = context.engine, circuit(context.engine)
    records = [
        {"clean": host, "corrupt": given, "positions": [4]}
        for host, given in zip(
            *torch.randint(29, (2, 3, 5), generator=torch.Generator().manual_seed(0)).tolist()
        )
    ]
    twins = prompts_from_records(records)
    ablated = fit_ablation(AblationConfig("counterfactual"), engine, twins).values(engine, twins)
    made = engine.masked(tiny.from_tokens(twins.clean), mask, ablated)[:, 4]
    expected = [
        kl(engine.logits(tiny.from_tokens(twins.clean))[row, 4], made[row]) for row in range(3)
    ]
    donors = prompts_from_records(
        [{"clean": record["corrupt"], "positions": [4]} for record in records]
    )
    found = transplanted(engine, mask, twins, donors).diagonal()
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-5)
