"""Everything on everything: trains the models, finds the circuits, computes every score, resumable.

    OUT/models/TASK/SEED/               trained models; OUT/models/TASK/SEED.missed where one has not learnt its task
    OUT/scores/TASK-SEED.json           strata, circuits with their sizes, seconds
    OUT/scores/TASK-SEED.safetensors    every score as `SCORE|CIRCUIT|PART`

Of each trained task the first `models` seeds from `first_seed` on are used whose model passes its
gates; seeds that were passed over are named in the report.  Work is spread over processes of one
thread each, because the models are small.  What an interrupted run left is kept.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from mad.study.cells import Combination, Scorer
from mad.study.lens import controls, find, look
from mad.study.plan import (
    CONTROLLED,
    FEWER,
    FORMER,
    GRID,
    MAIN,
    NATURAL,
    NATURAL_RECIPES,
    ON_GRID,
    REDRAWN,
    TAUS,
    TRAINED,
    Recipe,
    Study,
)
from mad.study.subject import Subject, load_subject

log = logging.getLogger(__name__)


def run_study(study: Study, out: Path) -> list[Path]:
    """Trains, scores and writes; returns the results' files.

    Raises:
        ValueError: an unknown task, or numbers out of range.
    """
    study.check()
    if study.natural is None and NATURAL in study.tasks:
        log.warning("study.natural names no language model: %s is left out", NATURAL)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(study.workers, context, initializer=_single_thread) as pool:
        chosen = sorted(
            _trained(study, out, pool), key=lambda job: job[0] != NATURAL
        )  # the longest first
        jobs = {
            pool.submit(_measure, study, task, seed, folder, out): (task, seed)
            for task, seed, folder in chosen
        }
        with tqdm(total=len(jobs), desc="score", unit="model", disable=None) as progress:
            for done in as_completed(jobs):
                done.result()
                progress.update()
    return [_files(out, task, seed)[0] for task, seed, _ in chosen]


# --------------------------------------------------------------------------------------------------
# models


def _trained(study: Study, out: Path, pool: Executor) -> Iterator[tuple[str, int, Path]]:
    """Task, seed and folder of every model; trains those that are not there."""
    tasks = [task for task in study.tasks if task in TRAINED]
    passed: dict[str, dict[int, bool]] = {task: {} for task in tasks}
    running: dict[Future, tuple[str, int]] = {}
    following = {task: study.first_seed for task in tasks}

    def submit(task: str) -> None:
        seed = following[task]
        following[task] += 1
        running[pool.submit(_train, task, seed, model_folder(out, task, seed))] = (task, seed)

    for _ in range(study.models):
        for task in tasks:
            submit(task)
    with tqdm(
        total=study.models * len(tasks), desc="train", unit="model", disable=None
    ) as progress:
        while running:
            for done in wait(running, return_when="FIRST_COMPLETED").done:
                task, seed = running.pop(done)
                passed[task][seed] = done.result()
                if passed[task][seed]:
                    progress.update()
                else:
                    submit(task)
    for task in tasks:
        for seed in sorted(seed for seed, good in passed[task].items() if good)[: study.models]:
            yield task, seed, model_folder(out, task, seed)
    if NATURAL in study.tasks and study.natural is not None:
        yield NATURAL, study.first_seed, Path(study.natural)


def model_folder(out: Path, task: str, seed: int) -> Path:
    """Where a trained model is."""
    return out / "models" / task / str(seed)


def _train(task: str, seed: int, folder: Path) -> bool:
    """Trains a model unless it is there; returns whether it has learnt its task."""
    from circuits.training import GateMissed
    from mad.tasks import TASKS
    from mad.tasks.training import Train
    from mad.tasks.training import run as train

    missed = folder.with_suffix(".missed")
    if (folder / "README.md").exists() or missed.exists():
        return not missed.exists()
    try:
        train(Train(task=TASKS[task].schema(), seed=seed, out=str(folder), overwrite=True))
    except GateMissed as error:
        missed.parent.mkdir(parents=True, exist_ok=True)
        missed.write_text(f"{error}\n")
        return False
    return True


# --------------------------------------------------------------------------------------------------
# scores


def _measure(study: Study, task: str, seed: int, model: Path, out: Path) -> None:
    """Computes every score of one subject and writes them, unless they are there."""
    from safetensors.torch import save_file

    about, tensors = _files(out, task, seed)
    if about.exists():
        return
    started = time.perf_counter()
    subject = load_subject(task, seed, model, study.sizes)
    scores, circuits, seconds = measure(subject, study.controls)
    tensors.parent.mkdir(parents=True, exist_ok=True)
    save_file(scores, tensors)
    record = {
        "task": task,
        "seed": seed,
        "strata": {group: list(names) for group, names in subject.strata.items()},
        "circuits": circuits,
        "seconds": seconds | {"all": time.perf_counter() - started},
        "sizes": asdict(study.sizes),
    }
    ready = about.with_suffix(".ready")
    ready.write_text(json.dumps(record, indent=1) + "\n")
    ready.replace(about)  # last: it says that the subject is done


def measure(
    subject: Subject, n_controls: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, float]]:
    """Returns scores by `SCORE|CIRCUIT|PART`, each circuit's size, and seconds by score."""
    from mad.study.baselines import BASELINES, layer_baselines
    from mad.study.candidates import CANDIDATES

    scores: dict[str, torch.Tensor] = {}
    circuits: dict[str, Any] = {}
    seconds: dict[str, float] = {}

    def add(name: str, circuit: str, fit: Callable[[Any], Callable], of: Any) -> None:
        started = time.perf_counter()
        score = fit(of)
        for part, prompts in subject.scored.items():
            scores[f"{name}|{circuit}|{part}"] = score(prompts)
        taken = time.perf_counter() - started
        seconds[f"{name}|{circuit}"] = taken
        log.info("%s %s: %s on %s in %.1f s", subject.task, subject.seed, name, circuit, taken)

    by_layer = layer_baselines(subject)  # these share their distances
    for name in by_layer:
        add(name, "none", by_layer.__getitem__, name)
    for name in BASELINES:
        if name not in by_layer:
            add(name, "none", BASELINES[name], subject)
    for recipe, names, with_controls in plan(subject):
        started = time.perf_counter()
        mask = find(subject, recipe)
        lens = look(subject, recipe, mask)
        circuits[recipe.name] = {
            "edges": int(mask.sum()),
            "edges_total": lens.engine.graph.n_edges,
            "seconds": time.perf_counter() - started,
        }
        for name in names:
            add(name, recipe.name, CANDIDATES[name], lens)
        for number, random in enumerate(controls(lens, n_controls if with_controls else 0)):
            for name in CONTROLLED:
                add(name, f"random{number} of {recipe.name}", CANDIDATES[name], random)
    return scores, circuits, seconds


def plan(subject: Subject) -> Iterator[tuple[Recipe, tuple[str, ...], bool]]:
    """Yields every recipe that a subject can have with the scores to compute, and whether on random
    circuits too.
    """
    from mad.study.candidates import CANDIDATES

    recipes = (MAIN, FORMER, *REDRAWN, *GRID, *FEWER) if subject.one_length else NATURAL_RECIPES
    for recipe in dict.fromkeys(recipes):
        full = recipe in (MAIN, FORMER)
        names = (
            tuple(CANDIDATES)
            if full
            else (*ON_GRID, "transplant")
            if recipe in REDRAWN
            else ON_GRID
        )
        yield recipe, names, full


def _files(out: Path, task: str, seed: int) -> tuple[Path, Path]:
    stem = out / "scores" / f"{task}-{seed}"
    return stem.with_suffix(".json"), stem.with_suffix(".safetensors")


def _single_thread() -> None:
    torch.set_num_threads(1)


def _over(score: str, recipes: Sequence[Recipe]) -> tuple[Scorer, ...]:
    return tuple(Scorer(score, recipe.name) for recipe in recipes)


# scores together, by conformal p-values: the smallest of an ensemble is that of its most alarmed
# member
COMBINATIONS = (
    Combination("strict", _over("transplant", (MAIN, *REDRAWN)), "mean"),
    Combination("output_kl over redrawn prompts", _over("output_kl", (MAIN, *REDRAWN)), "minimum"),
    Combination(
        "output_kl over taus", _over("output_kl", [Recipe(tau=tau) for tau in TAUS]), "minimum"
    ),
    Combination("transplant + output_kl, Fisher", ("transplant", "output_kl"), "fisher"),
    Combination("transplant + output_kl, minimum", ("transplant", "output_kl"), "minimum"),
    Combination("transplant + nodes, Fisher", ("transplant", "nodes"), "fisher"),
    Combination("nodes + output_kl, minimum", ("nodes", "output_kl"), "minimum"),
    Combination("routing + output_kl, minimum", ("routing", "output_kl"), "minimum"),
)
