"""The circuits of docs/smollm2.md, indirect objects in SmolLM2: tables and the picture.

Run: python figures/smollm2.py          (an hour on two cores, mostly to train masks)

What is found and measured is kept in runs/smollm2 and not done again; each discovery is a process
of its own, so that its peak memory is told.  `make real` fetches the model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.real.smollm2

import circuits
from circuits.ablation import AblationConfig, fit_ablation
from circuits.discovery import Found
from circuits.extraction import choose
from circuits.faithfulness import FaithfulnessScale, between, under_each_metric
from circuits.metrics import metric_named
from circuits.objective import Objective, prepare
from circuits.selection import Selection, random_circuits, ranking
from circuits.tasks.ioi import Ioi
from mad.benchmark.speed import peak_bytes
from mad.benchmark.tables import markdown_table
from mad.trusted import Splits, trusted_splits
from tests.real.smollm2 import folder

OUT = Path("runs/smollm2")
SEED = 0  # of the prompts, their splits and the random circuits; masks have seed 0, too
SPLITS = Splits(discovery=64, evaluation=64, fit=64, calibration=100)
SIZES, CHANCE = (300, 500, 1000), 3  # edges, and random circuits of each size
STEPS = 60  # of a mask's training
OF_THE_MODEL = 0.9  # share of its accuracy that a circuit is to reach
METRICS = ("logit_diff", "kl", "accuracy")


@dataclass(frozen=True)
class Search:
    """A way of discovery; a learned mask is trained down to a number of edges."""

    method: str  # eap_ig or mask
    metric: str = "kl"
    ablation: str = "counterfactual"
    edges: int | None = None

    @property
    def name(self) -> str:
        size = "" if self.edges is None else f"-{self.edges}"
        return f"{self.method}-{self.metric}-{self.ablation}{size}"

    @property
    def settings(self) -> Any:
        """The method with its settings."""
        if self.method == "eap_ig":
            return circuits.EAPIG()
        start = str(OUT / replace(self, method="eap_ig", edges=None).name)
        return circuits.SubnetworkProbing(edges=self.edges, steps=STEPS, warm_start=start)


class Subject:
    """The model with its prompts."""

    def __init__(self) -> None:
        self.model = circuits.load_model(folder())
        self.engine = circuits.Engine(self.model)
        self.prompts = trusted_splits(Ioi(), self.model, SPLITS, SEED)

    def objective(self, part: str, metric: str, ablation: str) -> Objective:
        """A metric on a part of the prompts."""
        config = AblationConfig(ablation)
        fitted = fit_ablation(config, self.engine, self.prompts["discovery"])
        return prepare(self.engine, self.prompts[part], metric_named(metric), fitted)

    @cached_property
    def held_out(self) -> Objective:
        return self.objective("evaluation", "kl", "counterfactual")


def discover(search: Search) -> None:
    """Looks for a circuit and saves it with what that took."""
    subject, settings = Subject(), search.settings
    objective = subject.objective("discovery", search.metric, search.ablation)
    started = time.perf_counter()
    found = circuits.METHODS[settings.name].run(settings, objective)
    cost = {"seconds": time.perf_counter() - started, "peak": peak_bytes()}
    graph = subject.engine.graph
    kept = (
        found.kept if found.kept is not None else ranked(search, graph, found.scores).circuit(300)
    )
    about = {
        "model": {"path": "SmolLM2-135M-Instruct"},
        "task": asdict(Ioi()),
        "method": asdict(settings),
        "metric": search.metric,
        "ablation": {"name": search.ablation},
        "cost": cost,
    }
    trained = None if found.trained is None else found.trained(int(kept.sum()))
    circuits.Circuit(graph, kept, found.scores, about, trained).save(OUT / search.name)


def ranked(search: Search, graph: circuits.Graph, scores: Tensor) -> Any:
    """The order in which circuits take edges: greedy, by default by |score| for KL alone."""
    return ranking(graph, scores, absolute=search.metric == "kl")


def found(search: Search) -> circuits.Circuit:
    """The circuit of a search, looked for where it is not there yet."""
    if not (OUT / search.name / "scores.safetensors").exists():
        print("discovery:", search.name, flush=True)
        words = json.dumps(asdict(search))
        subprocess.run([sys.executable, __file__, words], check=True)
    return circuits.Circuit.load(OUT / search.name)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        discover(Search(**json.loads(sys.argv[1])))
        sys.exit()
    for search in [
        Search("eap_ig"),
        Search("eap_ig", "logit_diff"),
        *(Search("mask", edges=n) for n in (300, 500, 1000)),
        Search("eap_ig", ablation="resample"),
    ]:
        found(search)
