"""Causal scrubbing: what is left of a behaviour when everything is exchanged that a hypothesis says
may be exchanged (Chan et al. 2022).

    run(n, ref):                         what node n writes, on any input that agrees with ref
      donor ~ D                          one draw, for all that the hypothesis is silent of
      each child p:  new ~ {x in D : feature_p(x) = feature_p(ref)};  v[p] = run(p, new)
      everything else:  v[w] = what w writes on donor, in a plain run
      return n(v)

Labels stay those of the input that the root stands for.  On a residual stream this takes one
evaluation of a node for each node of the hypothesis that is no leaf, never a run of the model: with
ACT[w] what w writes and PRE[r] what r reads in plain runs on all of D,

    x_r = PRE[r][donor] + sum_{children p} (v[p] - ACT[p][donor])

Modes:
    tree     a node that is read in two ways is drawn anew in each: the definition above
    joint    the same, with one donor for all nodes of a run
    pooled   each node has so many values for each prompt as there are resamples, of which all that
             read it draw.  For hypotheses in which nodes are read by many

Shapes: prompts N, references M, heads h of one node, pos S, s of them that are needed, d_model D,
scored positions P, vocabulary V.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from abstraction.draws import MODES, Draws, Visit
from abstraction.features import Classes, Given, classes, from_the_first
from abstraction.hypothesis import Claim, Hypothesis
from abstraction.recovery import NodeDraws, Recovery, label_marginal
from circuits.batches import in_batches
from circuits.engine import Engine
from circuits.engine.memory import TooLittleMemory, footprint, parse_memory
from circuits.metrics import Metric, metrics_for
from circuits.model.attention import attend
from circuits.names import LOGITS, parse_node, split_reader
from circuits.prompts import Prompts


class Scrubber:
    """A model's plain values on all prompts, from which scrubbed runs are put together."""

    def __init__(self, engine: Engine, prompts: Prompts, hypothesis: Hypothesis, memory: str):
        """Runs the model once on each prompt.

        Raises:
            ValueError: the model lacks a node or a way; positions outside of a prompt.
            TooLittleMemory: what the hypothesis needs of all prompts does not fit.
        """
        hypothesis.check(engine.graph)
        self.engine, self.prompts, self.hypothesis = engine, prompts, hypothesis
        self.graph, self.architecture = engine.graph, engine.architecture
        self.key_mask = None if self.graph.causal else prompts.key_mask.to(engine.device)
        self.positions = {
            name: _positions(prompts, name, claim).to(engine.device)
            for name, claim in hypothesis.nodes.items()
            if claim.positions is not None
        }
        self._plan()
        self._room(memory)
        self._run(memory)

    def _plan(self) -> None:
        """Which writers and which reading levels the hypothesis speaks of."""
        graph, claims = self.graph, self.hypothesis.nodes.values()
        places = [place for claim in claims for place in claim.at]
        writers = sorted({graph.writer_index[p] for p in places if p in graph.writer_index})
        read = (self._level(split_reader(place)[0]) for place in places)
        levels = sorted({level for level in read if level is not None})
        layers = sorted(
            {
                parse_node(place).layer
                for claim in claims
                if claim.reads is not None
                for place in claim.at
                if place in graph.writer_index and parse_node(place).kind == "head"
            }
        )
        self.writer_row = {graph.writers[w]: row for row, w in enumerate(writers)}
        self.level_row = {level: row for row, level in enumerate(levels)}
        post = [layer for layer in layers if self.architecture.blocks[layer].post_norm1]
        self.layer_row = {layer: row for row, layer in enumerate(post)}
        self._writers = torch.tensor(writers, dtype=torch.long)

    def _level(self, node: str) -> int | None:
        """Which of the sums of `Ablated.base` a node reads; None for an input."""
        if node == LOGITS:
            return 2 * self.graph.n_layers
        parsed = parse_node(node)
        if parsed.kind == "input":
            return None
        later = parsed.kind == "mlp" and not self.graph.parallel
        return 2 * parsed.layer + later

    def _room(self, memory: str) -> None:
        size = footprint(self.engine, self.prompts)
        rows = len(self.writer_row) + len(self.level_row) + self.graph.n_heads * len(self.layer_row)
        number = size.element * size.tokens * size.width
        self.held = len(self.prompts) * (rows * number + size.logits)
        # on the way to the root each node's sum and what it adds, and one node's own work
        depth = len(self.hypothesis.nodes) + 4
        self.each = depth * number + size.node
        if (budget := parse_memory(memory)) < self.held + self.each:
            raise TooLittleMemory(
                f"the values of {len(self.prompts)} prompts at {rows} places of the model take "
                f"{self.held / 1e9:.2g} GB, but memory={memory}; raise memory, or use fewer prompts"
            )
        self.at_once = max(1, int((budget - self.held) // self.each))

    @torch.no_grad()
    def _run(self, memory: str) -> None:
        engine, prompts = self.engine, self.prompts
        shape = (len(prompts), prompts.clean.shape[1], self.architecture.width)

        def room(rows: int, *lead: int) -> Tensor:
            return torch.zeros(rows, *lead, *shape, device=engine.device, dtype=engine.dtype)

        self.act, self.pre = room(len(self.writer_row)), room(len(self.level_row))
        self.unnormed = room(len(self.layer_row), self.graph.n_heads)
        logits, done = [], 0
        for batch in in_batches(engine, prompts, lambda size: 2 * size.clean, memory=memory):
            clean = engine.clean(batch)
            sums = engine.ablated(clean.writers)
            rows, width = slice(done, done + len(batch)), batch.clean.shape[1]
            self.act[:, rows, :width] = clean.writers[self._writers]
            self.pre[:, rows, :width] = sums.base[list(self.level_row)]
            if sums.unread is not None and self.layer_row:
                self.unnormed[:, :, rows, :width] = sums.unread[list(self.layer_row)]
            scored = prompts.positions.shape[1] - clean.logits.shape[1]
            logits.append(torch.nn.functional.pad(clean.logits, (0, 0, 0, scored)))
            done += len(batch)
        self.logits = torch.cat(logits)

    # ---- scrubbed runs -----------------------------------------------------------------------

    def scrubbed(self, visit: Visit) -> Float[Tensor, "M P V"]:
        """The logits at the scored positions of each reference."""
        return torch.cat([logits for _, logits in self.runs(visit)])

    @torch.no_grad()
    def runs(self, visit: Visit) -> Iterator[tuple[Int[Tensor, " m"], Float[Tensor, "m P V"]]]:
        """Yields references, as many as fit at once, and their logits at the scored positions."""
        self._pools: dict[int, Tensor] = {}  # of this visit's nodes, whatever part of it is run
        for start in range(0, len(visit.references), self.at_once):
            part = visit.part(slice(start, start + self.at_once))
            yield part.references, self._run_of(part)

    def _run_of(self, visit: Visit) -> Float[Tensor, "m P V"]:
        device = self.engine.device
        at = self.prompts.positions.to(device)[visit.references.to(device)].clamp(min=0)
        return self.architecture.logits(self._inputs(visit, at)[""])

    def _value(self, visit: Visit, at: Int[Tensor, "M s"] | None) -> Float[Tensor, "h M s D"]:
        """What a node writes, at some positions."""
        claim = self.hypothesis.nodes[visit.name]
        if claim.reads is None:
            return self._plain(claim, visit.references, at)
        if parse_node(claim.at[0]).kind == "mlp":
            block = self.architecture.blocks[parse_node(claim.at[0]).layer]
            assert block.norm2 is not None
            return block.feed_forward(block.norm2(self._inputs(visit, at)[""]))[None]
        heads = [parse_node(place) for place in claim.at]
        written = []
        for layer in dict.fromkeys(head.layer for head in heads):
            own = [head.head for head in heads if head.layer == layer]
            written.append(self._heads(visit, layer, own, at))
        return written[0] if len(written) == 1 else torch.cat(written)

    def _heads(
        self, visit: Visit, layer: int, heads: list[int], at: Tensor | None
    ) -> Float[Tensor, "h M s D"]:
        """What some heads of one layer write, all on the same inputs."""
        architecture, block = self.architecture, self.architecture.blocks[layer]
        attention, group = block.attention, self.graph.kv_group
        inputs, sides = self._inputs(visit, at, layer), []
        normed = {id(x): block.norm1(x) for x in inputs.values()}
        for port, projection in zip("qkv", (attention.q, attention.k, attention.v), strict=True):
            x = normed[id(inputs[port])]
            which = heads if port == "q" else [head // group for head in heads]
            each = x.flatten(0, 1).expand(len(heads), -1, -1)
            side = projection.each(each, architecture.head_width, which)
            sides.append(side.view(len(heads), *x.shape[:2], -1))
        q, k, v = sides
        mask = None if self.key_mask is None else self.key_mask[visit.references]
        z = attend(architecture, attention, q, k, v, mask, list(range(len(heads))), at)
        weight = architecture.output_weight(attention)[heads]
        written = torch.bmm(z.flatten(1, 2), weight).view(*z.shape[:3], -1)
        if block.post_norm1 is not None:  # over all heads of the layer, of which others are donors'
            alone = self.unnormed[self.layer_row[layer]]
            others = alone.sum(0) - alone[heads].sum(0)
            together = written.sum(0) + _taken(others, visit.donors, at)
            written = written * block.post_norm1.factor(together)
        return written

    def _inputs(
        self, visit: Visit, at: Int[Tensor, "M s"] | None, layer: int | None = None
    ) -> dict[str, Float[Tensor, "M _ D"]]:
        """What a node reads through each port; "" where it has none.

        Queries are needed at the positions `at`, as is what reads through no port; keys and values
        at all of them.  `layer` is that of a node that has several.
        """
        claim = self.hypothesis.nodes[visit.name]
        node, _ = split_reader(claim.at[0])
        has_ports = node != LOGITS and parse_node(node).kind == "head"
        level = 2 * layer if layer is not None else self._level(node)
        assert level is not None
        inputs: dict[str, Tensor] = {}
        added: list[tuple[str, Tensor | None, Tensor]] = []  # ports, positions, what is added there
        for child, ports in (claim.reads or {}).items():
            half, below = self.hypothesis.nodes[child].half, visit.children[child]
            if half:
                if (rows := visit.rows.get(child)) is not None:
                    below = below.part(rows)
                inputs |= {port: x for port, x in self._inputs(below, at).items() if port in half}
            else:
                moves = has_ports and set(ports) & set("kv")
                added.append((ports, *self._added(visit, child, None if moves else at)))
        shared: dict[tuple, Tensor] = {}
        for port in (claim.half or "qkv") if has_ports else [""]:
            if port in inputs:
                continue
            where = None if port in ("k", "v") else at
            through = tuple(n for n, (ports, _, _) in enumerate(added) if port in ports)
            if (key := (through, where is None)) not in shared:
                donors = visit.references if claim.half and claim.reads is None else visit.donors
                x = _taken(self.pre[self.level_row[level]], donors, where)
                for number in through:
                    _, positions, change = added[number]
                    x = _plus(x, where, change, positions)
                shared[key] = x
            inputs[port] = shared[key]
        return inputs

    def _added(
        self, visit: Visit, child: str, at: Tensor | None
    ) -> tuple[Tensor | None, Float[Tensor, "M s D"]]:
        """What a child's value adds to its donor's, and at which positions (None: all of them)."""
        claim, below = self.hypothesis.nodes[child], visit.children[child]
        rows, own = visit.rows.get(child), self.positions.get(child)
        if own is not None:
            own = own[visit.references]
        where = own if at is None else at
        if rows is None:
            value = self._value(below, where)
        else:
            if id(below) not in self._pools:
                self._pools[id(below)] = self._value(below, None)
            pool = self._pools[id(below)]
            value = torch.stack([_taken(each, rows, where) for each in pool])
        change = (value - self._plain(claim, visit.donors, where)).sum(0)
        if own is not None and at is not None:
            matters = (at[:, :, None] == own[:, None, :]).any(-1, keepdim=True)
            change = change * matters.to(change.dtype)
        return where, change

    def _plain(
        self, claim: Claim, prompts: Int[Tensor, " M"], at: Tensor | None
    ) -> Float[Tensor, "h M s D"]:
        """What nodes write in plain runs."""
        rows = [self.writer_row[place] for place in claim.at]
        return torch.stack([_taken(self.act[row], prompts, at) for row in rows])


def _taken(
    values: Float[Tensor, "N S D"], prompts: Int[Tensor, " M"], at: Int[Tensor, "M s"] | None
) -> Float[Tensor, "M s D"]:
    """The values of some prompts, at some positions of each."""
    prompts = prompts.to(values.device)
    return values[prompts] if at is None else values[prompts[:, None], at]


def _plus(x: Tensor, at: Tensor | None, change: Tensor, positions: Tensor | None) -> Tensor:
    """x, which is at the positions `at`, and what is added at others; None: all positions."""
    if positions is at:
        return x + change
    if positions is None:
        assert at is not None
        return x + change.gather(1, at[..., None].expand(-1, -1, change.shape[-1]))
    if at is None:
        return x.scatter_add(1, positions[..., None].expand_as(change), change)
    same = (at[:, :, None] == positions[:, None, :]).to(change.dtype)
    return x + same @ change


def _positions(prompts: Prompts, name: str, claim: Claim) -> Int[Tensor, "N p"]:
    """A node's positions in each prompt, from the first token."""
    at, short = from_the_first(prompts, claim.positions or ())
    if short is not None:
        raise ValueError(
            f"node {name!r} is at positions {list(claim.positions or ())}, but prompt "
            f"{prompts.ids[short]!r} has {int(prompts.lengths[short])} tokens"
        )
    return at


# ---- the figures -------------------------------------------------------------------------------


def scrub(
    engine: Engine,
    prompts: Prompts,
    hypothesis: Hypothesis,
    *,
    features: Given | None = None,
    resamples: int = 10,
    mode: str = "tree",
    exclude_self: bool = False,
    seed: int = 0,
    memory: str = "2GB",
) -> Recovery:
    """Scrubs a hypothesis (Chan et al. 2022), and says what is left of the behaviour.

    The hypothesis is run with every prompt as the root's input, `resamples` times, beside two zero
    points: the model's own answers held against other prompts' labels, and the hypothesis with all
    of its features dropped.  Figures are all metrics that the prompts allow.

    >>> from abstraction import PROGRAMS, compile
    >>> compiled = compile(PROGRAMS["same_ends"]())
    >>> prompts = compiled.model.prompts(compiled.program.records(40, seed=0))
    >>> says = "nodes: {out: {at: logits, reads: {mlp: all}}, mlp: {at: m0, feature: answer}}"
    >>> found = scrub(Engine(compiled.model), prompts, Hypothesis.parse(says), resamples=2)
    >>> round(found.recovered("accuracy").value, 3)
    1.0

    Args:
        features: values of features for each prompt, beside those that the prompts bring.
        exclude_self: a prompt is exchanged for others alone, where there are any.

    Raises:
        ValueError: an unknown mode or feature, a node that the model lacks, fewer than 2 prompts
            of each length.
        TooLittleMemory: what the hypothesis needs of all prompts does not fit.
    """
    of_length = check_settings(prompts, mode, MODES, resamples)
    agreeing = {
        name: classes(prompts, claim.feature, features) for name, claim in hypothesis.nodes.items()
    }
    scrubber = Scrubber(engine, prompts, hypothesis, memory)
    draws = Draws(hypothesis, agreeing, of_length, exclude_self, seed)
    dropped = Draws(
        hypothesis, dict.fromkeys(agreeing, of_length), of_length, exclude_self, seed + 1
    )
    metrics = metrics_for(prompts)
    visits = draws.visits(resamples, mode)
    with tqdm(total=2 * resamples * len(prompts), desc="scrubbing", disable=None) as progress:
        runs = [
            _measured(scrubber, each, metrics, resamples, progress)
            for each in (visits, dropped.visits(resamples, mode))
        ]
    generator = torch.Generator().manual_seed(seed + 2)
    own = torch.arange(len(prompts))
    other = of_length.draw(own, generator, exclude_self=True)
    return Recovery(
        hypothesis=hypothesis,
        mode=mode,
        resamples=resamples,
        exclude_self=exclude_self,
        seed=seed,
        scrubbed=runs[0],
        unconditional=runs[1],
        model=metrics_of(prompts, scrubber.logits, scrubber.logits, own, metrics),
        permuted=metrics_of(prompts, scrubber.logits, scrubber.logits[other], own, metrics),
        marginal=label_marginal(prompts),
        draws=tuple(NodeDraws.of(visit, parent, agreeing) for visit, parent in _each(visits)),
    )


def check_settings(prompts: Prompts, mode: str, modes: tuple[str, ...], resamples: int) -> Classes:
    """Returns which prompts may be exchanged at all: those of as many tokens.

    Raises:
        ValueError: an unknown mode, no resamples, or a prompt with a length of its own.
    """
    if mode not in modes:
        raise ValueError(f"mode={mode!r}, but the modes are {', '.join(modes)}")
    if resamples < 1:
        raise ValueError(f"resamples={resamples}, but at least 1 is needed")
    of_length = classes(prompts, ("any",))
    if of_length.alone.any():
        lonely = int(of_length.alone.nonzero()[0])
        raise ValueError(
            f"prompt {prompts.ids[lonely]!r} is the only one of {int(prompts.lengths[lonely])} "
            "tokens, so that nothing can be exchanged with it; leave it out, or add others"
        )
    return of_length


def _each(visit: Visit) -> list[tuple[Visit, Visit]]:
    """Every visit below one, with its reader."""
    found = [(child, visit) for child in visit.children.values()]
    return found + [pair for child in visit.children.values() for pair in _each(child)]


def _measured(
    scrubber: Scrubber, visit: Visit, metrics: list[Metric], resamples: int, progress: tqdm
) -> dict[str, Float[Tensor, "N resamples"]]:
    """Each metric of each prompt in each of its runs."""
    values: dict[str, list[Tensor]] = {metric.name: [] for metric in metrics}
    for references, logits in scrubber.runs(visit):
        found = metrics_of(scrubber.prompts, scrubber.logits, logits, references, metrics)
        for name, value in found.items():
            values[name].append(value)
        progress.update(len(references))
    return {name: torch.cat(parts).view(resamples, -1).T for name, parts in values.items()}


def metrics_of(
    prompts: Prompts,
    model: Float[Tensor, "N P V"],
    logits: Float[Tensor, "M P V"],
    references: Int[Tensor, " M"],
    metrics: list[Metric],
) -> dict[str, Float[Tensor, " M"]]:
    """Metrics of logits against what is right for some of the prompts, and what the model says."""
    chosen = prompts.select(references).to(logits.device)
    scored = chosen.positions.shape[1]
    own = model[references, :scored]
    return {
        metric.name: metric(logits[:, :scored], chosen, own).double().cpu() for metric in metrics
    }
