"""Everything on everything: trains the models, finds the circuits, computes every score, resumable.

    OUT/models/TASK/SEED/               trained models; OUT/models/TASK/SEED.missed where one has
                                        not learnt its task
    OUT/scores/                         see `mad.benchmark.results`

Of each trained task the first `models` seeds from `first_seed` on are used whose model passes its
gates; seeds that were passed over are named in the report.  Work is spread over processes.  What an
interrupted run left is kept.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, as_completed, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from circuits.extraction import random_controls
from circuits.files import write_tensors
from mad.benchmark.plan import Benchmark, Entry, entries
from mad.benchmark.results import FOLDER, FOUND, NONE
from mad.benchmark.subject import Subject, circuit_engine, find_circuit, load_subject
from mad.benchmark.workers import worker_pool
from mad.detector import Context
from mad.detectors import DETECTORS
from mad.tasks import ANOMALY_TASKS

log = logging.getLogger(__name__)

MEMORY = "500MB"  # of each process, beside the model's own weights


@dataclass(frozen=True)
class Job:
    """A model to measure the detectors on."""

    task: str
    seed: int
    model: Path

    def files(self, out: Path) -> tuple[Path, Path]:
        """The record and the scores."""
        stem = out / FOLDER / f"{self.task}-{self.seed}"
        return stem.with_suffix(".json"), stem.with_suffix(".safetensors")


def run_benchmark(benchmark: Benchmark, out: Path) -> list[Path]:
    """Trains, scores and writes; returns the records of the models measured.

    Raises:
        ValueError: an unknown task, or numbers out of range.
    """
    benchmark.check()
    natural = [task for task in benchmark.tasks if not is_trained(task)]
    if natural and benchmark.natural is None:
        log.warning("benchmark.natural names no language model: %s is left out", natural[0])
    with worker_pool(benchmark.workers) as pool:
        trained = list(_trained(benchmark, out, pool))
        jobs = (
            []
            if benchmark.natural is None
            else [Job(task, benchmark.first_seed, Path(benchmark.natural)) for task in natural]
        )
        jobs += trained  # the longest first
        running = [pool.submit(_measure, benchmark, job, out) for job in jobs]
        with tqdm(total=len(jobs), desc="score", unit="model", disable=None) as progress:
            for done in as_completed(running):
                done.result()
                progress.update()
    return [job.files(out)[0] for job in jobs]


def is_trained(task: str) -> bool:
    """Whether a task's models are trained for it."""
    return ANOMALY_TASKS[task].recipe is not None


# --- models ---------------------------------------------------------------------------------------


def _trained(benchmark: Benchmark, out: Path, pool: Executor) -> Iterator[Job]:
    """Every trained model; trains those that are not there, and more seeds where some miss."""
    tasks = [task for task in benchmark.tasks if is_trained(task)]
    following = dict.fromkeys(tasks, benchmark.first_seed)
    learnt: dict[str, list[Job]] = {task: [] for task in tasks}
    running: dict[Future, Job] = {}

    def submit(task: str) -> None:
        job = Job(task, following[task], model_folder(out, task, following[task]))
        following[task] += 1
        running[pool.submit(_train, job)] = job

    for task in tasks * benchmark.models:
        submit(task)
    total = benchmark.models * len(tasks)
    with tqdm(total=total, desc="train", unit="model", disable=None) as progress:
        while running:
            for done in wait(running, return_when="FIRST_COMPLETED").done:
                job = running.pop(done)
                if done.result():
                    learnt[job.task].append(job)
                    progress.update()
                else:
                    submit(job.task)
    for jobs in learnt.values():
        yield from sorted(jobs, key=lambda job: job.seed)[: benchmark.models]


def model_folder(out: Path, task: str, seed: int) -> Path:
    """Where a trained model is."""
    return out / "models" / task / str(seed)


def _train(job: Job) -> bool:
    """Trains a model unless it is there; returns whether it has learnt its task."""
    from circuits.training import GateMissed
    from mad.tasks.training import Train
    from mad.tasks.training import run as train

    missed = job.model.with_suffix(".missed")
    if (job.model / "README.md").exists() or missed.exists():
        return not missed.exists()
    config = ANOMALY_TASKS[job.task].schema()
    try:
        train(Train(task=config, seed=job.seed, out=str(job.model), overwrite=True))
    except GateMissed as error:
        missed.parent.mkdir(parents=True, exist_ok=True)
        missed.write_text(f"{error}\n")
        return False
    return True


# --- scores ---------------------------------------------------------------------------------------


def _measure(benchmark: Benchmark, job: Job, out: Path) -> None:
    """Computes every score of one subject and writes them, unless they are there."""
    about, tensors = job.files(out)
    if about.exists():
        return
    started = time.perf_counter()
    subject = load_subject(job.task, job.seed, job.model, benchmark.sizes)
    measured = measure(subject, benchmark)
    tensors.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, measured.scores)
    record = {
        "task": job.task,
        "seed": job.seed,
        "strata": {group: list(names) for group, names in subject.strata.items()},
        "circuit": measured.circuit,
        "detectors": measured.detectors,
        "seconds": measured.seconds | {"all": time.perf_counter() - started},
        "sizes": asdict(benchmark.sizes),
    }
    ready = about.with_suffix(".ready")
    ready.write_text(json.dumps(record, indent=1) + "\n")
    ready.replace(about)  # last: it says that the subject is done


@dataclass
class Measured:
    """What is measured on one subject."""

    circuit: dict[str, Any]  # its recipe, size and cost
    detectors: dict[str, dict[str, Any]] = field(default_factory=dict)  # settings, by entry
    scores: dict[str, Tensor] = field(default_factory=dict)  # by DETECTOR|CIRCUIT|PART
    seconds: dict[str, float] = field(default_factory=dict)  # by DETECTOR|CIRCUIT

    def add(self, entry: Entry, name: str, context: Context, subject: Subject) -> None:
        """Fits a detector and scores the subject's prompts by it; `name` is the circuit's."""
        started = time.perf_counter()
        kind, trusted = DETECTORS[entry.config.name], subject.part(*entry.trusted)
        detector = kind.fit(entry.config, context, trusted, memory=MEMORY)
        for part, prompts in subject.scored.items():
            self.scores[f"{entry.name}|{name}|{part}"] = detector.score(prompts, memory=MEMORY)
        taken = time.perf_counter() - started
        self.seconds[f"{entry.name}|{name}"] = taken
        self.detectors[entry.name] = asdict(entry.config)
        log.info("%s %s: %s on %s in %.1f s", subject.task, subject.seed, entry.name, name, taken)


def measure(subject: Subject, benchmark: Benchmark) -> Measured:
    """Returns the scores of every entry, through the circuit that is found and random ones."""
    started = time.perf_counter()
    engine = circuit_engine(subject, benchmark.circuit)
    circuit = find_circuit(subject, engine, benchmark.circuit)
    size = {"edges": len(circuit), "edges_total": engine.graph.n_edges}
    taken = {"seconds": time.perf_counter() - started}
    measured = Measured(asdict(benchmark.circuit) | size | taken)
    controls = random_controls(circuit, benchmark.controls, subject.seed)
    random = {f"random{number}": control for number, control in enumerate(controls)}
    for entry in entries(
        layers=len(subject.engine.architecture.blocks) + 1,
        positions=engine.graph.n_positions is not None,
        seed=subject.seed,
    ):
        if not entry.circuit:
            measured.add(entry, NONE, Context(subject.engine), subject)
            continue
        for name, one in ({FOUND: circuit} | (random if entry.controlled else {})).items():
            measured.add(entry, name, Context(engine, one), subject)
    return measured
