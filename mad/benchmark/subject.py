"""One model with its trusted prompts and the groups of inputs that a detector is to tell apart.

The trusted prompts are split into disjoint parts, which are used for one thing each:

    discovery     finds circuits
    fit           means, covariances, the spread of whatever is normalised
    hosts         trusted prompts that parts of other prompts are put into
    calibration   conformal p-values, and nothing else

Groups: `normal_iid`, `normal_shift` and, where the task has anomalies, `anomaly`.  Each prompt of a
group belongs to a stratum: what is new in a shifted normal ("keys"), whether an anomaly's answer is
also the normal one ("agree").

Shapes: readers R, writers W, positions S.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from circuits.ablation import AblationConfig
from circuits.circuit import Circuit
from circuits.discovery import ACDC
from circuits.engine import Engine
from circuits.extraction import rediscover
from circuits.model.load import LoadedModel, ModelConfig, load_model
from circuits.prompts import Prompts
from mad.benchmark.plan import CircuitRecipe, Sizes
from mad.tasks import ANOMALY_TASKS


@dataclass(frozen=True)
class Subject:
    """A model, its trusted prompts and its groups."""

    task: str
    seed: int
    model: LoadedModel
    trusted: Prompts  # part after part
    sizes: Mapping[str, int]  # how many prompts each part has: discovery, fit, hosts, calibration
    groups: Mapping[str, Prompts]  # normal_iid, normal_shift and perhaps anomaly
    strata: Mapping[str, tuple[str, ...]]  # of each prompt of each group

    def part(self, *names: str) -> Prompts:
        """Returns the trusted prompts of some parts, in this order."""
        rows = dict(zip(self.sizes, torch.arange(len(self.trusted)).split([*self.sizes.values()])))
        return self.trusted.select(torch.cat([rows[name] for name in names]))

    @cached_property
    def engine(self) -> Engine:
        """Edges that are the same at every position."""
        return Engine(self.model)

    @cached_property
    def length(self) -> int | None:
        """How many tokens every prompt has; None: they differ."""
        lengths = {
            int(length)
            for prompts in (self.trusted, *self.groups.values())
            for length in prompts.lengths
        }
        return lengths.pop() if len(lengths) == 1 else None

    @property
    def scored(self) -> dict[str, Prompts]:
        """What every score is computed on: calibration and the groups."""
        return {"calibration": self.part("calibration"), **self.groups}


def load_subject(task: str, seed: int, folder: Path, sizes: Sizes = Sizes()) -> Subject:  # noqa: B008
    """Returns the subject of a task with the model in `folder`; `seed` draws the prompts.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: the task does not have that many prompts.
    """
    chosen = ANOMALY_TASKS[task]
    # A language model expects its first token; the trained ones have it in their prompts.
    prepend_bos = True if chosen.recipe is None else None
    model = load_model(ModelConfig(path=str(folder), prepend_bos=prepend_bos))
    total = sum(sizes.parts.values())
    drawn = chosen.groups(chosen.schema(), trusted=total, **sizes.groups, seed=1000 + seed)
    prompts = {name: model.prompts(records) for name, records in drawn.items()}
    trusted = prompts.pop("trusted").split({"trusted": total}, seed)["trusted"]
    strata = {name: tuple(map(stratum, drawn[name])) for name in prompts}
    return Subject(task, seed, model, trusted, sizes.parts, prompts, strata)


def stratum(record: Mapping) -> str:
    """What sort of prompt a record is, within its group."""
    words = [record[key] for key in ("how", "kind", "novelty") if record.get(key)]
    return " ".join(words) or "all"


def circuit_engine(subject: Subject, recipe: CircuitRecipe) -> Engine:
    """The engine of a recipe's circuit: by position only where all prompts have one length."""
    if not recipe.positions or subject.length is None:
        return subject.engine
    return Engine(subject.model, n_positions=subject.length)


def find_circuit(subject: Subject, engine: Engine, recipe: CircuitRecipe) -> Circuit:
    """Returns the circuit that a recipe finds on the discovery part."""
    about = {
        "method": asdict(ACDC(tau=recipe.tau)),
        "metric": recipe.metric,
        "ablation": asdict(AblationConfig(recipe.ablation)),
        "splits": {"discovery": {"prompts": subject.sizes["discovery"]}},
    }
    nothing = torch.zeros(engine.graph.exists.shape)
    sought = Circuit(engine.graph, nothing.bool(), nothing, about)
    kept = rediscover(sought, engine, subject.part("discovery"))
    return replace(sought, kept=kept, scores=kept.float())
