"""One model with its trusted prompts and the groups of inputs that a score is to tell apart.

The trusted prompts are split into disjoint parts, which are used for one thing each:

    discovery     finds circuits
    fit           means, covariances, the spread of whatever is normalised
    hosts         trusted prompts that parts of other prompts are put into
    calibration   conformal p-values, and nothing else

Groups: `normal_iid`, `normal_shift` and, where the task has anomalies, `anomaly`.  Each prompt of a
    group belongs to a
stratum: what is new in a shifted normal ("keys"), whether an anomaly's answer is also the normal
    one ("agree").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from circuits.engine import Engine
from circuits.model.load import LoadedModel, ModelConfig, load_model
from circuits.prompts import Prompts
from mad.pipeline import load_prompts
from mad.study.plan import NATURAL, Sizes
from mad.tasks import ANOMALY_TASKS

GROUP_NAMES = ("normal_iid", "normal_shift", "anomaly")


@dataclass(frozen=True)
class Subject:
    """A model, its trusted parts and its groups."""

    task: str
    seed: int
    model: LoadedModel
    trusted: Mapping[str, Prompts]  # discovery, fit, hosts, calibration
    groups: Mapping[str, Prompts]  # normal_iid, normal_shift and perhaps anomaly
    strata: Mapping[str, tuple[str, ...]]  # of each prompt of each group

    @cached_property
    def engine(self) -> Engine:
        """Edges that are the same at every position."""
        return Engine(self.model)

    @cached_property
    def one_length(self) -> bool:
        """Whether all prompts have the same number of tokens, so that edges can be told apart by
        position.
        """
        return (
            len(
                {
                    int(n)
                    for prompts in (*self.trusted.values(), *self.groups.values())
                    for n in prompts.lengths
                }
            )
            == 1
        )

    @cached_property
    def engine_by_position(self) -> Engine:
        """Edges told apart by position.

        Raises:
            ValueError: the prompts have different lengths.
        """
        if not self.one_length:
            raise ValueError(
                f"the prompts of {self.task} have different lengths: edges have no positions in "
                "common"
            )
        return Engine(self.model, n_positions=self.trusted["fit"].clean.shape[1])

    @property
    def scored(self) -> dict[str, Prompts]:
        """What every score is computed on: calibration and the groups."""
        return {"calibration": self.trusted["calibration"], **self.groups}


def load_subject(task: str, seed: int, folder: Path, sizes: Sizes = Sizes()) -> Subject:  # noqa: B008
    """Returns the subject of a task with the model in `folder`; `seed` draws the prompts.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: the task does not have that many prompts.
    """
    model = load_model(ModelConfig(path=str(folder), prepend_bos=True if task == NATURAL else None))
    drawn = ANOMALY_TASKS[task].groups(
        ANOMALY_TASKS[task].schema(),
        trusted=sizes.trusted,
        normal_iid=sizes.normal_iid,
        normal_shift=sizes.normal_shift,
        anomaly=sizes.anomaly,
        seed=1000 + seed,
    )
    prompts = {name: load_prompts(records, model) for name, records in drawn.items()}
    parts = prompts.pop("trusted").split(
        {name: getattr(sizes, name) for name in ("discovery", "fit", "hosts", "calibration")}, seed
    )
    strata = {name: tuple(map(stratum, drawn[name])) for name in prompts}
    return Subject(task, seed, model, parts, prompts, strata)


def stratum(record: Mapping) -> str:
    """What sort of prompt a record is, within its group."""
    words = [record[key] for key in ("how", "kind", "novelty") if record.get(key)]
    return " ".join(words) or "all"


def rows(strata: tuple[str, ...], name: str) -> torch.Tensor:
    """The rows of one stratum."""
    return torch.tensor([row for row, own in enumerate(strata) if own == name])
