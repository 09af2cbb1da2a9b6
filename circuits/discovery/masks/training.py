"""Training a mask: gates are drawn, the model runs under them, and what they cost comes back.

    loss = 1 - faithfulness of the batch under drawn masks  +  penalty(share of edges expected)

faithfulness = (m(mask) - m(0)) / (m(M) - m(0)), with m(M) and m(0) means over all discovery
prompts: so the loss has no unit, and one penalty serves all models and metrics.  What a step draws
depends on the seed and the number of the step alone, so that training can go on from its last
checkpoint as if it had never stopped.

Under optimal ablation its constants are trained along with the mask (Li and Janson 2024, arXiv
2409.09951), by KL whatever the metric (`circuits.ablation.optimal`).

Shapes: prompts of a batch B; `*E` the axes of a mask, of edges or units.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from circuits.ablation.optimal import Optimal
from circuits.ablation.runs import mixed
from circuits.discovery.masks.checkpoint import fingerprint, load_checkpoint, save_checkpoint
from circuits.discovery.masks.penalty import Penalty, penalty_of
from circuits.discovery.masks.settings import MaskTraining, batch_size, check, final_size
from circuits.discovery.masks.snapshots import (
    Snapshot,
    ladder,
    nested_scores,
    pass_rungs,
    trained,
)
from circuits.discovery.masks.state import Constants, Point, State
from circuits.discovery.masks.warm_start import first_parameters
from circuits.discovery.method import Found
from circuits.engine.memory import MOST_PROMPTS, TooLittleMemory, written
from circuits.gates import part_shares
from circuits.mask_distribution import KINDS, MaskDistribution
from circuits.metrics import METRICS
from circuits.minibatches import Minibatch, minibatch
from circuits.objective import Objective
from circuits.prompts.errors import InputError
from circuits.space import Space

log = logging.getLogger(__name__)

BETAS = (0.9, 0.999)  # of Adam
MOST_KEPT = 0.95  # of all parts: a mask that keeps more has removed nothing
NEAR = 0.05  # a mask is as large as was asked for if its size is off by no more
POINTS = 400  # of the training curve that is kept with a circuit
PROMPTS_OF_A_STEP, GATES_OF_A_STEP = 1, 2  # what random numbers are for


@dataclass(frozen=True)
class Trainer:
    """What does not change during training."""

    config: MaskTraining
    objective: Objective
    over: str  # of `circuits.gates.OVER`
    kind: str  # of `circuits.mask_distribution.KINDS`
    model: float  # the oriented metric's mean over all discovery prompts
    empty: float
    batch: int  # prompts a step
    parts: int  # rows run at once
    end: float  # edges, or units
    rungs: tuple[int, ...]  # the sizes at which the mask is kept

    def mask(self, gates: Mapping[str, Tensor]) -> MaskDistribution:
        """The mask with these parameters, on the CPU."""
        held = {name: theta.detach().cpu().clone() for name, theta in gates.items()}
        return MaskDistribution(self.objective.space, self.kind, self.over, held)

    def share(self, gates: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """The share of all parts that a circuit drawn from the mask is expected to have."""
        space = self.objective.space
        open_gates = {name: theta.sigmoid() for name, theta in gates.items()}
        return part_shares(open_gates, space).sum() / space.n_parts

    @property
    def optimal(self) -> Optimal | None:
        """The ablation whose constants are trained along with the mask, as they are before."""
        ablation = self.objective.batches.ablation
        return ablation if isinstance(ablation, Optimal) else None


def train(config: MaskTraining, objective: Objective, over: str, kind: str) -> Found:
    """Returns the ranking of parts by the mask as it shrank and, of a size asked for, its circuit.

    Args:
        over: what the mask is over (`circuits.gates.OVER`).
        kind: of the distribution of its gates (`circuits.mask_distribution.KINDS`).

    Raises:
        ValueError: settings or a metric that do not serve, a checkpoint of another training, or a
            mask that keeps all or nothing.
        TooLittleMemory: not even one prompt fits.
    """
    trainer = trainer_of(config, objective, over, kind)
    identity = fingerprint(config, objective, over, kind)
    gates = first_parameters(config, objective, over)
    state = State.new(gates, config.rate, BETAS, trainer.optimal)
    start = trainer.share(state.gates).item()
    if config.checkpoint is not None:
        load_checkpoint(config.checkpoint, state, identity)
    _loop(trainer, state, start, identity)
    return _found(trainer, state)


def trainer_of(config: MaskTraining, objective: Objective, over: str, kind: str) -> Trainer:
    """What training needs; ValueError for settings or a metric that do not serve."""
    check(config, objective)
    model, empty = (part.double().mean().item() for part in (objective.full(), objective.empty()))
    if not model > empty:
        raise ValueError(
            f"by {objective.metric.name} the empty circuit ({empty:.3g}, higher is better) is as "
            f"good as the model ({model:.3g}), so that a mask has nothing to keep; use another "
            "metric or ablation"
        )
    return Trainer(
        config,
        objective,
        over,
        kind,
        model,
        empty,
        batch=batch_size(config, objective),
        parts=_rows_at_once(objective),
        end=final_size(config, objective.space),
        rungs=_rungs(config, objective.space),
    )


def _rungs(config: MaskTraining, space: Space) -> tuple[int, ...]:
    """The sizes at which the mask is kept, from large to small; one asked for is among them."""
    own = {round(final_size(config, space))} if config.decides else set()
    return tuple(sorted({*ladder(space), *own}, reverse=True))


def _rows_at_once(objective: Objective) -> int:
    """How many prompts can be run at once with what their gradient needs."""
    batches = objective.batches
    each, shared = batches.training()
    if isinstance(batches.ablation, Optimal):
        shared += batches.ablation.training_bytes
    if batches.work < each + shared:
        raise TooLittleMemory(
            f"to train a mask on one prompt takes up to {written(each + shared)} beside what is "
            f"prepared, but {written(batches.work)} are left for it; raise memory, or use shorter "
            "prompts"
        )
    return min(MOST_PROMPTS, (batches.work - shared) // each)


def _loop(trainer: Trainer, state: State, start: float, identity: Tensor) -> None:
    """Takes the steps that are left, from a mask that began with a share of `start`."""
    config, space = trainer.config, trainer.objective.space
    penalty = penalty_of(config, start, trainer.end / space.n_parts)
    progress = {"total": config.steps, "initial": state.step, "unit": "step", "disable": None}
    with tqdm(desc=config.name, **progress) as bar:
        while state.step < config.steps:
            point = _step(trainer, state, penalty)
            if not point.finite:
                _stop(config, state, point)
                break
            bar.update()
            shown = {"loss": f"{point.loss:.3f}", space.noun: f"{point.edges:.0f}"}
            shown[trainer.objective.metric.name] = f"{point.metric:.3f}"
            bar.set_postfix(shown, refresh=False)
            last = state.step == config.steps
            if config.checkpoint and (last or state.step % config.checkpoint_every == 0):
                save_checkpoint(config.checkpoint, state, identity)


def _step(trainer: Trainer, state: State, penalty: Penalty) -> Point:
    """One step: what it came to; where that is not finite, the state stays as it was."""
    state.optimiser.zero_grad()
    share = trainer.share(state.gates)
    edges = share.item() * trainer.objective.space.n_parts
    multipliers = state.multipliers.clone()
    price = penalty(share, multipliers, state.step)
    price.backward()
    lost = _backward(trainer, state.gates, state.step, state.constants)
    finite = all(
        theta.grad is not None and theta.grad.isfinite().all() for theta in state.parameters()
    )
    loss = lost + price.item() if finite else math.nan
    oriented = trainer.model - lost * (trainer.model - trainer.empty)
    sign = 1.0 if trainer.objective.metric.higher_is_better else -1.0
    point = Point(state.step, loss, 1 - lost, sign * oriented, edges)
    if point.finite:
        pass_rungs(state, trainer.rungs, edges)
        state.multipliers.copy_(multipliers)
        state.optimiser.step()
        state.step += 1
        state.curve.append(point)
    return point


def _backward(
    trainer: Trainer,
    gates: Mapping[str, Tensor],
    step: int,
    constants: Constants | None = None,
) -> float:
    """Adds the gradient of 1 - faithfulness on the batch of a step; returns its value.

    To constants of ablation=optimal it adds that of KL on the same runs.
    """
    config, objective = trainer.config, trainer.objective
    device, each = objective.engine.device, config.masks_per_prompt
    rows = rows_of(step, trainer.batch, len(objective.batches.whole), config.seed)
    rows = rows.repeat_interleave(max(each, 1))
    generator = torch.Generator(device).manual_seed(_seed(config.seed, GATES_OF_A_STEP, step))
    drawn = {
        name: torch.rand(
            (len(rows) if each else 1, *theta.shape), generator=generator, device=device
        )
        for name, theta in gates.items()
    }
    lost = 0.0
    for part in torch.arange(len(rows)).split(trainer.parts):
        uniform = {name: own[part.to(device)] if each else own for name, own in drawn.items()}
        own = minibatch(objective.batches, rows[part])
        logits = _under(trainer, gates, uniform, own, constants)
        values = _or_nan(objective.metric.oriented, logits, own)
        loss = (trainer.model - values).sum() / (len(rows) * (trainer.model - trainer.empty))
        loss.backward(inputs=list(gates.values()), retain_graph=constants is not None)
        if constants is not None:
            divergence = _or_nan(METRICS["kl"], logits, own).sum() / len(rows)
            divergence.backward(inputs=[constants.moved])
        lost += loss.item()
    return lost


def rows_of(step: int, batch: int, available: int, seed: int) -> Int[Tensor, "B"]:
    """The prompts of a step, in ascending order: each pass over all of them is shuffled anew."""
    passes, place = divmod(step, available // batch)
    generator = torch.Generator().manual_seed(_seed(seed, PROMPTS_OF_A_STEP, passes))
    order = torch.randperm(available, generator=generator)
    return order[place * batch : (place + 1) * batch].sort().values


def _seed(*numbers: int) -> int:
    return mixed(numbers) & 0x7FFF_FFFF


def _under(
    trainer: Trainer,
    gates: Mapping[str, Tensor],
    uniform: Mapping[str, Tensor],
    own: Minibatch,
    constants: Constants | None,
) -> Float[Tensor, "B P V"]:
    """The logits of prompts under drawn masks: one for each, or one for all."""
    objective, kind = trainer.objective, KINDS[trainer.kind]
    drawn = {name: kind(theta, uniform[name]) for name, theta in gates.items()}
    masks = part_shares(drawn, objective.space)
    masks = masks if trainer.config.masks_per_prompt else masks[0]
    engine, source = objective.engine, objective.batches.ablation.source
    ablated = own.ablated
    if constants is not None:
        ablated = constants.now().values(engine, own.prompts)
    return source.under(engine, own.prompts, masks, ablated)


def _or_nan(
    metric: Callable[..., Float[Tensor, "B"]], logits: Float[Tensor, "B P V"], own: Minibatch
) -> Float[Tensor, "B"]:
    """A metric of logits, NaN where they are not finite."""
    try:
        return metric(logits, own.prompts, own.logits)
    except InputError:
        return logits.flatten(1).sum(1) * math.nan


def _stop(config: MaskTraining, state: State, point: Point) -> None:
    """Warns that training ends early; ValueError where there is nothing to keep."""
    remedy = "lower method.learning_rate, or use dtype=float32"
    if not state.step:
        raise ValueError(
            f"the loss of the first step is {point.loss}; check the weights, or {remedy}"
        )
    log.warning(
        "the loss of step %d is %s, so that training stops, and the mask of the step before is "
        "kept; %s",
        point.step + 1,
        point.loss,
        remedy,
    )


@torch.no_grad()
def _found(trainer: Trainer, state: State) -> Found:
    """The ranking by all that was kept, and the circuit of a size that was asked for."""
    config, space = trainer.config, trainer.objective.space
    last = trainer.mask(state.gates)
    size = last.size()
    _refuse_everything(size, space, state.step)
    final = _final(trainer, state, last)
    passed = [
        Snapshot(edges, trainer.mask(gates))
        for edges, gates in state.rungs.items()
        if edges > final.edges  # for the others the last mask has had more time
    ]
    snapshots = [*passed, final]
    kept = space.without_dead_ends(final.kept()) if config.decides else None
    if not (kept if kept is not None else snapshots[0].connected()).any():
        raise ValueError(
            f"the mask keeps no path from the input to the logits, at {final.edges} {space.noun} "
            f"after {state.step} steps; ask for more {space.noun}, raise method.steps, or lower "
            "method.learning_rate" + ("" if config.penalty is None else " or method.penalty")
        )
    details = {
        "steps": state.step,
        f"expected_{space.noun}": size,
        "training": [asdict(point) for point in thinned(state.curve)],
    }
    ablation = None if state.constants is None else state.constants.now()
    scores = nested_scores(space, snapshots)
    return Found(scores, kept, details, trained(snapshots), ablation)


def _final(trainer: Trainer, state: State, last: MaskDistribution) -> Snapshot:
    """The mask at the end of training; of a size asked for, which a steered one may overshoot, the
    last mask if it is as large, else the one that passed that size.
    """
    wanted, size = round(trainer.end), last.size()
    if not trainer.config.decides:
        return Snapshot(max(1, round(size)), last)
    if abs(size - wanted) <= NEAR * wanted or wanted not in state.rungs:
        return Snapshot(wanted, last)
    return Snapshot(wanted, trainer.mask(state.rungs[wanted]))


def _refuse_everything(size: float, space: Space, steps: int) -> None:
    total = space.n_parts
    if size > MOST_KEPT * total:
        raise ValueError(
            f"after {steps} steps the mask still keeps {size:.0f} of {total} {space.noun} "
            "(expected); raise method.steps, method.learning_rate or method.penalty, or lower "
            "method.initial"
        )


def thinned(curve: Sequence[Point]) -> list[Point]:
    """At most `POINTS` of the steps, evenly spaced, the last one among them."""
    stride = -(-len(curve) // POINTS)
    return list(curve[::-1][:: max(1, stride)][::-1])
