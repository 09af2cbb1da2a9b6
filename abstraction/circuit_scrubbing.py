"""A circuit as a hypothesis: edges off it do not matter (Chan et al. 2022).

Kept edges carry what they carry on the prompt itself, all others what they carry on prompts drawn
at random.  One run under a mask for each resample.  Modes:

    each     every reader has a donor of its own: no two removed edges of different readers speak of
             one prompt, as in the treeified hypothesis
    joint    one donor for all readers of a run: what discovery calls ablation=resample

A circuit may do well jointly and fail with a donor each: then what is off the circuit agrees on an
answer, and the circuit leans on its being one prompt's.

Shapes: prompts N, batch B, readers R, writers W, resamples K.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from abstraction.recovery import Recovery, label_marginal
from abstraction.scrubbing import check_settings, metrics_of
from circuits.circuit import Circuit
from circuits.engine import Engine
from circuits.engine.memory import TooLittleMemory, footprint, parse_memory
from circuits.metrics import metrics_for
from circuits.prompts import Prompts

MODES = ("each", "joint")


@torch.no_grad()
def scrub_circuit(
    engine: Engine,
    prompts: Prompts,
    circuit: Circuit,
    *,
    resamples: int = 10,
    mode: str = "each",
    exclude_self: bool = False,
    seed: int = 0,
    memory: str = "2GB",
) -> Recovery:
    """Scrubs all that is off a circuit, and says what is left of the behaviour.

    Of the zero points `unconditional` is the empty circuit: the model on another prompt.

    >>> from abstraction import PROGRAMS, compile
    >>> from abstraction.ground_truth.effects import mask_of
    >>> compiled = compile(PROGRAMS["same_ends"]())
    >>> prompts = compiled.model.prompts(compiled.program.records(40, seed=0))
    >>> engine = Engine(compiled.model)
    >>> kept = mask_of(engine.graph, compiled.edges())
    >>> found = scrub_circuit(engine, prompts, Circuit(engine.graph, kept, kept.float()))
    >>> round(found.recovered("accuracy").value, 3)
    1.0

    Raises:
        ValueError: the circuit is of another graph, an unknown mode, a prompt with a length of its
            own.
        TooLittleMemory: the values of all prompts do not fit.
    """
    if circuit.graph != engine.graph:
        raise ValueError("the circuit is of a model of another shape; load the model it is of")
    of_length = check_settings(prompts, mode, MODES, resamples)
    size, count = footprint(engine, prompts), len(prompts)
    held = count * (size.prepared(True) + size.masked())
    if held > parse_memory(memory):
        raise TooLittleMemory(
            f"scrubbing {count} prompts at once takes up to {held / 1e9:.2g} GB, but "
            f"memory={memory}; raise memory, or use fewer prompts"
        )
    prompts = prompts.to(engine.device)
    clean = engine.clean(prompts)
    pool = engine.ablated(clean.writers)
    generator, own = torch.Generator().manual_seed(seed), torch.arange(count)
    metrics = metrics_for(prompts)

    def drawn() -> Int[Tensor, " N"]:
        return of_length.draw(own, generator, exclude_self=exclude_self)

    runs, readers = [], len(engine.graph.readers)
    for _ in tqdm(range(resamples), desc="scrubbing", unit="run", disable=None):
        donors = torch.stack([drawn() for _ in range(readers)] if mode == "each" else [drawn()])
        ablated = replace(pool, donors=donors.expand(readers, -1))
        logits = engine.masked(prompts, circuit.kept, ablated)
        runs.append(metrics_of(prompts, clean.logits, logits, own, metrics))
    empty = [
        metrics_of(prompts, clean.logits, clean.logits[drawn()], own, metrics)
        for _ in range(resamples)
    ]
    other = of_length.draw(own, generator, exclude_self=True)
    scrubbed, unconditional = (
        {metric.name: torch.stack([run[metric.name] for run in each], 1) for metric in metrics}
        for each in (runs, empty)
    )
    return Recovery(
        hypothesis=circuit,
        mode=mode,
        resamples=resamples,
        exclude_self=exclude_self,
        seed=seed,
        scrubbed=scrubbed,
        unconditional=unconditional,
        model=metrics_of(prompts, clean.logits, clean.logits, own, metrics),
        permuted=metrics_of(prompts, clean.logits, clean.logits[other], own, metrics),
        marginal=label_marginal(prompts.to("cpu")),
        draws=(),
    )
