"""Optimal ablation: removed edges carry constants, trained so that their removal costs least (Li
and Janson 2024, arXiv 2409.09951).

What a circuit C loses under optimal ablation is, with M_C(x, a) the model's distribution when
removed edges carry the constants a, one for each writer w,

    loss(C) = min over a of  E_x KL( M(x) || M_C(x, a) )

so that only what a removed edge tells is lost, and nothing by what stands in its place, as by a
mean that no reader has ever met.  The paper's loss is KL too, and it stays so whatever
the metric, because constants that served a logit difference would give the answer themselves.

The minimum of each circuit is another one, but a sweep, a ranking or a faithfulness compares many
circuits.  So there is one set of constants for all, the minimum of an average:

    a = argmin E_C E_x KL( M(x) || M_C(x, a) )

C is drawn anew for each prompt: of a share uniform on [0, 1] of edges, or of writers with all that
they write, and in one of eight nothing.  `refined` goes on with a circuit that was found in every
other prompt; masks that are learned train the constants along with the mask, as the paper does.
For a circuit itself the result is an upper bound of loss(C), which tests compare with.

Constants start from the means; Adam moves each in units of its number's root mean square.  They
are the same at all positions but the first, or one for each where edges are told apart by it.

Shapes: prompts B, positions S, d_model D, writers W, scored positions P, vocabulary V; T 2
constants of a writer, of the first and of later positions (1 where there are none), or S; `*E` the
axes of a mask.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.ablation.ablation import Ablation, AblationConfig
from circuits.ablation.means import writer_means
from circuits.ablation.source import WRITERS, Source
from circuits.batches import in_batches
from circuits.engine.engine import Engine
from circuits.engine.memory import footprint, most_prompts, parse_memory
from circuits.graph import Graph
from circuits.metrics import METRICS
from circuits.prompts.errors import InputError
from circuits.prompts.prompts import Prompts
from circuits.space import Space

log = logging.getLogger(__name__)

BATCH = 32  # prompts a step
RATE = 0.05  # of Adam, in units of a constant's scale; it falls to 0 by a cosine
FLOOR = 0.1  # least scale of a number, as a share of its writer's
EMPTY = 8  # one in so many drawn circuits is empty
COPIES = 10  # of the constants: scale, gradient, moments, the best, and what is made on the way

Draw = Callable[[int, torch.Generator], Tensor]  # so many masks [B, *E]


class Optimal(Ablation):
    """Trained constants."""

    name = "optimal"
    learned = True
    any_source = True

    def __init__(
        self,
        constants: Float[Tensor, "W T D"],
        scale: Float[Tensor, "W 1 D"],
        config: AblationConfig,
        *,
        by_position: bool,
        source: Source = WRITERS,
    ) -> None:
        super().__init__(source)
        self.constants, self.scale, self.config = constants, scale, config
        self.by_position = by_position

    @classmethod
    def fit(
        cls,
        engine: Engine,
        reference: Prompts,
        config: AblationConfig,
        *,
        memory: str,
        source: Source = WRITERS,
    ) -> Optimal:
        """Returns constants for circuits drawn at random; ValueError for fewer than 1 step."""
        if config.steps < 1:
            raise ValueError(f"ablation.steps={config.steps}, but it must be at least 1")
        means = writer_means(engine, reference, memory=memory, source=source)
        by_position = engine.graph.n_positions is not None
        pooled = torch.stack([means.first, means.rest], 1)
        start = means.positional if by_position else pooled[:, : len(means.count)]
        scale = _scale(engine, reference, memory, source)
        ablation = cls(start, scale, config, by_position=by_position, source=source)
        return ablation.trained(engine, reference, memory=memory)

    def able(self, prompts: Prompts) -> Bool[Tensor, "B"]:
        return prompts.lengths.cpu() <= self._longest

    @property
    def _longest(self) -> float:
        known = self.constants.shape[1]
        return known if self.by_position or known == 1 else math.inf

    def writers(self, engine: Engine, prompts: Prompts) -> Float[Tensor, "W 1 S D"]:
        """The constants, for as many positions as the prompts have, or InputError."""
        length = prompts.clean.shape[1]
        if length > self._longest:
            raise InputError(
                f"ablation=optimal: prompts have up to {length} tokens, but constants were trained "
                f"for {self._longest}; use longer reference prompts"
            )
        constants = self.constants.to(engine.dtype)
        if not self.by_position:
            later = constants[:, 1:].expand(-1, length - 1, -1)
            constants = torch.cat([constants[:, :1], later], 1)
        return constants[:, None, :length]

    # ---- training --------------------------------------------------------------------------------

    def trained(
        self, engine: Engine, prompts: Prompts, *, memory: str = "2GB", draw: Draw | None = None
    ) -> Optimal:
        """Returns constants that were trained further; these, if training did not improve them.

        Args:
            draw: circuits to be served; None: of every size, at random.
        """
        space = self.source.space(engine)
        training = _Training(self, engine, prompts, draw or circuits_of_any_size(space), memory)
        return training.best()

    def refined(
        self, engine: Engine, prompts: Prompts, kept: Bool[Tensor, "*E"], *, memory: str = "2GB"
    ) -> Optimal:
        """Returns constants trained further for one circuit, without losing sight of the others."""
        others = circuits_of_any_size(self.source.space(engine))

        def draw(count: int, generator: torch.Generator) -> Tensor:
            masks = others(count, generator)
            masks[1::2] = kept.cpu()
            return masks

        return self.trained(engine, prompts, memory=memory, draw=draw)

    def at(self, moved: Float[Tensor, "W T D"]) -> Optimal:
        """Constants that are moved, in units of their scale."""
        return self.like(self.constants + moved * self.scale, self.scale)

    def like(self, constants: Float[Tensor, "W T D"], scale: Float[Tensor, "W 1 D"]) -> Optimal:
        """The same with other constants."""
        own = {"by_position": self.by_position, "source": self.source}
        return Optimal(constants, scale, self.config, **own)

    @property
    def training_bytes(self) -> int:
        """What training holds of the constants, however many prompts there are."""
        return COPIES * self.constants.nbytes

    # ---- on disk ---------------------------------------------------------------------------------

    def state(self) -> Mapping[str, Tensor]:
        by_position = torch.tensor(self.by_position)
        return {"constants": self.constants, "scale": self.scale, "by_position": by_position}

    @classmethod
    def restore(cls, engine: Engine, state: Mapping[str, Tensor]) -> Optimal:
        constants, scale = (state[name].to(engine.device) for name in ("constants", "scale"))
        by_position = bool(state["by_position"])
        rows, numbers = WRITERS.shape(engine)
        known = (engine.graph.n_positions,) if by_position else (1, 2)
        if constants.shape not in [(rows, one, numbers) for one in known]:
            at = f" at {known[0]} positions" if by_position else ""
            raise ValueError(
                f"constants of ablation=optimal have shape {tuple(constants.shape)}, but the model "
                f"has {rows} writers of {numbers} numbers{at}"
            )
        if scale.shape != (rows, 1, numbers) or not (constants.isfinite() & scale.isfinite()).all():
            raise ValueError(
                "constants of ablation=optimal, and their scale, must be finite numbers of each "
                "writer"
            )
        return cls(constants, scale, AblationConfig(cls.name), by_position=by_position)


@dataclass(frozen=True)
class _Training:
    """Constants, and what they are trained on."""

    start: Optimal
    engine: Engine
    prompts: Prompts
    draw: Draw
    memory: str

    def best(self) -> Optimal:
        """The constants at the end of training, or those at its start where these are better."""
        before, after = self.start, self._end()
        lost = [self._loss(constants) for constants in (before, after)]
        log.info("ablation=optimal: KL of drawn circuits %.4g before, %.4g after training", *lost)
        if lost[1] < lost[0]:
            return after
        log.warning(
            "training the constants of ablation=optimal lowered KL no further (from %.4g to %.4g), "
            "so that they stay as they were; raise ablation.steps",
            *lost,
        )
        return before

    def _end(self) -> Optimal:
        """The constants after the last step, or after the last whose gradient was finite."""
        start, config = self.start, self.start.config
        moved = torch.zeros_like(start.constants).requires_grad_()
        optimiser = torch.optim.Adam([moved], RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.steps)
        generator = torch.Generator().manual_seed(config.seed)
        count = min(BATCH, len(self.prompts))
        progress = {"desc": "optimal ablation", "unit": "step", "disable": None}
        for _ in (bar := tqdm(range(config.steps), **progress)):
            rows = torch.randperm(len(self.prompts), generator=generator)[:count].sort().values
            optimiser.zero_grad()
            lost = 0.0
            with torch.enable_grad():
                for part in self._losses(start, rows, generator, moved):
                    (part / count).backward()
                    lost += part.item() / count
            assert moved.grad is not None
            if not moved.grad.isfinite().all():
                log.warning(
                    "a gradient of the constants of ablation=optimal is not finite, so that their "
                    "training stops early; use dtype=float32"
                )
                break
            optimiser.step()
            schedule.step()
            bar.set_postfix(kl=f"{lost:.3f}", refresh=False)
        return start.at(moved.detach())

    @torch.no_grad()
    def _loss(self, constants: Optimal) -> float:
        """Mean KL over all prompts, each under one drawn circuit, the same whenever it is asked."""
        generator = torch.Generator().manual_seed(self.start.config.seed + 1)
        rows = torch.arange(len(self.prompts))
        parts = self._losses(constants, rows, generator)
        return sum(part.item() for part in parts) / len(rows)

    def _losses(
        self,
        constants: Optimal,
        rows: Tensor,
        generator: torch.Generator,
        moved: Tensor | None = None,
    ) -> Iterator[Float[Tensor, ""]]:
        """Sums of KL over as many prompts as fit at once."""
        engine, source = self.engine, constants.source
        masks = self.draw(len(rows), generator)
        for part in torch.arange(len(rows)).split(self._at_once()):
            own = self.prompts.select(rows[part]).to(engine.device)
            now = constants if moved is None else constants.at(moved)
            reference = engine.logits(own)
            logits = source.under(engine, own, masks[part], now.values(engine, own))
            yield METRICS["kl"](logits, own, reference).sum()

    def _at_once(self) -> int:
        size = footprint(self.engine, self.prompts)
        each = self.start.source.gradient(size)
        held = self.start.training_bytes + 3 * size.shared(False)
        return most_prompts(self.prompts, each, parse_memory(self.memory), held)


def circuits_of_any_size(space: Space) -> Draw:
    """Draws circuits: each of a share of its own of edges (or units), or of writers; some empty."""
    exists = space.exists

    def draw(count: int, generator: torch.Generator) -> Float[Tensor, "B *E"]:
        shares = torch.rand(count, generator=generator).view(-1, *(1 for _ in exists.shape))
        shares[EMPTY - 1 :: EMPTY] = 0
        masks = torch.rand((count, *exists.shape), generator=generator) < shares
        if isinstance(space, Graph):
            by_writer = torch.rand((count, 1, *exists.shape[1:]), generator=generator) < shares
            masks[1::2] = by_writer[1::2]
        return (masks & exists).float()

    return draw


@torch.no_grad()
def _scale(engine: Engine, prompts: Prompts, memory: str, source: Source) -> Float[Tensor, "W 1 D"]:
    """The root mean square of each number on some prompts, but no less than a part of its row's."""
    few = next(iter(in_batches(engine, prompts, source.footprint, memory=memory)))
    read = source.read(engine, few)[:, few.key_mask].float()  # [W, tokens, D]
    squares = read.square().mean(1, keepdim=True)
    least = FLOOR**2 * squares.mean(-1, keepdim=True)
    return squares.maximum(least).sqrt().to(engine.dtype)
