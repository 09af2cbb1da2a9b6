"""What the values on edges off a circuit do: to the output, by edge, and to runs that they are put
into.

    effects           part(e) = - integral over alpha of dKL / dm_e    at mask  circuit + alpha (1 - circuit),
                      of the output KL between model and circuit, which the parts sum to (Sundararajan et al. 2017,
                      arXiv 1703.01365); as in `mad.detectors.circuit`
    donated           the run of an input x whose edges off the circuit carry the values that their writers have on a
                      trusted donor
    hosts_routing     the reverse: the run of a trusted host whose edges off the circuit carry x's values

Both are resampling ablation (Chan et al. 2022, causal scrubbing; Conmy et al. 2023, arXiv
2304.14997).  Prompts of different lengths are aligned at their ends, as in
`mad.detectors.transplant`.  Routing is that of `mad.departure`: the model's log-odds of the key
that a head attends to most, less those in the run under the circuit.

Shapes: prompts B, scored positions P, donors or hosts K, positions S, removed edges E, heads that
the circuit keeps h, readers R, writers W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.engine import Clean, Engine
from circuits.engine.masked import Ablated, Seen
from circuits.engine.memory import footprint, most_prompts, parse_memory
from circuits.metrics import METRICS
from circuits.model.attention import attention_scores
from circuits.prompts import Prompts
from mad.departure import log_odds, over_positions
from mad.detectors.circuit import integrated
from mad.detectors.transplant import aligned
from mad.study.lens import Lens

MEMORY = "500MB"
STEPS = 8  # midpoints of the integral


def removed(lens: Lens) -> Bool[Tensor, "R W *S"]:
    """The edges off the circuit."""
    return lens.engine.graph.exists & ~lens.mask.cpu()


# ---- on the output, by edge
# -------------------------------------------------------------------------


def effects(
    lens: Lens, prompts: Prompts, *, steps: int = STEPS, memory: str = MEMORY
) -> Float[Tensor, "B E"]:
    """Returns each removed edge's part in the KL between model and circuit, nats; edges in the
    order of the mask.
    """
    size = footprint(lens.engine, prompts)
    shared = size.shared(lens.means.per_prompt) + size.mask
    batches = prompts.batches(
        most_prompts(prompts, size.plain + size.explanation, parse_memory(memory), shared)
    )
    return torch.cat([_effects(lens, batch.to(lens.engine.device), steps) for batch in batches])


def _effects(lens: Lens, prompts: Prompts, steps: int) -> Float[Tensor, "B E"]:
    engine, off = lens.engine, removed(lens).to(lens.engine.device)
    with torch.no_grad():
        reference = engine.logits(prompts.clean, prompts.key_mask, prompts.positions)
        ablated = lens.means.values(engine, prompts)

    def kl(masks: Float[Tensor, "B R W *S"]) -> Float[Tensor, "B"]:
        logits = engine.masked(
            prompts.clean,
            masks,
            ablated,
            key_mask=prompts.key_mask,
            positions=prompts.positions,
            per_example=True,
        )
        return METRICS["kl"](logits, prompts, reference)

    return integrated(engine, lens.mask.float(), len(prompts), steps, kl)[:, off].cpu()


# ---- on runs that they are put into
# -----------------------------------------------------------------


@dataclass(frozen=True)
class Donated:
    """What an input's runs with the off-circuit values of several donors are like; on the CPU."""

    output: Float[Tensor, "B"]  # mean over donors of KL(model || run), nats
    variance: Float[Tensor, "B"]  # over donors, of the log-probability of the model's first choice
    routing: Float[Tensor, "B h"]  # mean over donors of the departures


@torch.no_grad()
def donated(lens: Lens, prompts: Prompts, donors: Prompts, *, memory: str = MEMORY) -> Donated:
    """Returns what becomes of inputs when edges off the circuit carry the donors' values.

    Raises:
        ValueError: edges are told apart by position, and a prompt has another length than theirs.
        TooLittleMemory: not even one prompt fits.
    """
    engine, donors = lens.engine, donors.to(lens.engine.device)
    writers = engine.clean(donors.clean, donors.key_mask, donors.positions[:, :1] * 0).writers
    size = footprint(engine, prompts)
    shared = writers.nbytes + size.mask
    batches = prompts.batches(
        most_prompts(prompts, size.observed + size.prepared(True), parse_memory(memory), shared)
    )
    parts = [_donated(lens, batch.to(engine.device), donors, writers) for batch in batches]
    return Donated(
        torch.cat([part.output for part in parts]),
        torch.cat([part.variance for part in parts]),
        torch.cat([part.routing for part in parts]),
    )


def _donated(
    lens: Lens, prompts: Prompts, donors: Prompts, writers: Float[Tensor, "W K S D"]
) -> Donated:
    engine = lens.engine
    clean = engine.clean(prompts.clean, prompts.key_mask, prompts.positions, sides=True)
    pointed = _pointed(engine, prompts, clean)
    first = clean.logits.argmax(-1, keepdim=True)  # [B, P, 1]
    output, chosen, routing = [], [], []
    for row in range(len(donors)):
        values = aligned(
            writers[:, [row]], donors.lengths[[row]], prompts.lengths, prompts.clean.shape[1]
        )[:, 0]
        logits, departed = _run(engine, lens.mask, prompts, engine.ablated(values), pointed)
        output.append(METRICS["kl"](logits, prompts, clean.logits))
        chosen.append(logits.log_softmax(-1).gather(-1, first)[..., 0])
        routing.append(departed)
    variance = over_positions(torch.stack(chosen).var(0, correction=0), prompts)
    return Donated(
        torch.stack(output).mean(0).float().cpu(),
        variance.float().cpu(),
        torch.stack(routing).mean(0).float().cpu(),
    )


@torch.no_grad()
def hosts_routing(
    lens: Lens, prompts: Prompts, hosts: Prompts, *, memory: str = MEMORY
) -> Float[Tensor, "B h"]:
    """Returns how far hosts' heads depart when edges off the circuit carry an input's values; mean
    over hosts.

    Raises:
        ValueError: edges are told apart by position, and a prompt has another length than theirs.
        TooLittleMemory: not even one prompt fits.
    """
    engine, hosts = lens.engine, hosts.to(lens.engine.device)
    singles = [hosts.select([row]) for row in range(len(hosts))]
    pointed = [
        _pointed(engine, host, engine.clean(host.clean, host.key_mask, host.positions, sides=True))
        for host in singles
    ]
    size, longest = footprint(engine, prompts), footprint(engine, hosts)
    each = size.clean + longest.observed + longest.prepared(True)
    parts = []
    for batch in prompts.batches(most_prompts(prompts, each, parse_memory(memory), size.mask)):
        batch = batch.to(engine.device)
        writers = engine.clean(batch.clean, batch.key_mask, batch.positions[:, :1] * 0).writers
        total = torch.zeros((), device=engine.device)
        for host, theirs in zip(singles, pointed, strict=True):
            values = aligned(writers, batch.lengths, host.lengths, host.clean.shape[1])[:, :, 0]
            run = host.select([0] * len(batch))
            total = total + _run(engine, lens.mask, run, engine.ablated(values), theirs)[1]
        parts.append((total / len(hosts)).float().cpu())
    return torch.cat(parts)


Pointed = list[tuple[Int[Tensor, "heads #B P"], Float[Tensor, "heads #B P"]]]


def _pointed(engine: Engine, prompts: Prompts, clean: Clean) -> Pointed:
    """Of each layer's heads the key attended to most at the scored positions, and its log-odds."""
    found, at = [], prompts.positions.clamp(min=0)
    for block, (queries, keys) in zip(engine.architecture.blocks, clean.sides, strict=True):
        scores = attention_scores(
            engine.architecture, block.attention, queries, keys, prompts.key_mask, at=at
        )
        key = scores.argmax(-1)
        found.append((key, log_odds(scores, key)))
    return found


def _run(
    engine: Engine, mask: Tensor, prompts: Prompts, ablated: Ablated, pointed: Pointed
) -> tuple[Float[Tensor, "B P V"], Float[Tensor, "B h"]]:
    """The logits of a run under a mask, and how far its heads depart; `pointed` may have one row
    for all prompts.
    """
    at, departed = prompts.positions.clamp(min=0), []

    def compare(seen: Seen) -> None:
        if seen.queries is None or seen.keys is None:
            return
        attention = engine.architecture.blocks[seen.layer].attention
        heads = [writer - engine.graph.first_writer(seen.layer) for writer in seen.writers]
        key, odds = (values[heads] for values in pointed[seen.layer])
        theirs = attention_scores(
            engine.architecture,
            attention,
            seen.queries,
            seen.keys,
            prompts.key_mask,
            seen.kv_of_head,
            at=at,
        )
        key = key.expand(theirs.shape[:-1])
        departed.extend(over_positions(odds - log_odds(theirs, key), prompts))

    logits = engine.masked(
        prompts.clean,
        mask,
        ablated,
        key_mask=prompts.key_mask,
        positions=prompts.positions,
        observe=compare,
    )
    return logits, torch.stack(departed, 1) if departed else torch.zeros(
        len(prompts), 0, device=engine.device
    )
