"""Scores that need a circuit: one function each, from a lens to a score of prompts, high where an
input is anomalous.

M is the model, C its circuit under the lens' means; what is normalised is normalised on the lens'
fit part.

    output_kl            KL(M || C) of the output distributions, nats
    output_logit_diff    |d(M) - d(C)|, d = the logit of M's first choice less that of its second
    routing              distance of the heads' departures (`mad.departure`) from trusted ones
    routing_one_step     the same where each node is given M's values along its kept edges
    routing_max          largest |z| of a head's departure
    nodes                distance of log(|a(M) - a(C)|^2 + 1e-8) over the circuit's nodes from trusted ones
    nodes_max            largest z of a node's
    nodes_all_max        the same over all nodes, those that the circuit drops running on what C makes of their inputs
    off_circuit_inputs   for each reader that keeps an edge, distance of  sum over w off the circuit of (a_w - mean_w)
                         from trusted ones; the largest after each is divided by its trusted mean
    in_circuit_inputs    the same for the edges on the circuit: novelty that the circuit is there to handle
    effect_mass          sum over removed edges of |part(e)| in the output KL (`mad.study.effects`)
    effect_share_max     largest z of a removed edge's |part(e)|
    effect_share_tails   - sum over removed edges of log p(e),  p(e) = (1 + #{trusted >= |part(e)|}) / (n + 1)
    donated_answer       KL from M to runs whose edges off the circuit carry trusted donors' values; mean over 8 donors
    donated_variance     variance over the donors of the log-probability of M's first choice
    donated_routing      distance of the mean over donors of the heads' departures from trusted ones
    transplant           KL from M on trusted hosts to the hosts' runs with the input's values off the circuit; 16 hosts
    transplant_4         the same with 4 hosts
    transplant_routing   distance of the mean over 8 hosts of the hosts' departures from those of trusted inputs

A distance is a squared Mahalanobis distance after each column was standardised, with scikit-learn's
shrunk covariance (Lee et al. 2018, arXiv 1807.03888).  Columns without spread on the fit part are
left out.

Shapes: prompts B, scored positions of all of them N, trusted rows n, columns c, d_model D, removed
edges E, readers R, writers W.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from sklearn.covariance import ShrunkCovariance
from torch import Tensor

from circuits.circuit import Circuit
from circuits.engine.memory import footprint, most_prompts, parse_memory
from circuits.prompts import Prompts
from mad.departure import Departure
from mad.detectors.circuit import CircuitDetector, Deviation
from mad.detectors.transplant import Fast, Strict, transplanted
from mad.study.effects import MEMORY, Donated, donated, effects, hosts_routing, removed
from mad.study.lens import Lens

Score = Callable[[Prompts], Float[Tensor, "B"]]  # float32, on the CPU
Candidate = Callable[[Lens], Score]

# of the standardised covariance towards the identity: circuits have up to tens of correlated nodes
SHRINKAGE = 0.1
ROUNDING = 1e-6  # of the widest column: a narrower one does not vary, as far as float32 can tell
FLOOR = 1e-8  # of a node's departure, under which differences are rounding
EDGE_PROMPTS = 300  # that edges' parts are normalised on: each takes gradients
DONORS = 8
HOSTS, FEW_HOSTS, ROUTED_HOSTS = Strict().hosts, Fast().hosts, 8
INPUT_PROMPTS = 128  # whose readers' inputs are held at once


# ---- from numbers to a score
# ------------------------------------------------------------------------


def standardised(trusted: Float[Tensor, "n c"]) -> Callable[[Tensor], Tensor]:
    """Returns the function to z, by mean and spread of trusted rows; columns without spread are
    left out.
    """
    if not trusted.shape[1]:
        return lambda rows: rows.double()
    trusted = trusted.double()
    mean, spread = trusted.mean(0), trusted.std(0)
    varies = spread > ROUNDING * spread.max()
    mean, spread = mean[varies], spread[varies]
    return lambda rows: (rows.double()[:, varies] - mean) / spread


def distance(trusted: Float[Tensor, "n c"]) -> Callable[[Tensor], Tensor]:
    """Returns the function to the squared Mahalanobis distance from trusted rows; 0 where no column
    varies.
    """
    z = standardised(trusted)
    if not z(trusted).shape[1]:
        return lambda rows: torch.zeros(len(rows), dtype=torch.float64)
    fitted = ShrunkCovariance(shrinkage=SHRINKAGE, assume_centered=True).fit(z(trusted).numpy())
    precision = torch.from_numpy(fitted.precision_)
    return lambda rows: ((z(rows) @ precision) * z(rows)).sum(1)


def largest(trusted: Float[Tensor, "n c"], *, absolute: bool = False) -> Callable[[Tensor], Tensor]:
    """Returns the function to the largest z, or |z|, of a row; 0 where no column varies."""
    z = standardised(trusted)

    def score(rows: Tensor) -> Tensor:
        values = z(rows).abs() if absolute else z(rows)
        return values.amax(1) if values.shape[1] else torch.zeros(len(rows), dtype=torch.float64)

    return score


def normalised(
    lens: Lens, measure: Callable[[Prompts], Tensor], normalise: Callable[[Tensor], Callable]
) -> Score:
    """Returns a measure of prompts after a normalisation that is fitted on the lens' fit part."""
    value = normalise(measure(lens.fit))
    return lambda prompts: value(measure(prompts)).float()


# ---- departures
# -------------------------------------------------------------------------------------


def output_kl(lens: Lens) -> Score:
    """How far the circuit's output is from the model's."""
    return lambda prompts: lens.departure(prompts).output


def output_logit_diff(lens: Lens) -> Score:
    """The same by the logits of the model's first two choices."""
    circuit = Circuit(lens.engine.graph, lens.mask, lens.mask.float())
    detector = CircuitDetector(Deviation(deviation="logit_diff"), lens.engine, circuit, lens.means)
    return lambda prompts: detector.score(prompts, memory=MEMORY)


def routing(lens: Lens, *, one_step: bool = False) -> Score:
    """How unusually the heads' routing departs."""
    return normalised(
        lens, lambda prompts: lens.departure(prompts, one_step=one_step).routing, distance
    )


def routing_max(lens: Lens) -> Score:
    """How unusually the routing of the most unusual head departs."""
    return normalised(
        lens, lambda prompts: lens.departure(prompts).routing, partial(largest, absolute=True)
    )


def nodes(lens: Lens) -> Score:
    """How unusually what the circuit's nodes write departs."""
    return normalised(lens, lambda prompts: logarithm(lens.departure(prompts)), distance)


def nodes_max(lens: Lens) -> Score:
    """How far the node departs that does so more than usual."""
    return normalised(lens, lambda prompts: logarithm(lens.departure(prompts)), largest)


def nodes_all_max(lens: Lens) -> Score:
    """The same over all nodes of the model."""
    return nodes_max(with_all_nodes(lens))


def with_all_nodes(lens: Lens) -> Lens:
    """The lens with all edges to the logits: every node is run, on the same inputs as before; its
    output is not C's.
    """
    mask = lens.mask.clone()
    mask[-1] = True
    return lens.through(mask)


def logarithm(departure: Departure) -> Float[Tensor, "B c"]:
    """Node departures over orders of magnitude."""
    return (departure.nodes + FLOOR).log()


# ---- inputs of readers
# ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Differences:
    """What writers write less their means, at the scored positions of all prompts."""

    values: Float[Tensor, "W N D"]
    positions: Int[Tensor, "N"]
    prompt: Int[Tensor, "N"]  # whose position it is


@torch.no_grad()
def differences(lens: Lens, prompts: Prompts) -> Differences:
    """Returns the differences a_w - mean_w."""
    engine, size = lens.engine, footprint(lens.engine, prompts)
    prompt, column = (prompts.positions >= 0).nonzero(as_tuple=True)
    positions, row = prompts.positions[prompt, column], 0
    values = torch.empty(
        len(engine.graph.writers),
        len(positions),
        size.width,
        device=engine.device,
        dtype=engine.dtype,
    )
    for batch in prompts.batches(most_prompts(prompts, 2 * size.clean, parse_memory(MEMORY))):
        batch = batch.to(engine.device)
        writers = engine.clean(batch.clean, batch.key_mask, batch.positions[:, :1] * 0).writers
        change = writers - lens.means.writers(engine, batch)
        owner, place = (batch.positions >= 0).nonzero(as_tuple=True)
        values[:, row : row + len(owner)] = change[:, owner, batch.positions[owner, place]]
        row += len(owner)
    return Differences(values.cpu(), positions.cpu(), prompt.cpu())


def carried(edges: Bool[Tensor, "R W *S"], reader: int, given: Differences) -> Float[Tensor, "N D"]:
    """Returns what a reader gets over some edges beyond the means, at the position that is scored."""
    of_reader = edges[reader].to(given.values.dtype)
    if of_reader.ndim == 1:
        return torch.einsum("w,wnd->nd", of_reader, given.values)
    return torch.einsum("wn,wnd->nd", of_reader[:, given.positions], given.values)


def inputs(lens: Lens, edges: Bool[Tensor, "R W *S"]) -> Score:
    """How unusual what the readers of the circuit get over some edges is."""
    readers = lens.mask.flatten(1).any(1).nonzero()[:, 0].tolist()
    trusted, fitted = differences(lens, lens.fit), []
    for reader in readers:
        rows = carried(edges, reader, trusted)
        unusual = distance(rows)
        if (usual := unusual(rows).mean()) > 0:
            fitted.append((reader, unusual, usual))

    def score(prompts: Prompts) -> Tensor:
        given = differences(lens, prompts)
        most = torch.zeros(len(prompts), dtype=torch.float64)
        for reader, unusual, usual in fitted:
            total = most.new_zeros(len(most)).index_add_(
                0, given.prompt, unusual(carried(edges, reader, given))
            )
            most = most.maximum(total / given.prompt.bincount(minlength=len(most)) / usual)
        return most.float()

    return lambda prompts: torch.cat([score(batch) for batch in prompts.batches(INPUT_PROMPTS)])


def off_circuit_inputs(lens: Lens) -> Score:
    """How unusual what comes to the circuit over edges off it is."""
    return inputs(lens, removed(lens))


def in_circuit_inputs(lens: Lens) -> Score:
    """How unusual what comes over the circuit's own edges is."""
    return inputs(lens, lens.mask.cpu())


# ---- effects of edges off the circuit
# ---------------------------------------------------------------


def parts(lens: Lens, prompts: Prompts) -> Float[Tensor, "B E"]:
    """|part(e)| of each removed edge."""
    return lens.remember("effects", prompts, lambda some: effects(lens, some).abs())


def trusted_parts(lens: Lens) -> Float[Tensor, "n E"]:
    """The same on the first prompts of the fit part."""
    few = slice(EDGE_PROMPTS)
    return lens.remember(
        "trusted effects", lens.fit, lambda fit: effects(lens, fit.select(few)).abs()
    )


def effect_mass(lens: Lens) -> Score:
    """How much edges off the circuit do to the output, for and against."""
    return lambda prompts: parts(lens, prompts).sum(1)


def effect_share_max(lens: Lens) -> Score:
    """How much more than usual the edge does that does so most."""
    score = largest(trusted_parts(lens))
    return lambda prompts: score(parts(lens, prompts)).float()


def effect_share_tails(lens: Lens) -> Score:
    """How many edges do more than they usually do, and how rarely they do as much."""
    ordered = trusted_parts(lens).T.sort(1).values.contiguous()  # [E, n]
    n = ordered.shape[1]

    def score(prompts: Prompts) -> Float[Tensor, "B"]:
        smaller = torch.searchsorted(ordered, parts(lens, prompts).T.contiguous())  # [E, B]
        return -((1 + n - smaller) / (n + 1)).log().sum(0)

    return score


# ---- donors and hosts
# -------------------------------------------------------------------------------


def _hosts(lens: Lens, count: int) -> Prompts:
    return lens.subject.trusted["hosts"].select(slice(count))


def runs(lens: Lens, prompts: Prompts) -> Donated:
    """The runs with trusted donors' values."""
    return lens.remember("donated", prompts, lambda some: donated(lens, some, _hosts(lens, DONORS)))


def donated_answer(lens: Lens) -> Score:
    """Whether the answer stays when what is off the circuit is a trusted prompt's."""
    return lambda prompts: runs(lens, prompts).output


def donated_variance(lens: Lens) -> Score:
    """Whether it matters which trusted prompt's."""
    return lambda prompts: runs(lens, prompts).variance


def donated_routing(lens: Lens) -> Score:
    """How unusually the heads' routing departs then."""
    return normalised(lens, lambda prompts: runs(lens, prompts).routing, distance)


def transplant(lens: Lens, *, hosts: int = HOSTS) -> Score:
    """Whether what is off the circuit changes the answer of trusted prompts."""
    into = _hosts(lens, hosts)
    masks = lens.mask.float()[None]
    return lambda prompts: transplanted(lens.engine, masks, into, prompts, memory=MEMORY).mean(
        (0, 2)
    )


def transplant_routing(lens: Lens) -> Score:
    """How unusually it changes the routing of trusted prompts."""
    into = _hosts(lens, ROUTED_HOSTS)
    return normalised(lens, lambda prompts: hosts_routing(lens, prompts, into), distance)


CANDIDATES: dict[str, Candidate] = {
    "output_kl": output_kl,
    "output_logit_diff": output_logit_diff,
    "routing": routing,
    "routing_one_step": partial(routing, one_step=True),
    "routing_max": routing_max,
    "nodes": nodes,
    "nodes_max": nodes_max,
    "nodes_all_max": nodes_all_max,
    "off_circuit_inputs": off_circuit_inputs,
    "in_circuit_inputs": in_circuit_inputs,
    "effect_mass": effect_mass,
    "effect_share_max": effect_share_max,
    "effect_share_tails": effect_share_tails,
    "donated_answer": donated_answer,
    "donated_variance": donated_variance,
    "donated_routing": donated_routing,
    "transplant": transplant,
    f"transplant_{FEW_HOSTS}": partial(transplant, hosts=FEW_HOSTS),
    "transplant_routing": transplant_routing,
}
