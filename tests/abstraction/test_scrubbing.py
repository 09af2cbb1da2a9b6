"""Scrubbing against the literal recursion, one prompt and one node at a time, by hooks on the
bridge; and what is drawn against its definition.
"""

from __future__ import annotations

import pytest
import torch

from abstraction.draws import MODES, Draws, Visit
from abstraction.features import classes
from abstraction.hypothesis import Hypothesis
from abstraction.recovery import label_marginal
from abstraction.scrubbing import Scrubber, scrub
from circuits.engine import Engine
from circuits.engine.memory import TooLittleMemory
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
    hypothesis, prompts = Hypothesis.parse(text), made_prompts(4, (5,) if mode == "joint" else (5, 4))
    visit = draws_of(hypothesis, prompts).visits(1 + (mode == "pooled"), mode)
    got = Scrubber(engine, prompts, hypothesis, "2GB").scrubbed(visit)
    literal = Literal(engine, prompts, hypothesis)
    for row in range(len(visit.references)):
        logits, _ = literal.run(visit, row)
        at = prompts.positions[int(visit.references[row])]
        error = (got[row] - logits[0, at]).abs().max() / logits.abs().max()
        assert error < hooks.bound(name)
