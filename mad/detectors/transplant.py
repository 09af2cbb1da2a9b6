"""Does what the circuit calls irrelevant in an input change the answer of trusted inputs?

A circuit claims that the edges off it carry nothing that matters: their values on one input might
as well be those on another.  So put the values that they have on the input x into trusted prompts,
the hosts y, and see whether the hosts' outputs move:

    score(x) = mean over hosts y and circuits C of KL(M(y) || C(y; x)), nats

where M is the model and C(y; x) runs on y's tokens with every edge off the circuit carrying what
its writer writes on x.  A second mechanism that works through edges off the circuit acts on the
hosts too, even when its answer on x is the normal one; novelty that the circuit itself handles
stays behind with x.

It is resampling ablation (Chan et al. 2022, causal scrubbing; Conmy et al. 2023, arXiv 2304.14997)
with the roles turned round: the input under suspicion is the donor.  The use as an anomaly score is
this library's own.

A circuit that keeps an edge it does not need is blind to what comes over that edge, so `strict`
finds more circuits in the same way on redrawn trusted prompts (`mad.redrawn`).

x and a host are aligned at the last position that each is scored at (its last token, unless said
otherwise), the first token (an attention sink) with the first.  So in a causal model a prompt that
is scored at one position has the score of what it is up to there.  Where a host is scored at
further positions, these take what stands before.

An explanation shares the score out over the edges off the circuit (`mad.attribution`), from C(y; x)
to M(y), where the score is 0.  Each host has its own points of the integral, so that with as many
points as hosts it costs one forward and one backward pass of each: with the run that tells
rounding, some four times what the score does.

Shapes: prompts B, hosts K, positions S (of x) and T (of hosts), d_model D, readers R, writers W.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from circuits.batches import in_batches
from circuits.circuit import Circuit
from circuits.engine import Engine
from circuits.engine.masked import Ablated, Place
from circuits.engine.memory import Footprint, footprint, most_prompts, parse_memory
from circuits.files import restored_tensors
from circuits.metrics import METRICS
from circuits.prompts import NONE, Prompts
from mad.attribution import explanation_bytes, integrated, midpoints, rounding, shares
from mad.detector import Context, Explained
from mad.detectors.alignment import aligned, check_positions, ends
from mad.detectors.settings import check_at_least_one, check_steps
from mad.redrawn import further_circuits, restored_masks, stacked

log = logging.getLogger(__name__)

# of a prompt and a host at once, and what they take: more gain nothing
MOST_PAIRS, MOST_BYTES = 128, 256 * 10**6


@dataclass
class Fast:
    """The input's off-circuit part in some trusted prompts, by the extracted circuit."""

    name: str = "fast"
    # trusted prompts that parts of an input are put into, at most: with four of them a single one
    # that trusted inputs move a lot can hide a whole backdoor (docs/does-it-work.md)
    hosts: int = 16
    circuits: int = 1  # the first is the one that was extracted
    # points of the integral when a score is explained, spread over the hosts, at least one of each:
    # forward and backward passes of one host, by each circuit
    explain_steps: int = 16

    def check(self) -> None:
        """Raises ValueError when a setting is out of range."""
        check_at_least_one(self, "hosts", "circuits")
        check_steps(self, "explain_steps")


@dataclass
class Strict(Fast):
    """The same by several circuits: no edge too many hides anything."""

    name: str = "strict"
    # the first is the one that was extracted, the others are found by its method on redrawn prompts
    circuits: int = 3


@dataclass(frozen=True)
class TransplantDetector:
    """A circuit and the hosts, with the model's own logits on them."""

    config: Fast
    engine: Engine
    circuit: Circuit
    masks: Float[Tensor, "C R W *T"]  # of all circuits; the first is `circuit`
    hosts: Prompts
    reference: Float[Tensor, "K P V"]
    scores_under = "resample"

    @torch.no_grad()
    def score(self, prompts: Prompts, *, memory: str = "2GB") -> Float[Tensor, "B"]:
        """How far the hosts' outputs move, on average.

        Raises:
            InputError: the circuit tells positions apart, and a prompt has another length than its
                prompts or is scored elsewhere than every host; or a prompt is scored at several
                positions and every host at one, so that all but the last would be ignored.
        """
        moved = transplanted(
            self.engine, self.masks, self.hosts, prompts, self.reference, memory=memory
        )
        return moved.mean((0, 2))

    @torch.no_grad()
    def noise(self, prompts: Prompts, *, memory: str = "2GB") -> Float[Tensor, "B"]:
        """How far the hosts' outputs move when all that is put into them is left out again."""
        every = self.engine.graph.exists.to(self.masks)[None]
        moved = transplanted(self.engine, every, self.hosts, prompts, self.reference, memory=memory)
        return rounding(self.engine, moved.abs().mean((0, 2)))

    def explain(
        self, prompts: Prompts, *, scores: Float[Tensor, "B"] | None = None, memory: str = "2GB"
    ) -> Iterator[Explained]:
        """Yields shares of the score by edge, for prompts that are run at once."""
        engine, n_hosts = self.engine, len(self.hosts)
        scores = self.score(prompts, memory=memory) if scores is None else scores
        scores = scores.to(engine.device)
        noise = self.noise(prompts, memory=memory).to(engine.device)
        for rows, pairs in _pairs(engine, self.hosts, prompts, memory, explanation_bytes):
            total = torch.zeros(len(rows), *engine.graph.exists.shape, device=engine.device)
            for columns, ablated in pairs:
                run, reference = _repeated(self.hosts, self.reference, columns, len(rows))
                moved = functools.partial(
                    _moved, engine, run=run, ablated=ablated, reference=reference, per_example=True
                )
                steps = -(-self.config.explain_steps // n_hosts)  # of each host
                points = midpoints(steps, ((columns + 0.5) / n_hosts).repeat(len(rows)))
                for mask in self.masks:
                    parts = integrated(engine, mask, points, moved)
                    of_prompts = parts.unflatten(0, (len(rows), -1)).sum(1)
                    total += of_prompts / n_hosts / len(self.masks)
            yield shares(total, scores[rows], noise[rows])

    def state(self) -> dict[str, Tensor]:
        """The hosts and the further circuits; the first is saved beside the detector."""
        hosts = {
            "clean": self.hosts.clean,
            "lengths": self.hosts.lengths,
            "positions": self.hosts.positions,
        }
        return hosts if len(self.masks) == 1 else hosts | {"masks": self.masks[1:].bool()}


@torch.no_grad()
def transplanted(
    engine: Engine,
    masks: Float[Tensor, "C R W *T"],
    hosts: Prompts,
    prompts: Prompts,
    reference: Float[Tensor, "K P V"] | None = None,
    *,
    memory: str = "2GB",
) -> Float[Tensor, "C B K"]:
    """Returns KL(M(y) || C(y; x)) for each circuit C, prompt x and host y, in nats, on the CPU.

    Args:
        reference: the model's logits on the hosts, if they are known.

    Raises:
        InputError: edges are told apart by position, and a prompt has another length than theirs or
            is scored elsewhere than every host; or it is scored at several positions, and every
            host at one.
        TooLittleMemory: not even one prompt fits with one host.
    """
    hosts = hosts.to(engine.device)
    reference = model_logits(engine, hosts, memory=memory) if reference is None else reference
    result = torch.empty(len(masks), len(prompts), len(hosts), device=engine.device)
    for rows, pairs in _pairs(engine, hosts, prompts, memory, lambda size: size.masked()):
        for columns, ablated in pairs:
            run, expected = _repeated(hosts, reference, columns, len(rows))
            for circuit, mask in enumerate(masks):
                moved = _moved(engine, mask, run, ablated, expected)
                moved = moved.unflatten(0, (len(rows), -1)).float()
                result[circuit, rows[:, None], columns] = moved
    return result.cpu()


def model_logits(
    engine: Engine, prompts: Prompts, *, memory: str = "2GB"
) -> Float[Tensor, "B P V"]:
    """Returns the model's logits at the scored positions."""
    batches = in_batches(engine, prompts, lambda size: size.plain, memory=memory)
    logits = [engine.logits(batch) for batch in batches]
    width = max(part.shape[1] for part in logits)  # a batch may have fewer scored positions
    padded = [torch.nn.functional.pad(part, (0, 0, 0, width - part.shape[1])) for part in logits]
    return torch.cat(padded)


Pairs = Iterator[tuple[Int[Tensor, "k"], Ablated]]  # rows of hosts, and what removed edges carry


def _pairs(
    engine: Engine, hosts: Prompts, prompts: Prompts, memory: str, cost: Callable[[Footprint], int]
) -> Iterator[tuple[Int[Tensor, "b"], Pairs]]:
    """Yields rows of prompts, and the pairs of them with hosts, as many at a time as fit."""
    check_positions(engine, hosts, prompts)
    at_once = _pairs_at_once(engine, hosts, prompts, memory, cost)
    columns = torch.arange(len(hosts), device=engine.device).split(at_once)
    for rows in torch.arange(len(prompts)).split(max(1, at_once // len(hosts))):
        batch = prompts.select(rows).to(engine.device)
        yield rows.to(engine.device), _with_hosts(engine, hosts, columns, batch)


@torch.no_grad()
def _with_hosts(
    engine: Engine, hosts: Prompts, columns: Sequence[Tensor], prompts: Prompts
) -> Pairs:
    """Yields what edges off the circuit carry in runs of some hosts, for all of some prompts."""
    writers, per_position = engine.writers(prompts), engine.graph.n_positions is not None
    # Without causality, what comes after the scored position is part of the input too.
    own, reach = ends(prompts), ends(prompts) if engine.graph.causal else prompts.lengths
    for some in columns:
        shift = own[:, None] - ends(hosts)[some]
        if per_position:  # each edge has its own place
            shift, reach = torch.zeros_like(shift), prompts.lengths
        index = aligned(reach, shift, int(hosts.lengths[some].max()))
        if len(prompts) == 1 and not (index - index[:, :1]).any():  # one row for all hosts
            index = index[:, :1]
        rows = torch.arange(len(prompts), device=index.device).repeat_interleave(index.shape[1])
        yield some, engine.ablated(writers, Place(rows, index.flatten(0, 1)))


def _pairs_at_once(
    engine: Engine, hosts: Prompts, prompts: Prompts, memory: str, cost: Callable[[Footprint], int]
) -> int:
    """How many pairs of a prompt and a host are run at once."""
    budget = parse_memory(memory)
    each, shared = pair_bytes(engine, hosts, prompts, cost)
    most_prompts(prompts, each, budget, shared)  # refuses what does not fit
    return max(1, min((min(budget, MOST_BYTES) - shared) // each, MOST_PAIRS))


def pair_bytes(
    engine: Engine, hosts: Prompts, prompts: Prompts, cost: Callable[[Footprint], int]
) -> tuple[int, int]:
    """Returns what a pair of a prompt and a host takes at most, and what pairs share.

    `cost` is that of a host's run.  All pairs of a prompt take their values from it.
    """
    size, donor = footprint(engine, hosts), footprint(engine, prompts).donor
    return cost(size) + size.placed + donor // len(hosts), donor + size.mask


def _repeated(
    hosts: Prompts, reference: Float[Tensor, "K P V"], columns: Int[Tensor, "k"], times: int
) -> tuple[Prompts, Float[Tensor, "n p V"]]:
    """Some hosts with the model's logits on them, all of them again and again."""
    chosen = hosts.select(columns)
    expected = reference[columns, : chosen.positions.shape[1]]
    return chosen.select(torch.arange(len(chosen)).repeat(times)), expected.repeat(times, 1, 1)


def _moved(
    engine: Engine,
    mask: Tensor,
    run: Prompts,
    ablated: Ablated,
    reference: Tensor,
    *,
    per_example: bool = False,
) -> Float[Tensor, "n"]:
    """KL from the model's logits to those of a run under a mask, or under one mask per row."""
    logits = engine.masked(run, mask, ablated, per_example=per_example)
    return METRICS["kl"](logits, run, reference)


def fit_transplant(
    config: Fast, context: Context, trusted: Prompts, *, memory: str = "2GB"
) -> TransplantDetector:
    """Returns the detector whose hosts are the first trusted prompts; further circuits are found on
    the others.

    Where there are fewer trusted prompts than `hosts`, all are hosts, as a warning and the
    detector's configuration say.

    Raises:
        ValueError: no circuit, fewer trusted prompts than it takes, or a setting out of range.
    """
    config.check()
    circuit, engine = context.circuit_for(config.name), context.engine
    config = _with_hosts_that_are_there(config, len(trusted))
    hosts, rest = trusted.select(slice(config.hosts)), trusted.select(slice(config.hosts, None))
    further = further_circuits(circuit, engine, rest, config.circuits - 1, memory=memory)
    return _build(config, context, hosts.bare(), stacked(circuit, further), memory)


def _with_hosts_that_are_there(config: Fast, n_trusted: int) -> Fast:
    least = config.hosts + 2 if config.circuits > 1 else 1
    if n_trusted < least:
        raise ValueError(
            f"circuits={config.circuits} and hosts={config.hosts} need at least {least} trusted "
            f"prompts to fit on, but there are {n_trusted}; give more, or lower circuits and hosts"
        )
    if n_trusted >= config.hosts:
        return config
    log.warning(
        "hosts=%d, but there are %d trusted prompts to fit on, and all are hosts: few hosts can "
        "hide an anomaly; give more",
        config.hosts,
        n_trusted,
    )
    return replace(config, hosts=n_trusted)


def restore_transplant(
    config: Fast, context: Context, state: Mapping[str, Tensor], *, memory: str = "2GB"
) -> TransplantDetector:
    """Returns a saved detector."""
    config.check()
    engine = context.engine
    hosts = _restored_hosts(engine, config.hosts, state)
    masks = restored_masks(context.circuit_for(config.name), config.circuits, state)
    return _build(config, context, hosts, masks, memory)


def _restored_hosts(engine: Engine, count: int, state: Mapping[str, Tensor]) -> Prompts:
    """The saved hosts; TypeError where they are no prompts of the model."""
    kept = {name: state[name] for name in ("clean", "lengths", "positions")}
    hosts = restored_tensors(_Hosts, kept, K=count)
    tokens, lengths, positions = hosts.clean, hosts.lengths, hosts.positions
    width, vocabulary = tokens.shape[1], engine.model.vocabulary
    bounds = {
        "clean": (tokens, 0, vocabulary - 1),
        "lengths": (lengths, 1, min(width, engine.architecture.context)),
        "positions": (positions, NONE, lengths[:, None] - 1),
    }
    for name, (values, least, most) in bounds.items():
        if ((values < least) | (values > most)).any():
            raise TypeError(f"{name} is out of range")
    if not (positions != NONE).any(1).all():
        raise TypeError("positions names none in some host")
    return Prompts.from_tokens(tokens, lengths=lengths, positions=positions)


@dataclass(frozen=True)
class _Hosts:
    """Hosts as they are saved."""

    clean: Int64[Tensor, "K S"]
    lengths: Int64[Tensor, "K"]
    positions: Int64[Tensor, "K P"]


def _build(
    config: Fast, context: Context, hosts: Prompts, masks: Float[Tensor, "C R W *S"], memory: str
) -> TransplantDetector:
    circuit, engine = context.circuit_for(config.name), context.engine
    hosts = hosts.to(engine.device)
    reference = model_logits(engine, hosts, memory=memory)
    return TransplantDetector(config, engine, circuit, masks, hosts, reference)
