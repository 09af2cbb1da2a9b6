"""How a program is compiled: options, what is refused of them, and the sizes of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from abstraction.ground_truth.placement import Place, neurons
from abstraction.ground_truth.program import Program
from abstraction.ground_truth.steps import Attend, Lookup, Step
from abstraction.ground_truth.weights import LONGEST, Votes, head_width


@dataclass(frozen=True)
class Options:
    """How to compile.  Sizes left at None are as small as the program allows."""

    n_layers: int | None = None
    n_heads: int | None = None  # distractors included
    d_model: int | None = None
    d_head: int | None = None
    d_mlp: int | None = None  # distractors included
    norm: str = "none"  # none or rms
    rotate: bool = False  # the residual stream, at random
    distractor_heads: int = 0  # per layer
    distractor_neurons: int = 0  # per MLP
    junk: int = 8  # dimensions that distractors write into
    redundant: str | None = None  # a variable that several heads compute
    copies: int = 2  # how many
    needed: int = 1  # how many of them its readers need
    logit: float = 10.0  # of the answer; all others have 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"  # any torch device
    split_input: bool = False  # the engine takes token and position embedding as two writers
    seed: int = 0  # of rotation and distractors

    @property
    def votes(self) -> Votes:
        if self.redundant is None:
            return Votes()
        return Votes(self.redundant, self.copies, self.needed)

    @property
    def junk_width(self) -> int:
        """How many dimensions distractors take."""
        return self.junk if self.distractor_heads or self.distractor_neurons else 0


def check_options(program: Program, options: Options) -> None:
    """Raises ValueError for options that this program cannot be compiled with."""
    if options.norm not in ("none", "rms"):
        raise ValueError(f"norm={options.norm!r}, but it must be none or rms")
    if program.length > LONGEST:
        raise ValueError(
            f"length={program.length}, but attention is hard only up to {LONGEST} tokens; "
            "shorten it"
        )
    for name in ("distractor_heads", "distractor_neurons"):
        if getattr(options, name) < 0:
            raise ValueError(f"{name}={getattr(options, name)}, but it cannot be below 0")
    if options.junk < 1:
        raise ValueError(
            f"junk={options.junk}, but distractors need at least 1 dimension to write into"
        )
    if options.redundant is not None:
        _check_redundancy(program, options, options.redundant)


def _check_redundancy(program: Program, options: Options, name: str) -> None:
    heads = [step.name for step in program.steps if isinstance(step, Attend)]
    able = [head for head in heads if program.sizes[head] is not None]
    if name not in able:
        raise ValueError(
            f"redundant={name!r} is no categorical variable that a head computes; those are {able}"
        )
    if not 1 <= options.needed < options.copies:
        raise ValueError(
            f"copies={options.copies}, needed={options.needed}: it must be 1 <= needed < copies"
        )
    for step in program.steps:
        if name in step.parents and not _counts_votes(step, name, options.needed):
            raise ValueError(
                f"redundant={name!r} cannot be read by step {step.name!r}: only lookups count "
                "votes, and heads that match on it with needed=1"
            )
    if name == program.output:
        raise ValueError(f"redundant={name!r} is the output, and logits do not count votes")


def _counts_votes(step: Step, name: str, needed: int) -> bool:
    """Whether a step that reads a variable can read it from several heads."""
    if isinstance(step, Lookup):
        return step.inputs.count(name) == 1
    matched = isinstance(step, Attend) and name in (step.key, step.query) and step.value != name
    return matched and needed == 1


def sizes(program: Program, options: Options, places: Mapping[str, Place]) -> dict[str, int]:
    """Returns the model's sizes: those given (ValueError if too small), or the smallest that do."""
    needed = _smallest(program, options, places)
    given = {name: getattr(options, name) for name in needed}
    small = [name for name, value in given.items() if value is not None and value < needed[name]]
    if small:
        least = ", ".join(f"{name}={value}" for name, value in needed.items())
        wrong = ", ".join(f"{name}={given[name]}" for name in small)
        raise ValueError(f"program {program.name!r} needs {least}, but {wrong} was given; raise it")
    return {name: needed[name] if value is None else value for name, value in given.items()}


def _smallest(program: Program, options: Options, places: Mapping[str, Place]) -> dict[str, int]:
    layers = [place.layer for place in places.values()]
    heads = [max(place.heads, default=-1) + 1 for place in places.values()]
    in_mlp = dict.fromkeys(layers, 0)
    for name, place in places.items():
        in_mlp[place.layer] += neurons(program, program.by_name[name], options.redundant)
    widths = [head_width(program, step) for step in program.steps if isinstance(step, Attend)]
    stream = sum(1 if size is None else size for size in program.sizes.values())
    return {
        "n_layers": max(layers, default=0) + 1,
        "n_heads": max(1, max(heads, default=0) + options.distractor_heads),
        "d_model": stream + (options.norm == "rms") + options.junk_width,
        "d_head": max(widths, default=1),
        "d_mlp": max(1, max(in_mlp.values(), default=0) + options.distractor_neurons),
    }
