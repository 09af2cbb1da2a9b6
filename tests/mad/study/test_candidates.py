"""Candidate scores against slow versions that know nothing of the engine, on a tiny model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from circuits.ablation import AblationConfig, fit_ablation
from circuits.circuit import Circuit
from circuits.prompts import Prompts, prompts_from_records
from circuits.selection import random_circuits
from mad.detector import Context
from mad.detectors.circuit import Deviation, fit_deviation
from mad.study.candidates import (
    CANDIDATES,
    carried,
    differences,
    distance,
    largest,
    logarithm,
    with_all_nodes,
)
from mad.study.effects import donated, effects, hosts_routing, removed
from mad.study.lens import Lens
from mad.study.subject import Subject
from tests import tiny

HEADS, WIDTH = 3, 4  # of `tiny.gpt2`
KINDS = ("edges", "positions")


def some(count: int, seed: int, *, same_length: bool) -> Prompts:
    draw = torch.Generator().manual_seed(seed)
    records = []
    for _ in range(count):
        length = 7 if same_length else int(torch.randint(4, 10, (1,), generator=draw))
        scored = [-1, 1] if int(torch.randint(2, (1,), generator=draw)) else [-1]
        tokens = [0, *torch.randint(1, 29, (length - 1,), generator=draw).tolist()]
        records.append({"clean": tokens, "positions": scored})
    return prompts_from_records(records, vocabulary=29)


def make(kind: str) -> Lens:
    same = kind == "positions"
    trusted = {
        name: some(count, seed, same_length=same)
        for seed, (name, count) in enumerate(
            {"discovery": 2, "fit": 40, "hosts": 9, "calibration": 2}.items()
        )
    }
    groups = {
        "normal_iid": some(5, 10, same_length=same),
        "normal_shift": some(5, 11, same_length=same),
    }
    subject = Subject(
        "none", 0, tiny.gpt2(), trusted, groups, {name: ("all",) * 5 for name in groups}
    )
    engine = subject.engine_by_position if same else subject.engine
    (mask,) = random_circuits(engine.graph, 60 if same else 12, 1, seed=1)
    means = fit_ablation(
        AblationConfig("positional_mean" if same else "mean"), engine, trusted["fit"]
    )
    return Lens(subject, engine, mask, means)


@pytest.fixture(scope="module")
def lenses() -> dict[str, Lens]:
    return {kind: make(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def module():
    return tiny.gpt2_module().double()


# ---- a slow run, edge by edge
# -----------------------------------------------------------------------


@dataclass
class Run:
    writers: Tensor  # [W, S, D]
    logits: Tensor  # [S, V]
    scores: dict[str, Tensor]  # of each head, [S, S]


@torch.no_grad()
def run(
    module, graph, tokens: list[int], mask: Tensor | None = None, other: Tensor | None = None
) -> Run:
    """GPT-2 on one prompt: each reader adds up what it gets over each edge, which is `other` where
    it is removed.
    """
    body, length = module.transformer, len(tokens)
    written = [body.wte.weight[tokens] + body.wpe.weight[:length]]
    scores, bias = {}, torch.zeros(12, dtype=torch.float64)

    def read(name: str) -> Tensor:
        total, reader = bias.expand(length, -1).clone(), graph.reader_index[name]
        for writer in range(graph.upstream[reader]):
            for position in range(length):
                kept = (
                    True
                    if mask is None
                    else bool(
                        mask[reader, writer] if mask.ndim == 2 else mask[reader, writer, position]
                    )
                )
                total[position] += written[writer][position] if kept else other[writer, position]
        return total

    for layer, block in enumerate(body.h):
        made = []
        for head in range(HEADS):
            sides = []
            for number, side in enumerate("qkv"):
                columns = slice(12 * number + WIDTH * head, 12 * number + WIDTH * (head + 1))
                normed = block.ln_1(read(f"a{layer}.h{head}<{side}>"))
                sides.append(
                    normed @ block.attn.c_attn.weight[:, columns] + block.attn.c_attn.bias[columns]
                )
            q, k, v = sides
            seen = (q @ k.T / WIDTH**0.5).masked_fill(
                torch.ones(length, length).triu(1) > 0, -torch.inf
            )
            scores[f"a{layer}.h{head}"] = seen
            made.append(
                seen.softmax(-1) @ v @ block.attn.c_proj.weight[WIDTH * head : WIDTH * (head + 1)]
            )
        written += made
        bias = bias + block.attn.c_proj.bias
        written.append(block.mlp(block.ln_2(read(f"m{layer}"))))
    return Run(torch.stack(written), body.ln_f(read("logits")) @ module.lm_head.weight.T, scores)


def placed(writers: Tensor, length: int) -> Tensor:
    """What writers write on another prompt, at the places of a prompt of so many tokens."""
    other = writers.shape[1]
    places = [0] + [min(max(p + other - length, 1), other - 1) for p in range(1, length)]
    return writers[:, places]


def kl(model: Tensor, circuit: Tensor) -> float:
    p, q = model.log_softmax(-1), circuit.log_softmax(-1)
    return (p.exp() * (p - q)).sum().item()


def log_odds(scores: list[float], key: int) -> float:
    return scores[key] - math.log(
        sum(math.exp(score) for place, score in enumerate(scores) if place != key)
    )


def routing(model: Run, circuit: Run, positions: list[int], heads: tuple[str, ...]) -> Tensor:
    found = []
    for head in heads:
        parts = []
        for position in positions:
            ours, theirs = (
                one.scores[head][position, : position + 1].tolist() for one in (model, circuit)
            )
            key = max(range(position + 1), key=ours.__getitem__)
            parts.append(log_odds(ours, key) - log_odds(theirs, key))
        found.append(sum(parts) / len(parts))
    return torch.tensor(found)


def tokens_of(prompts: Prompts) -> list[tuple[list[int], list[int]]]:
    """Tokens and scored positions of each prompt."""
    scored = [[position for position in row if position >= 0] for row in prompts.positions.tolist()]
    return list(zip(map(list, prompts.sequences()), scored, strict=True))


def test_the_slow_run_is_the_model(module, lenses):
    engine = lenses["edges"].engine
    for tokens, _ in tokens_of(some(3, 5, same_length=False)):
        clean, slow = engine.clean(torch.tensor([tokens])), run(module, engine.graph, tokens)
        torch.testing.assert_close(slow.writers, clean.writers[:, 0])
        torch.testing.assert_close(slow.logits, module(torch.tensor([tokens])).logits[0].detach())


# ---- departures
# -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "deviation"), [("output_kl", "kl"), ("output_logit_diff", "logit_diff")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_output_scores_are_those_of_the_detector(lenses, kind, name, deviation):
    lens = lenses[kind]
    context = Context(lens.engine, Circuit(lens.engine.graph, lens.mask, lens.mask.float()))
    config = Deviation(deviation=deviation, ablation=lens.means.config.name)
    detector, new = fit_deviation(config, context, lens.fit), lens.subject.groups["normal_iid"]
    torch.testing.assert_close(CANDIDATES[name](lens)(new), detector.score(new))


def test_distance_is_scikit_learns_on_the_columns_that_vary():
    from sklearn.covariance import ShrunkCovariance
    from sklearn.preprocessing import StandardScaler

    draw = torch.Generator().manual_seed(0)
    mixed, rows, new = (
        torch.randn(count, 4, generator=draw, dtype=torch.float64) for count in (4, 50, 6)
    )
    rows, new = rows @ mixed, new @ mixed
    rows[:, 2] = 3.0
    scaler = StandardScaler().fit(rows[:, [0, 1, 3]].numpy())
    scaler.scale_ = rows[:, [0, 1, 3]].std(0).numpy()
    expected = ShrunkCovariance(shrinkage=0.1).fit(scaler.transform(rows[:, [0, 1, 3]].numpy()))
    theirs = expected.mahalanobis(scaler.transform(new[:, [0, 1, 3]].numpy()))
    torch.testing.assert_close(distance(rows)(new), torch.from_numpy(theirs))
    assert distance(rows[:, [2]])(new[:, [2]]).tolist() == [0] * 6, "no column varies"
    assert distance(rows[:, :0])(new[:, :0]).tolist() == [0] * 6, "there is no column"
    assert largest(rows[:, :0])(new[:, :0]).tolist() == [0] * 6


@pytest.mark.parametrize("kind", KINDS)
def test_routing_max_is_the_largest_z(lenses, kind):
    lens, new = lenses[kind], lenses[kind].subject.groups["normal_iid"]
    trusted, rows = lens.departure(lens.fit).routing.double(), lens.departure(new).routing.double()
    expected = [max(abs(row - trusted.mean(0)) / trusted.std(0)) for row in rows]
    torch.testing.assert_close(CANDIDATES["routing_max"](lens)(new), torch.stack(expected).float())


@pytest.mark.parametrize("kind", KINDS)
def test_all_nodes_are_seen_and_those_of_the_circuit_do_as_before(lenses, kind):
    lens, new = lenses[kind], lenses[kind].subject.groups["normal_iid"]
    few, every = lens.departure(new), with_all_nodes(lens).departure(new)
    assert every.node_names == lens.engine.graph.writers[1:]
    assert len(few.node_names) < len(every.node_names), "the circuit drops a node"
    columns = [every.node_names.index(name) for name in few.node_names]
    torch.testing.assert_close(every.nodes[:, columns], few.nodes)
    trusted, rows = (
        logarithm(one).double() for one in (with_all_nodes(lens).departure(lens.fit), every)
    )
    spread = trusted.std(0)
    z = torch.where(spread > 1e-6 * spread.max(), (rows - trusted.mean(0)) / spread, -torch.inf)
    for name, some_of_z in (("nodes_max", z[:, columns]), ("nodes_all_max", z)):
        torch.testing.assert_close(
            CANDIDATES[name](lens)(new), some_of_z.amax(1).float(), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_nodes_run_on_what_the_circuit_makes_of_their_inputs(module, lenses, kind):
    lens, new = lenses[kind], lenses[kind].subject.groups["normal_iid"]
    graph, every = lens.engine.graph, with_all_nodes(lens).departure(new)
    for row, (tokens, positions) in enumerate(tokens_of(new)):
        means = lens.means.writers(lens.engine, new.select([row]))[:, 0]
        model, circuit = run(module, graph, tokens), run(module, graph, tokens, lens.mask, means)
        gap = (model.writers - circuit.writers)[1:, positions].square().sum(-1).mean(1)
        torch.testing.assert_close(every.nodes[row], gap.float(), atol=1e-5, rtol=1e-4)


# ---- inputs of readers
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_off_and_on_the_circuit_adds_up_to_the_input(lenses, kind):
    lens, new = lenses[kind], lenses[kind].subject.groups["normal_iid"]
    engine, graph, given = lens.engine, lens.engine.graph, differences(lens, new)
    row = 0
    for prompt, (tokens, positions) in enumerate(tokens_of(new)):
        _, cache = engine.model.bridge.run_with_cache(torch.tensor([tokens]))
        base = lens.means.values(engine, new.select([prompt])).base
        for position in positions:
            assert (given.prompt[row], given.positions[row]) == (prompt, position)
            for name, level, hook in (
                ("a1.h2<v>", 2, "blocks.0.hook_out"),
                ("logits", 4, "blocks.1.hook_out"),
            ):
                reader = graph.reader_index[name]
                off, on = (
                    carried(edges, reader, given)[row] for edges in (removed(lens), lens.mask)
                )
                torch.testing.assert_close(
                    off + on + base[level, 0, position], cache[hook][0, position]
                )
                of_reader = lens.mask[reader] if kind == "edges" else lens.mask[reader, :, position]
                kept = [given.values[writer, row] for writer in of_reader.nonzero()[:, 0].tolist()]
                torch.testing.assert_close(on, sum(kept, torch.zeros_like(on)))
            row += 1
    assert row == given.values.shape[1]


@pytest.mark.parametrize("kind", KINDS)
def test_input_scores_are_the_largest_ratio_to_the_trusted_mean(lenses, kind):
    lens, new = lenses[kind], lenses[kind].subject.groups["normal_iid"]
    graph, trusted, given = lens.engine.graph, differences(lens, lens.fit), differences(lens, new)
    score = CANDIDATES["off_circuit_inputs"](lens)(new)
    for prompt in range(len(new)):
        ratios = []
        for reader in (number for number in range(len(graph.readers)) if lens.mask[number].any()):
            of = distance(carried(removed(lens), reader, trusted))
            here = of(carried(removed(lens), reader, given))[given.prompt == prompt].mean()
            ratios.append((here / of(carried(removed(lens), reader, trusted)).mean()).nan_to_num())
        assert score[prompt].item() == pytest.approx(max(ratios).item(), rel=1e-5)


# ---- effects
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_parts_sum_to_the_divergence(lenses, kind):
    lens, new = lenses[kind], lenses[kind].subject.groups["normal_iid"]
    found, output = effects(lens, new, steps=100), lens.departure(new).output
    assert found.shape == (len(new), int(removed(lens).sum()))
    torch.testing.assert_close(found.sum(1), output, rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_eight_points_are_enough_near_the_model(kind):
    lens = make(kind)
    mask = lens.engine.graph.exists.clone()
    mask[-1, 1] = False  # the output of one head, to the logits
    lens = lens.through(mask)
    new = lens.subject.groups["normal_iid"]
    torch.testing.assert_close(
        effects(lens, new).sum(1), lens.departure(new).output, rtol=0.02, atol=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_effect_scores_are_their_formulas(lenses, kind):
    lens, new = lenses[kind], lenses[kind].subject.groups["normal_iid"]
    trusted, found = effects(lens, lens.fit).abs().double(), effects(lens, new).abs().double()
    torch.testing.assert_close(CANDIDATES["effect_mass"](lens)(new), found.sum(1).float())
    varies = trusted.std(0) > 1e-6 * trusted.std(0).max()
    z = ((found - trusted.mean(0)) / trusted.std(0))[:, varies]
    torch.testing.assert_close(CANDIDATES["effect_share_max"](lens)(new), z.amax(1).float())
    tails = [
        -sum(
            math.log((1 + int((trusted[:, edge] >= row[edge]).sum())) / (len(trusted) + 1))
            for edge in range(len(row))
        )
        for row in found
    ]
    torch.testing.assert_close(CANDIDATES["effect_share_tails"](lens)(new), torch.tensor(tails))


# ---- donors and hosts
# -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_donated_runs_are_slow_runs_with_the_donors_values(module, lenses, kind):
    lens, new = lenses[kind], lenses[kind].subject.groups["normal_iid"]
    graph, heads = lens.engine.graph, lens.departure(new).head_names
    donors = lens.subject.trusted["hosts"].select(range(8))
    given = [run(module, graph, tokens).writers for tokens, _ in tokens_of(donors)]
    found = donated(lens, new, donors)
    for row, (tokens, positions) in enumerate(tokens_of(new)):
        model = run(module, graph, tokens)
        runs = [
            run(module, graph, tokens, lens.mask, placed(writers, len(tokens))) for writers in given
        ]
        output = [
            sum(kl(model.logits[p], one.logits[p]) for p in positions) / len(positions)
            for one in runs
        ]
        assert found.output[row].item() == pytest.approx(sum(output) / 8, rel=1e-4)
        variances = []
        for p in positions:
            chosen = [
                one.logits[p].log_softmax(-1)[model.logits[p].argmax()].item() for one in runs
            ]
            mean = sum(chosen) / 8
            variances.append(sum((value - mean) ** 2 for value in chosen) / 8)
        assert found.variance[row].item() == pytest.approx(
            sum(variances) / len(variances), rel=1e-4
        )
        expected = torch.stack([routing(model, one, positions, heads) for one in runs]).mean(0)
        torch.testing.assert_close(found.routing[row], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(CANDIDATES["donated_answer"](lens)(new), found.output)
    torch.testing.assert_close(CANDIDATES["donated_variance"](lens)(new), found.variance)


@pytest.mark.parametrize("kind", KINDS)
def test_transplants_are_slow_runs_of_the_hosts(module, lenses, kind):
    lens, new = lenses[kind], lenses[kind].subject.groups["normal_iid"].select(range(3))
    graph, heads = lens.engine.graph, lens.departure(new).head_names
    hosts = lens.subject.trusted["hosts"]
    models = [run(module, graph, tokens) for tokens, _ in tokens_of(hosts)]
    departed = hosts_routing(lens, new, hosts.select(range(8)))
    few, many = (CANDIDATES[name](lens)(new) for name in ("transplant_4", "transplant"))
    for row, (tokens, _) in enumerate(tokens_of(new)):
        writers, moved, pointed = run(module, graph, tokens).writers, [], []
        for model, (host, positions) in zip(models, tokens_of(hosts), strict=True):
            one = run(module, graph, host, lens.mask, placed(writers, len(host)))
            moved.append(
                sum(kl(model.logits[p], one.logits[p]) for p in positions) / len(positions)
            )
            pointed.append(routing(model, one, positions, heads))
        assert few[row].item() == pytest.approx(sum(moved[:4]) / 4, rel=1e-4)
        assert many[row].item() == pytest.approx(sum(moved) / len(moved), rel=1e-4)
        torch.testing.assert_close(
            departed[row], torch.stack(pointed[:8]).mean(0), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_transplanted_into_itself_changes_nothing(lenses, kind):
    lens, itself = lenses[kind], lenses[kind].subject.trusted["hosts"].select([0])
    assert hosts_routing(lens, itself, itself).abs().max() < 1e-5
    found = donated(lens, itself, itself)
    assert (
        max(found.output.abs().max(), found.variance.abs().max(), found.routing.abs().max()) < 1e-5
    )


# ---- all of them
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_finite_and_the_same_again(lenses, kind, name):
    first, again = lenses[kind], lenses[kind].through(lenses[kind].mask)
    new = first.subject.groups["normal_shift"]
    score = CANDIDATES[name](first)(new)
    assert (
        score.shape == (len(new),) and score.dtype == torch.float32 and score.device.type == "cpu"
    )
    assert score.isfinite().all() and score.std() > 0
    assert torch.equal(score, CANDIDATES[name](again)(new))


@pytest.mark.parametrize("name", CANDIDATES)
def test_a_circuit_without_edges_has_scores(lenses, name):
    lens = lenses["edges"].through(torch.zeros_like(lenses["edges"].mask))
    assert CANDIDATES[name](lens)(lens.subject.groups["normal_iid"]).isfinite().all()


@pytest.mark.parametrize("name", CANDIDATES)
def test_scores_do_not_depend_on_the_prompts_beside(lenses, name):
    lens, new = lenses["edges"], lenses["edges"].subject.groups["normal_iid"]
    score, once = CANDIDATES[name](lens), CANDIDATES[name](lens)(new)
    several = new.select(
        [row for row in range(5) for _ in range(26)]
    )  # more than one batch, of different lengths
    torch.testing.assert_close(score(several), once.repeat_interleave(26), atol=1e-5, rtol=1e-3)
