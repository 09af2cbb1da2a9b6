"""Scrubbing against the literal recursion, one prompt and one node at a time, by hooks on the
bridge; and what is drawn against its definition.
"""

from __future__ import annotations

import math
from dataclasses import replace

import networkx as nx
import pytest
import torch

import abstraction
from abstraction.circuit_scrubbing import scrub_circuit
from abstraction.draws import MODES, Draws, Visit
from abstraction.features import classes
from abstraction.ground_truth.hypotheses import hypothesis_of, values_of
from abstraction.hypothesis import Hypothesis
from abstraction.recovery import label_marginal
from abstraction.scrubbing import Scrubber, scrub
from circuits.circuit import Circuit
from circuits.engine import Engine
from circuits.engine.memory import TooLittleMemory
from circuits.metrics import METRICS
from circuits.names import parse_node, split_reader
from circuits.prompts import Prompts, prompts_from_records
from tests import hooks, tiny

MODELS = {
    "gpt2": lambda: tiny.gpt2(n_embd=8, n_head=2),
    "grouped queries": lambda: tiny.native(n_heads=4, n_key_value_heads=2, d_head=3),
    "gemma2": lambda: tiny.huggingface("gemma2"),
    "olmo2": lambda: tiny.huggingface("olmo2"),
    "neox": lambda: tiny.huggingface("neox"),
    "bidirectional": lambda: tiny.native(attention_dir="bidirectional", n_heads=2),
}
WHOLE = """
name: whole
nodes:
  output: {at: logits, reads: {pair: all, late: all, twice: all}}
  pair: {at: [a1.h0, a1.h1], feature: answer, reads: {early: [q, k], twice: v, tokens: all}}
  late: {at: m1, feature: token@-1, positions: [-1], reads: {twice: all, pair: all}}
  twice: {at: m0, feature: parity, reads: {early: all}}
  early: {at: a0.h1, feature: any, positions: [0, -1], reads: {tokens: k}}
  tokens: {at: input, feature: token@0}
"""
HALVES = """
name: halves
nodes:
  output: {at: logits, reads: {head: all, silent: all}}
  head: {at: a1.h1, feature: answer, positions: [-1], reads: {where: pattern, what: v}}
  where: {at: a1.h1<pattern>, feature: parity, reads: {early: q, input: k}}
  what: {at: a1.h1<v>, feature: token@0}
  early: {at: a0.h0, feature: token@-1}
  input: {at: input, feature: any, positions: [0, 1]}
  silent: {at: m1, feature: any, reads: {}}
"""
PARALLEL = WHOLE.replace("reads: {twice: all, pair: all}", "reads: {twice: all}").replace(
    "reads: {early: all}", "reads: {tokens: all}"
)


def made_prompts(count: int = 14, lengths: tuple[int, ...] = (5, 7), seed: int = 0) -> Prompts:
    """Few answers and few tokens, so that prompts agree."""
    generator = torch.Generator().manual_seed(seed)
    records = []
    for number in range(count):
        length = lengths[number % len(lengths)]
        clean = torch.randint(6, (length,), generator=generator).tolist()
        records.append(
            {
                "clean": clean,
                "answers": [[sum(clean) % 3], [5]],
                "wrong_answers": [[(sum(clean) + 1) % 3], [7]],
                "positions": [length - 1, 2] if number % 3 else [1, length - 1],
                "features": {"parity": clean[1] % 2, "number": str(number)},
            }
        )
    return prompts_from_records(records)


def draws_of(hypothesis: Hypothesis, prompts: Prompts, **changes) -> Draws:
    agreeing = {n: classes(prompts, c.feature) for n, c in hypothesis.nodes.items()}
    settings = {"exclude_self": False, "seed": 3, **changes}
    return Draws(hypothesis, agreeing, classes(prompts, ("any",)), **settings)


class Literal:
    """The recursion as it is written, each node by a forward of the bridge of its own."""

    def __init__(self, engine: Engine, prompts: Prompts, hypothesis: Hypothesis):
        self.engine, self.prompts, self.hypothesis = engine, prompts, hypothesis
        self.graph = engine.graph
        self.known: dict = {}

    def tokens(self, prompt: int) -> torch.Tensor:
        return self.prompts.clean[prompt, : self.prompts.lengths[prompt]][None]

    def plain(self, prompt: int) -> torch.Tensor:
        if prompt not in self.known:
            self.known[prompt] = self.engine.writers(Prompts.from_tokens(self.tokens(prompt)))
        return self.known[prompt]

    def value(self, visit: Visit, row: int) -> dict[str, torch.Tensor]:
        """What the heads, MLP or input of a node write, each [1, S, D]; once for all who ask."""
        if (id(visit), row) not in self.known:
            self.known[id(visit), row] = self.written(visit, row)
        return self.known[id(visit), row]

    def written(self, visit: Visit, row: int) -> dict[str, torch.Tensor]:
        claim = self.hypothesis.nodes[visit.name]
        if claim.reads is None:
            written = self.plain(int(visit.references[row]))
        else:
            written = self.run(visit, row)[1]
        return {place: written[self.graph.writer_index[place]] for place in claim.at}

    def run(self, visit: Visit, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and all that is written when the readers of one node get what the node reads.

        A half has an input of its own: its readers are given that in place of the donor's.
        """
        graph = self.graph
        claim = self.hypothesis.nodes[visit.name]
        donor = int(visit.donors[row])
        tokens, ablated = self.tokens(donor), self.plain(donor)
        length = tokens.shape[1]
        sides = []  # (port, visit, row) of each half, or of the node itself
        for child, below in visit.children.items():
            rows = visit.rows.get(child)
            own = row if rows is None else int(rows[row])
            if self.hypothesis.nodes[child].half:
                sides += [(p, below, own) for p in self.hypothesis.nodes[child].half]
        taken = {port for port, _, _ in sides}
        nodes = [split_reader(place)[0] for place in claim.at]
        ports = "qkv" if parse_node(nodes[0]).kind == "head" else " "
        sides += [(port, visit, row) for port in ports if port not in taken]
        extra = torch.zeros(len(graph.readers), *ablated.shape[1:], dtype=torch.float64)
        for port, source, at in sides:
            of = self.hypothesis.nodes[source.name]
            leaf = bool(of.half) and of.reads is None
            other = int((source.references if leaf else source.donors)[at])
            start = self.plain(other)
            for node in nodes:
                for reader in self.readers(node, port):
                    total = (start - ablated)[: graph.upstream[reader]].sum(0)
                    for child, ways in (of.reads or {}).items():
                        below = self.hypothesis.nodes[child]
                        if below.half or (port.strip() and port not in ways):
                            continue
                        rows = source.rows.get(child)
                        own = at if rows is None else int(rows[at])
                        positions = below.positions or range(length)
                        for place, value in self.value(source.children[child], own).items():
                            w = graph.writer_index[place]
                            for position in positions:
                                change = value[:, position] - start[w][:, position]
                                total[:, position] += change
                    extra[reader] = total
        return self.through(tokens, ablated, extra, nodes)

    def readers(self, node: str, port: str) -> list[int]:
        return [
            r
            for r, name in enumerate(self.graph.readers)
            if node in self.graph.reader_nodes(r) and name.partition("<")[2][:1] == port.strip()
        ]

    def through(self, tokens, ablated, extra, nodes) -> tuple[torch.Tensor, torch.Tensor]:
        """A plain forward, but that readers get `extra` on top of what they read in it."""
        graph, seen = self.graph, {}
        mask = torch.zeros(graph.exists.shape, dtype=torch.float64)
        if nodes != ["logits"]:  # a post-norm is to see these heads, and not their unread values
            for node in nodes:
                mask[-1, graph.writer_index[node]] = 1.0
        logits = hooks.through_hooks(
            self.engine, tokens, mask, ablated, upstream=ablated, seen=seen, extra=extra
        )
        return logits, seen["written"]


@pytest.mark.parametrize("text", [WHOLE, HALVES], ids=["whole", "halves"])
@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "tree") for name in MODELS), ("gpt2", "joint"), ("gpt2", "pooled")]
)
def test_scrubbing_is_the_literal_recursion(name, mode, text):
    engine = Engine(MODELS[name]())
    if engine.graph.parallel and text == WHOLE:
        text = PARALLEL
    hypothesis, prompts = (
        Hypothesis.parse(text),
        made_prompts(4, (5,) if mode == "joint" else (5, 4)),
    )
    visit = draws_of(hypothesis, prompts).visits(1 + (mode == "pooled"), mode)
    got = Scrubber(engine, prompts, hypothesis, "2GB").scrubbed(visit)
    literal = Literal(engine, prompts, hypothesis)
    for row in range(len(visit.references)):
        logits, _ = literal.run(visit, row)
        at = prompts.positions[int(visit.references[row])]
        error = (got[row] - logits[0, at]).abs().max() / logits.abs().max()
        assert error < hooks.bound(name)


@pytest.mark.parametrize("mode", ["each", "joint"])
@pytest.mark.parametrize("name", MODELS)
def test_scrubbing_a_circuit_is_a_run_with_the_donors_of_each_reader(name, mode, monkeypatch):
    engine, prompts = Engine(MODELS[name]()), made_prompts(4, (5,))
    graph, seen = engine.graph, []
    share = torch.rand(graph.exists.shape, generator=torch.Generator().manual_seed(3))
    circuit = Circuit(graph, graph.without_dead_ends(graph.exists & (share < 0.6)), share)
    plain, real = engine.writers(prompts), Engine.masked

    def watched(self, *arguments, **named):
        seen.append((arguments[2].donors, logits := real(self, *arguments, **named)))
        return logits

    monkeypatch.setattr(Engine, "masked", watched)
    found = scrub_circuit(engine, prompts, circuit, resamples=2, mode=mode)
    assert len(seen) == 2
    for run, (donors, logits) in enumerate(seen):
        assert (len(donors.unique(dim=0)) == 1) == (mode == "joint")
        unread: dict = {}
        if engine.architecture.blocks[0].post_norm1:  # a head that nothing reads: its donor's
            nothing = torch.zeros(graph.exists.shape)
            for row in range(4):
                extra = torch.zeros(len(graph.readers), 1, *plain.shape[2:], dtype=plain.dtype)
                for layer in range(graph.n_layers):
                    for head in range(graph.n_heads):
                        asked = graph.first_reader(layer) + head
                        donor, own = int(donors[asked, row]), {}
                        tokens = prompts.clean[donor][None]
                        hooks.through_hooks(engine, tokens, nothing, plain[:, [donor]], own)
                        unread.setdefault((row, layer), []).append(own[layer][head])
        for row in range(4):
            ablated = plain[:, [row]]
            extra = torch.zeros(len(graph.readers), 1, *plain.shape[2:], dtype=plain.dtype)
            for reader in range(len(graph.readers)):
                change = plain[:, [int(donors[reader, row])]] - ablated
                gone = (graph.exists & ~circuit.kept)[reader].to(plain)
                extra[reader] = torch.einsum("w,wbsd->bsd", gone, change)
            alone = {layer: parts for (r, layer), parts in unread.items() if r == row}
            expected = hooks.through_hooks(
                engine,
                prompts.clean[[row]],
                circuit.kept.to(plain),
                ablated,
                alone or None,
                extra=extra,
            )[0, prompts.positions[row]]
            error = (logits[row] - expected).abs().max() / expected.abs().max()
            assert error < hooks.bound(name)
            loss = METRICS["cross_entropy"](expected[None], prompts.select([row]))
            torch.testing.assert_close(found.scrubbed["cross_entropy"][row, run], loss[0])


# ---- what is drawn -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("exclude_self", [False, True])
def test_what_is_drawn_agrees_with_what_reads_it(mode, exclude_self):
    prompts, hypothesis = made_prompts(30), Hypothesis.parse(HALVES)
    draws = draws_of(hypothesis, prompts, exclude_self=exclude_self)
    visit = draws.visits(40, mode)
    assert torch.equal(visit.references, torch.arange(30).repeat(40))
    lengths, of_last = prompts.lengths, prompts.clean[torch.arange(30), prompts.lengths - 1]
    todo, donors = [visit], []
    while todo:
        reader = todo.pop()
        donors.append(reader.donors)
        assert torch.equal(lengths[reader.donors], lengths[reader.references])
        assert not exclude_self or mode == "joint" or (reader.donors != reader.references).all()
        for name, child in reader.children.items():
            rows = reader.rows.get(name)
            new = child.references if rows is None else child.references[rows]
            assert torch.equal(lengths[new], lengths[reader.references])
            if name == "early":
                assert torch.equal(of_last[new], of_last[reader.references])
            if name == "input":  # any: uniform over prompts of that length
                own = (new == reader.references).double().mean().item()
                assert own == (0 if exclude_self else pytest.approx(1 / 15, abs=0.03))
            todo.append(child)
    same = all(torch.equal(each, donors[0]) for each in donors)
    assert same == (mode == "joint")


def test_draws_are_repeatable_and_results_do_not_depend_on_the_memory():
    engine, prompts = Engine(tiny.gpt2(n_embd=8, n_head=2)), made_prompts()
    hypothesis = Hypothesis.parse(WHOLE)
    found = scrub(engine, prompts, hypothesis, resamples=3)
    scrubber = Scrubber(engine, prompts, hypothesis, "2GB")
    little = f"{(scrubber.held + 4.5 * scrubber.each) / 1e3:.0f}kB"
    again = scrub(engine, prompts, hypothesis, resamples=3, memory=little)
    assert Scrubber(engine, prompts, hypothesis, little).at_once == 4
    for metric, values in found.scrubbed.items():
        torch.testing.assert_close(values, again.scrubbed[metric])
    other = scrub(engine, prompts, hypothesis, resamples=3, seed=1)
    assert not torch.equal(found.scrubbed["kl"], other.scrubbed["kl"])
    with pytest.raises(TooLittleMemory, match="the values of 14 prompts at .* raise memory"):
        scrub(engine, prompts, hypothesis, memory="10kB")


# ---- figures -------------------------------------------------------------------------------------


def compiled(name: str):
    made = abstraction.compile(abstraction.PROGRAMS[name]())
    prompts = made.model.prompts(made.program.records(200, 0))
    hypothesis = hypothesis_of(made.program, made.places)
    features = values_of(made.program, prompts.clean)
    return Engine(made.model), prompts, hypothesis, features


@pytest.mark.parametrize("name", ["modular_addition", "same_ends", "two_hop", "greater_than"])
def test_what_a_program_says_of_its_model_recovers_everything(name):
    engine, prompts, hypothesis, features = compiled(name)
    found = scrub(engine, prompts, hypothesis, features=features, resamples=2)
    for zero in ("permuted", "unconditional", "marginal"):
        assert found.recovered("cross_entropy", zero).value == pytest.approx(1, abs=1e-3)
        assert found.recovered("accuracy", zero).value == pytest.approx(1, abs=1e-3)
    assert found.difference().max() < 1e-3


@pytest.mark.parametrize("name", ["modular_addition", "same_ends"])
def test_any_single_corruption_recovers_next_to_nothing(name):
    engine, prompts, hypothesis, features = compiled(name)
    wrong = []
    for node, claim in hypothesis.nodes.items():
        if node == hypothesis.root:
            continue
        dropped = {**hypothesis.nodes, node: replace(claim, feature=("any",))}
        wrong.append(Hypothesis("feature dropped", dropped))
        if claim.reads:
            wrong.append(
                Hypothesis(
                    "reads nothing",
                    {
                        key: replace(other, reads={}) if key == node else other
                        for key, other in hypothesis.nodes.items()
                        if key not in nx.descendants(hypothesis.reading, node)
                    },
                )
            )
    assert len(wrong) > 5
    for each in wrong:
        found = scrub(engine, prompts, each, features=features, resamples=2)
        assert found.recovered("cross_entropy").value < 0.2
        assert found.recovered("accuracy").value < 0.2


def test_figures_are_those_of_their_definitions():
    engine, prompts = Engine(tiny.gpt2(n_embd=8, n_head=2)), made_prompts(20)
    hypothesis = Hypothesis.parse(WHOLE)
    found = scrub(engine, prompts, hypothesis, resamples=3)
    logits = engine.logits(prompts)
    loss = METRICS["cross_entropy"](logits, prompts)
    torch.testing.assert_close(found.model["cross_entropy"], loss)
    scrubbed, zero = found.scrubbed["cross_entropy"], found.permuted["cross_entropy"]
    expected = (zero.mean() - scrubbed.mean()) / (zero.mean() - loss.mean())
    assert found.zero("permuted", "accuracy") is not None
    told = found.to_json()["figures"]["cross_entropy"]
    assert told["mean_difference"] == pytest.approx((scrubbed - loss[:, None]).abs().mean().item())
    if told["recovered"]["permuted"] is not None:
        assert told["recovered"]["permuted"]["value"] == pytest.approx(expected.item())
    with pytest.raises(ValueError, match="metric='loss', but kl, logit_diff"):
        found.recovered("loss")
    with pytest.raises(ValueError, match="zero='chance', but the zero points are permuted"):
        found.recovered(zero="chance")
    with pytest.raises(ValueError, match="zero='marginal' has no kl"):
        found.recovered("kl", "marginal")


def test_the_label_marginal_is_what_a_loop_says():
    prompts = made_prompts(9)
    answers = prompts.answers[:, :, 0]
    counts = torch.bincount(answers.flatten())
    got = label_marginal(prompts)
    for row in range(9):
        shares = [counts[a].item() / counts.sum().item() for a in answers[row].tolist()]
        expected = -sum(math.log(share) for share in shares) / 2
        assert got["cross_entropy"][row].item() == pytest.approx(expected)
        right = sum(int(counts[a] == counts.max()) for a in answers[row].tolist())
        assert got["accuracy"][row].item() == pytest.approx(right / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "all"}, "mode='all', but the modes are tree, joint, pooled"),
        ({"resamples": 0}, "resamples=0, but at least 1 is needed"),
        ({"features": {"parity": [1, 2]}}, "feature 'parity' has 2 values, but there are 14"),
    ],
)
def test_what_cannot_be_scrubbed_is_refused(change, message):
    engine, hypothesis = Engine(tiny.gpt2(n_embd=8, n_head=2)), Hypothesis.parse(WHOLE)
    with pytest.raises(ValueError, match=message):
        scrub(engine, made_prompts(), hypothesis, **change)


@pytest.mark.parametrize(
    ("feature", "positions", "message"),
    [
        ("mood", "[0]", "feature 'mood' is unknown; known are parity, number, exact"),
        ("token@6", "[0]", r"feature 'token@6': prompt 'record 1' has only 5 tokens"),
        ("any", "[6]", r"node 'a' is at positions \[6\], but prompt 'record 1' has 5 tokens"),
    ],
)
def test_what_prompts_lack_is_refused(feature, positions, message):
    text = f"{{at: m0, feature: {feature}, positions: {positions}}}"
    hypothesis = Hypothesis.parse(f"nodes: {{o: {{at: logits, reads: {{a: all}}}}, a: {text}}}")
    with pytest.raises(ValueError, match=message):
        scrub(Engine(tiny.gpt2(n_embd=8, n_head=2)), made_prompts(), hypothesis)


def test_a_prompt_that_nothing_can_be_exchanged_with_is_refused():
    prompts = made_prompts(5, (5, 5, 5, 5, 6))
    with pytest.raises(ValueError, match="prompt 'record 5' is the only one of 6 tokens"):
        scrub(Engine(tiny.gpt2(n_embd=8, n_head=2)), prompts, Hypothesis.parse(WHOLE))
