"""Programs: steps that compute variables at every position, in the few operations of a transformer.

A program starts from the variables `token` and `position`.  Each step (`steps.py`) defines one more
variable, with a value at each position: categorical (a whole number below its size) or numerical.

Position i attends, among the positions that it can see, to those j with match(query_i, key_j), and
where none matches to all of them; `ties` says what happens with several: the first, the last, or
their mean.  So every variable is defined everywhere, and a fetch without a match takes its own
position (ties="last", causal) or position 0 ("first").

Steps carry the name of the mechanism they belong to, so that a planted one can be told from the
normal one.

Shapes: batch B, positions S, scored positions P.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from abstraction.causal_model import CausalModel, Mechanism
from abstraction.ground_truth.steps import Lookup, Step, require

INPUTS = ("token", "position")
DRAWS = 100  # rounds of drawing corrupt twins until each has another answer
Sampler = Callable[[int, torch.Generator], Tensor]  # count, generator -> token ids [count, S]


@dataclass(frozen=True)
class Program:
    """Steps, the tokens they work on, and which variable is the answer.

    >>> from abstraction import PROGRAMS
    >>> program = PROGRAMS["greater_than"]()  # `a b ?`: is b greater than a?
    >>> answer = program.answered(torch.tensor([[3, 7, 10]]))
    >>> program.tokens[answer.item()]
    'yes'

    Raises:
        ValueError: unknown or doubled names, a cycle, a table that is not total, inputs of the
            wrong kind.
    """

    name: str
    tokens: tuple[str, ...]  # their names; the id is the index
    length: int  # tokens in an input, at most
    steps: tuple[Step, ...]
    output: str  # the categorical variable that is the answer
    answers: tuple[str, ...]  # the token that stands for each of its categories
    sample: Sampler  # valid inputs of exactly `length` tokens
    scored: tuple[int, ...] = (-1,)  # positions at which the answer is read
    causal: bool = True  # a position sees itself and earlier ones; else all

    def __post_init__(self) -> None:
        _check_tokens(self)
        _check_names(self)
        for step in self.ordered:  # the causal model refuses unknown parents and cycles
            step.check(self.sizes)
        require("output", self.sizes, self.output, categorical=True)
        if len(self.answers) != (size := self.sizes[self.output]):
            raise ValueError(
                f"{len(self.answers)} answers for output {self.output!r}, which has {size} "
                "categories; give one token for each"
            )

    @cached_property
    def by_name(self) -> Mapping[str, Step]:
        return {step.name: step for step in self.steps}

    @cached_property
    def scored_positions(self) -> tuple[int, ...]:
        return tuple(position % self.length for position in self.scored)

    @cached_property
    def ordered(self) -> tuple[Step, ...]:
        """The steps, each after those that it needs."""
        return tuple(self.by_name[name] for name in self.causal_model.order if name in self.by_name)

    @cached_property
    def sizes(self) -> Mapping[str, int | None]:
        """How many categories each variable has; None for numerical ones."""
        sizes: dict[str, int | None] = {"token": len(self.tokens), "position": self.length}
        for step in self.ordered:
            sizes[step.name] = step.categories(sizes)
        return sizes

    @cached_property
    def tables(self) -> Mapping[str, Int[Tensor, "..."]]:
        """The tables of all lookups, with one axis per input."""
        lookups = [step for step in self.steps if isinstance(step, Lookup)]
        return {step.name: step.entries(self.sizes) for step in lookups}

    @cached_property
    def causal_model(self) -> CausalModel:
        """What it means: input `token` [B, S]; every variable [B, S]; `answer`, a token id."""
        ids = torch.tensor([self.tokens.index(name) for name in self.answers])

        def position(token: Tensor) -> Tensor:
            return torch.arange(token.shape[1]).expand_as(token)

        variables: dict[str, Mechanism] = {"position": (("token",), position)}
        for name, step in self.by_name.items():
            variables[name] = (
                step.parents,
                lambda *values, name=name: self._functions[name](*values),
            )
        variables["answer"] = ((self.output,), lambda output: ids[output])
        return CausalModel(("token",), variables)

    @cached_property
    def _functions(self) -> Mapping[str, Callable[..., Tensor]]:
        return {step.name: step.function(self.sizes, causal=self.causal) for step in self.steps}

    def answered(
        self,
        tokens: Int[Tensor, "B S"],
        variables: Iterable[str] = (),
        source: Int[Tensor, "B S"] | None = None,
    ) -> Int[Tensor, "B P"]:
        """The answers, when some variables have the values that they have on the source."""
        sources = {} if source is None else {name: {"token": source} for name in variables}
        values = self.causal_model.interchange({"token": tokens}, sources)
        return values["answer"][:, list(self.scored_positions)]

    def records(
        self, count: int, seed: int, *, sample: Sampler | None = None, label: int | None = None
    ) -> list[dict[str, Any]]:
        """Prompts in the project's format; the corrupt twin is a valid input with another answer.

        `sample` draws the clean inputs, by default as the program does.  ValueError where no input
        with another answer was found.
        """
        generator = torch.Generator().manual_seed(seed)
        clean = (sample or self.sample)(count, generator)
        right = self.answered(clean)
        corrupt = self._with_other_answers(right, generator)
        other = self.answered(corrupt)
        # where one of several answers is the same all the same, any other one is wrong
        ids = [self.tokens.index(name) for name in self.answers]
        tokens = range(len(self.tokens))
        another = torch.tensor([next((i for i in ids if i != token), token) for token in tokens])
        wrong = torch.where(other == right, another[right], other)
        columns = (part.tolist() for part in (clean, corrupt, right, wrong))
        return [
            {
                "clean": clean,
                "corrupt": corrupt,
                "answers": [[answer] for answer in right],
                "wrong_answers": [[answer] for answer in wrong],
                "positions": list(self.scored_positions),
                "id": f"{self.name}.{seed}.{row}",
                **({} if label is None else {"label": label}),
            }
            for row, (clean, corrupt, right, wrong) in enumerate(zip(*columns, strict=True))
        ]

    def _with_other_answers(
        self, right: Int[Tensor, "B P"], generator: torch.Generator
    ) -> Int[Tensor, "B S"]:
        """Valid inputs, each with another answer than `right` has in its row."""
        drawn = self.sample(len(right), generator)
        for _ in range(DRAWS):
            same = (self.answered(drawn) == right).all(1)
            if not same.any():
                return drawn
            drawn = torch.where(same[:, None], self.sample(len(right), generator), drawn)
        raise ValueError(
            f"no input of {self.name} with another answer in {DRAWS} draws; check its sampler"
        )


def encode(program: str, names: Sequence[str], tokens: Sequence[str], length: int) -> list[int]:
    """Returns token ids of token names; ValueError for an unknown token, or too many of them."""
    for name in names:
        if name not in tokens:
            raise ValueError(f"token {name!r} is unknown to {program}; it has {', '.join(tokens)}")
    if not 1 <= len(names) <= length:
        raise ValueError(
            f"{len(names)} tokens, but {program} was compiled for 1 to {length}; shorten the "
            "input, or compile with a greater length"
        )
    return [tokens.index(name) for name in names]


def _check_tokens(program: Program) -> None:
    if len(set(program.tokens)) != len(program.tokens) or not program.tokens:
        raise ValueError(
            f"program {program.name!r} needs at least one token and no name twice: {program.tokens}"
        )
    if program.length < 1:
        raise ValueError(f"length={program.length}, but an input has at least 1 token")
    for name in program.answers:
        if name not in program.tokens:
            raise ValueError(
                f"answer {name!r} is no token; the tokens are {', '.join(program.tokens)}"
            )
    for place in program.scored:
        if not -program.length <= place < program.length:
            raise ValueError(f"scored position {place}, but inputs have {program.length} tokens")


def _check_names(program: Program) -> None:
    names = [step.name for step in program.steps]
    for name in names:
        if name in (*INPUTS, "answer"):
            raise ValueError(
                f"step {name!r} has a name that is taken (token, position, answer); rename it"
            )
        if names.count(name) > 1:
            raise ValueError(
                f"{names.count(name)} steps are called {name!r}; each needs its own name"
            )
    if program.output not in (*INPUTS, *names):
        raise ValueError(
            f"output={program.output!r} is no variable; the variables are "
            f"{', '.join([*INPUTS, *names])}"
        )
