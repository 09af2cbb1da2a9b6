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
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.real.smollm2

import circuits
from circuits.ablation import AblationConfig, fit_ablation
from circuits.faithfulness import under_each_metric
from circuits.metrics import metric_named
from circuits.objective import Objective, prepare
from circuits.prompts import Prompts
from circuits.selection import random_circuits, ranking
from circuits.tasks.ioi import Ioi
from mad.benchmark.speed import peak_bytes
from mad.benchmark.tables import markdown_table
from mad.trusted import Splits, trusted_splits
from tests.real.smollm2 import folder

OUT = Path("runs/smollm2")
SEED = 0  # of the prompts, their splits and the random circuits; masks have seed 0, too
SPLITS = Splits(discovery=64, evaluation=64, fit=64, calibration=100)
SIZES, CHANCE = (300, 500, 1000), 3  # edges, and random circuits of each size
DOWN_TO, STEPS = SIZES[0], 60  # of a mask's training; larger circuits are those that it passed
LADDER = (200, 300, 400, 500, 700, 1000, 1400, 2000, 2800, 4000)  # edges
MEMORY = "5GB"  # of measuring, where all runs then stay prepared; discovery has 2GB
METRICS = ("logit_diff", "kl", "accuracy")


@dataclass(frozen=True)
class Search:
    """A way of discovery, and how its edges are ranked."""

    method: str  # eap_ig or mask
    metric: str = "kl"
    ablation: str = "counterfactual"
    signed: bool = False  # supporters alone, the default by logit difference; else by |score|

    @property
    def name(self) -> str:
        """Of the discovery, whose scores serve either ranking."""
        return f"{self.method}-{self.metric}-{self.ablation}"

    @property
    def settings(self) -> Any:
        """The method with its settings; a mask starts from EAP-IG's scores."""
        if self.method == "eap_ig":
            return circuits.EAPIG()
        start = str(OUT / replace(self, method="eap_ig").name)
        return circuits.SubnetworkProbing(edges=DOWN_TO, steps=STEPS, warm_start=start)


SEARCHES = {
    "EAP-IG by KL": Search("eap_ig"),
    "EAP-IG by logit difference": Search("eap_ig", "logit_diff"),
    "the same, signed": Search("eap_ig", "logit_diff", signed=True),
    "learned mask": Search("mask"),
}


class Subject:
    """The model with its prompts."""

    def __init__(self) -> None:
        self.model = circuits.load_model(folder())
        self.engine = circuits.Engine(self.model)
        self.prompts = trusted_splits(Ioi(), self.model, SPLITS, SEED)

    def objective(
        self, prompts: Prompts, metric: str, ablation: str, memory: str = "2GB"
    ) -> Objective:
        """A metric on some prompts; donors for resampling are those of discovery."""
        config = AblationConfig(ablation)
        fitted = fit_ablation(config, self.engine, self.prompts["discovery"], memory=memory)
        return prepare(self.engine, prompts, metric_named(metric), fitted, memory=memory)


def discover(search: Search) -> None:
    """Looks for a circuit and saves it with what that took."""
    subject, settings = Subject(), search.settings
    objective = subject.objective(subject.prompts["discovery"], search.metric, search.ablation)
    started = time.perf_counter()
    found = circuits.METHODS[settings.name].run(settings, objective)
    cost = {"seconds": time.perf_counter() - started, "peak": peak_bytes()}
    graph = subject.engine.graph
    kept = found.kept
    if kept is None:
        kept = ranked(search, graph, found.scores).circuit(SIZES[0])
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
    """The order in which circuits take edges: greedy."""
    return ranking(graph, scores, absolute=not search.signed)


def found(search: Search) -> circuits.Circuit:
    """The circuit of a search, looked for where it is not there yet."""
    if not (OUT / search.name / "scores.safetensors").exists():
        print("discovery:", search.name, flush=True)
        words = json.dumps(asdict(search))
        subprocess.run([sys.executable, __file__, words], check=True)
    return circuits.Circuit.load(OUT / search.name)


@dataclass(frozen=True)
class Row:
    """What a circuit does on the held-out prompts, or the mean of several."""

    edges: float
    logit_diff: float
    kl: float
    accuracy: float


def _key(search: Search) -> str:
    return search.name + " signed" * search.signed


class Measured:
    """Figures of circuits, each of which is measured once and kept in a file."""

    def __init__(self, subject: Subject, ablation: str = "counterfactual") -> None:
        self.objective = subject.objective(subject.prompts["evaluation"], "kl", ablation, MEMORY)
        self.graph, self.file = subject.engine.graph, OUT / f"measured-{ablation}.json"
        known = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.rows = {name: Row(**row) for name, row in known.items()}

    def of(self, name: str, masks: Callable[[], Sequence[Tensor]]) -> Row:
        """The figures of circuits of that name, on average."""
        if name not in self.rows:
            print("measuring:", name, flush=True)
            rows = [self._measured(mask) for mask in masks()]
            self.rows[name] = Row(*(fmean(values) for values in zip(*map(astuple, rows))))
            told = {name: asdict(row) for name, row in self.rows.items()}
            self.file.write_text(json.dumps(told, indent=1))
        return self.rows[name]

    def _measured(self, mask: Tensor) -> Row:
        found = under_each_metric(self.objective, mask)
        values = {name: metric_named(name) for name in METRICS}
        return Row(
            int(mask.sum()),
            *(
                (1 if metric.higher_is_better else -1) * found[name].circuit.mean().item()
                for name, metric in values.items()
            ),
        )

    def chance(self, edges: int) -> Row:
        """The mean of random circuits of a size."""
        return self.of(f"random-{edges}", lambda: random_circuits(self.graph, edges, CHANCE, SEED))

    def circuit(self, search: Search, edges: int) -> Row:
        """A circuit of a search, of that many edges before dead ends are dropped."""

        def masks() -> list[Tensor]:
            own = found(search)
            if search.method == "mask" and edges == DOWN_TO:
                return [own.kept]
            return [ranked(search, self.graph, own.scores).circuit(edges)]

        return self.of(f"{_key(search)} {edges}", masks)


def circuits_table(measured: Measured) -> str:
    """Circuits of all searches and sizes beside the model, the empty circuit and random ones."""
    graph = measured.graph
    ends = {"model": graph.exists, "empty circuit": torch.zeros_like(graph.exists)}
    rows = [
        _cells(name, measured.of(name, lambda mask=mask: [mask])) for name, mask in ends.items()
    ]
    for edges in SIZES:
        for label, search in SEARCHES.items():
            rows.append(_cells(f"{label}, {edges}", measured.circuit(search, edges)))
        rows.append(_cells(f"{CHANCE} random circuits, {edges}", measured.chance(edges)))
    return markdown_table(HEADERS, rows)


HEADERS = ("circuit", "edges left", "logit difference", "KL", "accuracy")


def _cells(name: str, row: Row) -> tuple[str, ...]:
    return (
        name,
        f"{row.edges:.0f}",
        f"{row.logit_diff:.2f}",
        f"{row.kl:.3f}",
        f"{row.accuracy:.2f}",
    )


def ladder_table(measured: Measured) -> str:
    """Accuracy and KL over sizes: how many edges it takes to be right as often as the model."""
    rows = []
    for edges in LADDER:
        found_here = [measured.circuit(search, edges) for search in SEARCHES.values()]
        rows.append((str(edges), *(f"{row.accuracy:.2f} / {row.kl:.2f}" for row in found_here)))
    return markdown_table(("edges", *SEARCHES), rows)


def cost_table() -> str:
    """What each discovery took."""
    rows = []
    for label, search in SEARCHES.items():
        if search.signed:
            continue
        cost: Any = found(search).about["cost"]
        rows.append((label, f"{cost['seconds']:.0f}", f"{cost['peak'] / 1e9:.1f}"))
    return markdown_table(("discovery", "seconds", "peak GB"), rows)


def main() -> None:
    """Finds and measures what is not there yet, and writes the tables."""
    OUT.mkdir(parents=True, exist_ok=True)
    for search in SEARCHES.values():  # in this order: the mask starts from the first
        found(search)
    subject = Subject()
    measured = Measured(subject)
    texts = [circuits_table(measured), ladder_table(measured), cost_table()]
    other = Measured(subject, "resample")
    nothing = torch.zeros_like(other.graph.exists)
    rows = [_cells("empty circuit", other.of("empty circuit", lambda: [nothing]))]
    for label in ("EAP-IG by KL", "learned mask"):
        row = other.circuit(SEARCHES[label], SIZES[-1])
        rows.append(_cells(f"{label}, {SIZES[-1]}, under resample", row))
    texts.append(markdown_table(HEADERS, rows))
    (OUT / "tables.md").write_text("\n\n".join(texts) + "\n")
    print("\n\n".join(texts))


if __name__ == "__main__":
    if len(sys.argv) > 1:  # in a process of its own
        discover(Search(**json.loads(sys.argv[1])))
    else:
        main()
