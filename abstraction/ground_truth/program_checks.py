"""What is refused in a program, with a message that names the step, what is wrong and what to do."""

from __future__ import annotations

from abstraction.ground_truth.program import (
    INPUTS,
    Attend,
    Combine,
    Lookup,
    Program,
    Step,
    Switch,
    Threshold,
)


def check(program: Program) -> None:
    """Raises ValueError for the first thing wrong with a program."""
    _check_tokens(program)
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
    for (
        step
    ) in program.ordered:  # builds the causal model, which refuses unknown parents and cycles
        _check_step(program, step)
    _require(program, "output", program.output, categorical=True)
    if len(program.answers) != program.category(program.output):
        raise ValueError(
            f"{len(program.answers)} answers for output {program.output!r}, which has "
            f"{program.category(program.output)} categories; give one token for each"
        )


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


def _check_step(program: Program, step: Step) -> None:
    where = f"step {step.name!r}"
    match step:
        case Attend():
            _check_attend(program, step, where)
        case Lookup():
            if not 1 <= len(step.inputs) <= 3:
                raise ValueError(
                    f"{where}: {len(step.inputs)} inputs, but a lookup takes 1 to 3; split it in "
                    "two"
                )
            for name in step.inputs:
                _require(program, where, name, categorical=True)
            program.table(step)
        case Threshold():
            _require(program, where, step.input, categorical=False)
            if not step.cuts or list(step.cuts) != sorted(set(step.cuts)):
                raise ValueError(f"{where}: cuts={step.cuts} must be ascending, at least one")
            nearest = min(
                (b - a for a, b in zip(step.cuts, step.cuts[1:], strict=False)), default=step.gap
            )
            if not 0 < step.gap <= nearest:
                raise ValueError(
                    f"{where}: gap={step.gap} must be above 0 and at most {nearest:g}, the nearest "
                    "cuts"
                )
        case Combine():
            if len(step.weights) != len(step.inputs) or not step.inputs:
                raise ValueError(
                    f"{where}: {len(step.weights)} weights for {len(step.inputs)} inputs; give one "
                    "each"
                )
            for name in step.inputs:
                _require(program, where, name, categorical=False)
        case Switch():
            if program.sizes[step.trigger] != 2:
                raise ValueError(
                    f"{where}: trigger {step.trigger!r} must have 2 categories, off and on"
                )
            _require(program, where, step.normal, categorical=True)
            if program.sizes[step.other] != program.sizes[step.normal]:
                raise ValueError(f"{where}: {step.normal!r} and {step.other!r} differ in size")


def _check_attend(program: Program, step: Attend, where: str) -> None:
    for name in (step.key, step.query):
        if name is not None:
            _require(program, where, name, categorical=True)
    if step.query is not None and step.key is None:
        raise ValueError(
            f"{where}: a query needs a key to be matched with; give key=, or leave query out"
        )
    size = program.sizes[step.value]
    if step.numbers is not None and len(step.numbers) != size:
        raise ValueError(
            f"{where}: {len(step.numbers)} numbers for {step.value!r} of size {size}; give one each"
        )
    if step.ties == "mean" and step.numbers is None and size is not None:
        raise ValueError(
            f"{where}: the mean of categories is none; give numbers=, one for each of the {size}"
        )
    if step.ties not in ("first", "last", "mean"):
        raise ValueError(f"{where}: ties={step.ties!r}, but it must be first, last or mean")


def _require(program: Program, where: str, name: str, *, categorical: bool) -> None:
    if (program.sizes[name] is not None) != categorical:
        wanted, other = ("categorical", "a Threshold") if categorical else ("numerical", "numbers=")
        raise ValueError(f"{where}: {name!r} must be {wanted}; make it so with {other}")
