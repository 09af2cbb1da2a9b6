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

A circuit that keeps an edge it does not need is blind to what comes over that edge, and greedy
discovery keeps some such edges.  Which ones is a matter of the prompts that it sees, so `strict`
finds more circuits in the same way on redrawn trusted prompts.

x and a host of different lengths are aligned at their ends, the first token (an attention sink)
with the first.

An explanation shares the score out over the edges off the circuit, by integrated gradients along
the mask as in `mad.detectors.circuit`, from C(y; x) to M(y), where the score is 0.

Shapes: prompts B, hosts K, positions S (of x) and T (of hosts), d_model D, readers R, writers W.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.circuit import Circuit
from circuits.engine import Engine
from circuits.engine.masked import Ablated
from circuits.engine.memory import Footprint, footprint, most_prompts, parse_memory
from circuits.extraction import rediscover
from circuits.metrics import METRICS
from circuits.prompts import Prompts
from mad.detector import Context, Explained
from mad.detectors.circuit import integrated

MOST_PAIRS = 128  # of a prompt and a host at once: more gain nothing


@dataclass
class Fast:
    """The input's off-circuit part in a few trusted prompts."""

    name: str = "fast"
    hosts: int = 4  # trusted prompts that parts of an input are put into
    circuits: int = 1  # the first is the one that was extracted
    explain_steps: int = 16  # points of the integral when a score is explained

    def check(self) -> None:
        """Raises ValueError when a setting is out of range."""
        _check(self)


@dataclass
class Strict:
    """The same in more trusted prompts, and by several circuits, so that no one edge too many hides
    a mechanism.
    """

    name: str = "strict"
    hosts: int = 16  # trusted prompts that parts of an input are put into
    # the first is the one that was extracted, the others are found by its method on redrawn prompts
    circuits: int = 3
    explain_steps: int = 16  # points of the integral when a score is explained

    def check(self) -> None:
        """Raises ValueError when a setting is out of range."""
        _check(self)


def _check(config: Fast | Strict) -> None:
    for name in ("hosts", "circuits", "explain_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}, but at least 1 is needed")


@dataclass(frozen=True)
class TransplantDetector:
    """A circuit and the hosts, with the model's own logits on them."""

    config: Fast | Strict
    engine: Engine
    circuit: Circuit
    masks: Float[Tensor, "C R W *T"]  # of all circuits; the first is `circuit`
    hosts: Prompts
    reference: Float[Tensor, "K P V"]

    @torch.no_grad()
    def score(self, prompts: Prompts, *, memory: str = "2GB") -> Float[Tensor, "B"]:
        """How far the hosts' outputs move, on average.

        Raises: ValueError: the circuit tells positions apart, and a prompt has another length than
            its prompts.
        """
        moved = transplanted(
            self.engine, self.masks, self.hosts, prompts, self.reference, memory=memory
        )
        return moved.mean((0, 2))

    def explain(self, prompts: Prompts, *, memory: str = "2GB") -> Explained:
        """Shares of the score by edge, from one forward and backward pass per point of the integral
        and host.
        """
        engine, steps = self.engine, self.config.explain_steps
        scores = self.score(prompts, memory=memory).to(engine.device)
        total = torch.zeros(len(prompts), *engine.graph.exists.shape, device=engine.device)
        for rows, hosts, ablated in _pairs(
            engine, self.hosts, prompts, memory, lambda size: size.explanation
        ):
            run, reference = _repeated(self.hosts, self.reference, hosts, len(rows))
            moved = functools.partial(
                _moved, engine, run=run, ablated=ablated, reference=reference, per_example=True
            )
            for mask in self.masks:
                parts = integrated(engine, mask, len(run), steps, moved)
                total[rows] += (
                    parts.unflatten(0, (len(rows), -1)).sum(1) / len(self.hosts) / len(self.masks)
                )
        shares = total.flatten(1) / scores.clamp(min=torch.finfo(scores.dtype).tiny)[:, None]
        return Explained(shares.view(total.shape).cpu(), (1 - shares.sum(1)).cpu())

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
        ValueError: edges are told apart by position, and a prompt has another length than theirs.
        TooLittleMemory: not even one prompt fits with one host.
    """
    hosts = hosts.to(engine.device)
    reference = model_logits(engine, hosts, memory=memory) if reference is None else reference
    result = torch.empty(len(masks), len(prompts), len(hosts), device=engine.device)
    for rows, columns, ablated in _pairs(
        engine, hosts, prompts, memory, lambda size: size.masked()
    ):
        run, expected = _repeated(hosts, reference, columns, len(rows))
        for circuit, mask in enumerate(masks):
            moved = _moved(engine, mask, run, ablated, expected)
            result[circuit, rows[:, None], columns] = moved.unflatten(0, (len(rows), -1)).float()
    return result.cpu()


@torch.no_grad()
def model_logits(
    engine: Engine, prompts: Prompts, *, memory: str = "2GB"
) -> Float[Tensor, "B P V"]:
    """Returns the model's logits at the scored positions."""
    batches = prompts.batches(
        most_prompts(prompts, footprint(engine, prompts).plain, parse_memory(memory))
    )
    batches = [batch.to(engine.device) for batch in batches]
    logits = [engine.logits(batch.clean, batch.key_mask, batch.positions) for batch in batches]
    width = max(
        part.shape[1] for part in logits
    )  # prompts of a batch may have fewer scored positions
    return torch.cat(
        [torch.nn.functional.pad(part, (0, 0, 0, width - part.shape[1])) for part in logits]
    )


def aligned(
    writers: Float[Tensor, "W B S D"],
    lengths: Int[Tensor, "B"],
    host_lengths: Int[Tensor, "K"],
    n_positions: int,
) -> Float[Tensor, "W B own T D"]:
    """Returns what writers write on prompts, at the place of each position of the hosts; own is 1
    if all are alike.

    Position p of a host of n tokens takes position p + m - n of a prompt of m tokens, within 1 to m
    - 1, so that both end at the same place; position 0 takes position 0.
    """
    shift = lengths[:, None] - host_lengths  # [B, K]
    if not shift.any():
        return writers[:, :, None, :n_positions]
    index = torch.arange(n_positions, device=writers.device) + shift[..., None]  # [B, K, T]
    index = index.clamp(min=1).minimum((lengths - 1).clamp(min=0)[:, None, None])
    index[..., 0] = 0
    return writers[:, torch.arange(len(lengths), device=writers.device)[:, None, None], index]


def _pairs(
    engine: Engine, hosts: Prompts, prompts: Prompts, memory: str, cost: Callable[[Footprint], int]
) -> Iterator[tuple[Int[Tensor, "b"], Int[Tensor, "k"], Ablated]]:
    """Yields rows of prompts, rows of hosts, and what edges off the circuit carry in each pair of
    them.
    """
    graph = engine.graph
    if graph.n_positions is not None and (
        other := set(prompts.lengths.tolist()) - {graph.n_positions}
    ):
        raise ValueError(
            f"prompts of {min(other)} tokens, but edges are told apart by position for prompts of "
            "exactly "
            f"{graph.n_positions}"
        )
    size, whole = footprint(engine, hosts), footprint(engine, prompts)
    pair = cost(size) + size.prepared(True)
    pairs = _pairs_at_once(prompts, whole, pair, memory, size.mask)
    columns = torch.arange(len(hosts), device=engine.device).split(pairs)
    for rows in torch.arange(len(prompts)).split(max(1, pairs // len(hosts))):
        batch = prompts.select(rows).to(engine.device)
        with torch.no_grad():
            anywhere = batch.positions[:, :1] * 0  # its logits are not needed
            writers = engine.clean(batch.clean, batch.key_mask, anywhere).writers
        for some in columns:
            lengths = hosts.lengths[some]
            values = aligned(writers, batch.lengths, lengths, int(lengths.max()))
            if len(batch) > 1:  # one prompt's values are the same for all hosts, and stay one row
                values = values.expand(-1, -1, len(some), -1, -1)
            with torch.no_grad():
                ablated = engine.ablated(values.flatten(1, 2))
            yield rows.to(engine.device), some, ablated


def _pairs_at_once(prompts: Prompts, size: Footprint, pair: int, memory: str, shared: int) -> int:
    """How many pairs of a prompt and a host are run at once."""
    budget = parse_memory(memory)
    most_prompts(prompts, size.clean + pair, budget, shared)  # refuses what does not fit
    return min((budget - shared) // (size.clean + pair), MOST_PAIRS)


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
    logits = engine.masked(
        run.clean,
        mask,
        ablated,
        key_mask=run.key_mask,
        positions=run.positions,
        per_example=per_example,
    )
    return METRICS["kl"](logits, run, reference)


def fit_transplant(
    config: Fast | Strict, context: Context, trusted: Prompts, *, memory: str = "2GB"
) -> TransplantDetector:
    """Returns the detector whose hosts are the first trusted prompts; further circuits are found on
    the others.

    Raises:
        ValueError: no circuit, fewer trusted prompts than it takes, or a setting out of range.
    """
    config.check()
    if len(trusted) < config.hosts:
        raise ValueError(
            f"hosts={config.hosts}, but there are {len(trusted)} trusted prompts to fit on; give "
            "more, or lower hosts"
        )
    hosts = trusted.select(range(config.hosts))
    bare = replace(hosts, corrupt=None, answers=None, wrong_answers=None, labels=None)
    return _build(config, context, bare, _more_circuits(config, context, trusted, memory), memory)


def _more_circuits(
    config: Fast | Strict, context: Context, trusted: Prompts, memory: str
) -> list[Bool[Tensor, "R W *T"]]:
    """Circuits found by the first one's method on trusted prompts that are redrawn, with
    replacement, each time.
    """
    if config.circuits == 1 or context.circuit is None:
        return []
    rest = trusted.select(slice(config.hosts, None))
    found_on = (
        context.circuit.about.get("splits", {}).get("discovery", {}).get("prompts", len(rest))
    )
    if len(rest) < 2:
        raise ValueError(
            f"circuits={config.circuits} and hosts={config.hosts} need at least {config.hosts + 2} "
            "trusted prompts to "
            f"fit on, but there are {len(trusted)}; give more, or lower circuits and hosts"
        )
    found = []
    for number in range(1, config.circuits):
        drawn = redrawn(rest, min(len(rest), found_on), seed=number)
        found.append(rediscover(context.circuit, context.engine, drawn, memory=memory))
    return found


def redrawn(prompts: Prompts, count: int, seed: int) -> Prompts:
    """Returns so many of some prompts, drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    return prompts.select(torch.randint(len(prompts), (count,), generator=generator))


def restore_transplant(
    config: Fast | Strict, context: Context, state: Mapping[str, Tensor]
) -> TransplantDetector:
    """Returns a saved detector."""
    ids = tuple(f"host-{row}" for row in range(len(state["clean"])))
    hosts = Prompts(
        clean=state["clean"],
        lengths=state["lengths"],
        corrupt=None,
        positions=state["positions"],
        answers=None,
        wrong_answers=None,
        labels=None,
        ids=ids,
    )
    return _build(config, context, hosts, list(state.get("masks", [])), "2GB")


def _build(
    config: Fast | Strict, context: Context, hosts: Prompts, more: Sequence[Tensor], memory: str
) -> TransplantDetector:
    circuit, hosts = context.circuit_for(config.name), hosts.to(context.engine.device)
    reference = model_logits(context.engine, hosts, memory=memory)
    masks = torch.stack([circuit.mask, *(mask.float() for mask in more)])
    return TransplantDetector(config, context.engine, circuit, masks, hosts, reference)
