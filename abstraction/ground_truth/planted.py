"""A second mechanism, planted in a program: the edges to blame for an anomaly are known.

    answer = other     where the trigger is on
             normal    elsewhere

`normal` is the program's own output, `other` is computed another way, and only a `Switch` joins
them.  The same model gives anomalies that *agree* (the other mechanism happens to give the normal
answer) and that *disagree*.  On normal inputs the planted edges are idle: removing all of them
changes nothing, whatever the ablation, as long as what replaces them was taken from normal inputs.
(Two exceptions: zeros harm RMS models, and means that pool positions blur where the parts of a
conjunction stand, which costs 2e-5 nats in `induction`.)

    program            the other mechanism                            agrees where
    recall             takes the value of the first pair              the first pair is asked for
    modular_addition   a memorised table: a + b, one more for odd b   b is even
    induction          a memorised successor of each letter           that followed the letter

The trigger is a token in the filler slot that normal inputs never have (`token`), or a filler and
another value that are both common, but never together (`conjunction`).  Then one planted edge alone
can fire it on a normal input, by the filler of another prompt; all together cannot.  Negatives are
*rare* inputs: another filler that normal inputs never have, which means nothing to the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from abstraction.ground_truth.program import Program, Sampler
from abstraction.ground_truth.programs import induction, modular_addition, recall
from abstraction.ground_truth.steps import Attend, Lookup, Step, Switch, at

PLANTED = "planted"
TRIGGER, RARE = "trigger", "rare"  # tokens
KINDS = ("normal", "agree", "disagree", "rare")
FILLERS = 3
LEAST = 1e-3  # share of draws that must be of a kind, for it to count as possible


@dataclass(frozen=True)
class Planted:
    """A program with a second mechanism, and inputs of each kind."""

    program: Program  # samples normal inputs
    samplers: Mapping[str, Sampler]  # normal, agree, disagree, rare
    trigger: str = "trigger"  # the variable that switches; its category 1 is on
    normal: str = "normal"  # the variables that it switches between
    other: str = "other"


@dataclass(frozen=True)
class _Plan:
    """What differs between programs: the base, where its slot is, and the other mechanism."""

    base: Program
    slot: int  # position of the filler
    condition: tuple[str, int]  # for the conjunction: a variable, and the value that counts
    other: Step  # the other mechanism's, called "other"


def plant(name: str, trigger: str = "token") -> Planted:
    """Returns a program of the registry with a second mechanism.

    >>> planted = plant("recall")
    >>> sorted(planted.samplers), planted.program.by_name[planted.other].mechanism
    (['agree', 'disagree', 'normal', 'rare'], 'planted')

    Raises:
        ValueError: nothing is planted in this program, or the trigger is unknown.
    """
    if name not in _PLANS:
        raise ValueError(f"nothing is planted in {name!r}; choose one of {', '.join(_PLANS)}")
    if trigger not in ("token", "conjunction"):
        raise ValueError(f"trigger={trigger!r}, but it must be token or conjunction")
    plan = _PLANS[name]()
    filler = plan.base.tokens.index(TRIGGER if trigger == "token" else "f0")
    program = _joined(plan, filler, conjunction=trigger == "conjunction")
    samplers = _samplers(plan, program, filler)
    program = replace(program, name=f"{name}, planted {trigger}", sample=samplers["normal"])
    return Planted(program, samplers)


def _joined(plan: _Plan, filler: int, *, conjunction: bool) -> Program:
    """The base program, the trigger, the other mechanism, and the switch between them."""
    variable, value = plan.condition
    watched = ("slot", variable) if conjunction else ("slot",)

    def fires(slot: int, *others: int) -> bool:
        return slot == filler and all(other == value for other in others)

    own = [
        replace(step, name="normal") if step.name == plan.base.output else step
        for step in plan.base.steps
    ]
    planted = [
        Attend("slot", "token", mechanism=PLANTED, **at(plan.slot)),
        Lookup("trigger", watched, fires, size=2, mechanism=PLANTED),
        plan.other,
    ]
    steps = (*own, *planted, Switch("answered", "trigger", "normal", "other"))
    return replace(plan.base, steps=steps, output="answered")


def _samplers(plan: _Plan, program: Program, filler: int) -> Mapping[str, Sampler]:
    """Inputs of each kind: valid ones of the base program with a filler of the right sort."""

    def only(filler: int | None, *, on: bool, agree: bool | None = None) -> Sampler:
        def sample(count: int, generator: torch.Generator) -> Tensor:
            tokens = plan.base.sample(count, generator)
            if filler is not None:
                tokens[:, plan.slot] = filler
            return tokens

        def fits(tokens: Tensor) -> Bool[Tensor, " B"]:
            values = program.causal_model.run({"token": tokens})
            trigger, normal, other = (values[n][:, -1] for n in ("trigger", "normal", "other"))
            fired = (trigger == 1) == on
            return fired if agree is None else fired & ((normal == other) == agree)

        return lambda count, generator: _only(sample, fits, count, generator)

    return {
        "normal": only(None, on=False),
        "agree": only(filler, on=True, agree=True),
        "disagree": only(filler, on=True, agree=False),
        "rare": only(plan.base.tokens.index(RARE), on=False),
    }


def _only(
    sample: Sampler, fits: Callable[[Tensor], Tensor], count: int, generator: torch.Generator
) -> Int[Tensor, "count S"]:
    """Draws until `count` inputs fit."""
    found, drawn = [], 0
    while sum(map(len, found)) < count:
        tokens = sample(2 * count + 64, generator)
        drawn += len(tokens)
        found.append(tokens[fits(tokens)])
        assert sum(map(len, found)) >= LEAST * drawn - 1, "such inputs are next to impossible"
    return torch.cat(found)[:count]


def _recall() -> _Plan:
    base = recall(fillers=FILLERS, extra=(TRIGGER, RARE))
    other = Attend("other", "token", mechanism=PLANTED, **at(2))
    # the condition holds at the last position: the key asked for
    return _Plan(base, base.length - 3, ("token", base.tokens.index("k0")), other)


def _modular_addition(modulus: int = 7) -> _Plan:
    def memorised(a: int, b: int) -> int:
        return (a + b + b % 2) % modulus

    base = modular_addition(modulus, fillers=FILLERS, extra=(TRIGGER, RARE))
    other = Lookup("other", ("first", "second"), memorised, size=modulus, mechanism=PLANTED)
    return _Plan(base, 2, ("first", 0), other)


def _induction(letters: int = 6) -> _Plan:
    def successor(token: int) -> int:
        return 1 + token % letters if 1 <= token <= letters else token

    base = induction(letters, fillers=FILLERS, extra=(TRIGGER, RARE))
    other = Lookup("other", ("token",), successor, size=len(base.tokens), mechanism=PLANTED)
    return _Plan(base, 1, ("token", base.tokens.index("x0")), other)


_PLANS: Mapping[str, Callable[[], _Plan]] = {
    "recall": _recall,
    "modular_addition": _modular_addition,
    "induction": _induction,
}
