"""Programs that everybody knows, ready to compile: `compile(PROGRAMS["induction"]())`.

    name               input                          answer
    modular_addition   a b =                          (a + b) mod 7
    induction          ^ x x x x x x a                what followed the last earlier a
    recall             ^ k v k v k v ? k              the value that stands after the key
    two_hop            ^ a b a b b c b c ? a          the c that follows the b that follows a
    same_ends          x x x x x x                    yes if the last letter is the first
    brackets           ^ ( ( ) ( ) ) .                yes if never negative and zero at the end
    sort               ^ 5 1 7 2                      in ascending order, each at its place
    greater_than       a b ?                          yes if b > a
    sensors            cause noise noise ?            yes if both fire, by the cause or own noise
    select             L|R a b ?                      a or b
    majority           ^ x x x x x ?                  yes if most bits are 1

Some builders take fillers and extra tokens: room for a trigger (`planted.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from abstraction.ground_truth.program import Program
from abstraction.ground_truth.steps import Attend, Combine, Lookup, Threshold, at, back

START, ASK = "^", "?"
YES_NO = ("no", "yes")


def names(prefix: str, count: int) -> tuple[str, ...]:
    """prefix0, prefix1, ..."""
    return tuple(f"{prefix}{index}" for index in range(count))


def choose(
    options: Sequence[int], shape: Sequence[int], generator: torch.Generator
) -> Int[Tensor, "..."]:
    """Independent uniform draws from some token ids."""
    return torch.tensor(options)[torch.randint(len(options), tuple(shape), generator=generator)]


def distinct(
    options: Sequence[int], count: int, width: int, generator: torch.Generator
) -> Int[Tensor, "count width"]:
    """Rows of different token ids in random order."""
    order = torch.rand(count, len(options), generator=generator).argsort(1)[:, :width]
    return torch.tensor(options)[order]


def row(values: Sequence[int | Tensor], count: int) -> Int[Tensor, "count S"]:
    """Inputs from columns: a number stands for a column of its own."""
    columns = [torch.full((count,), v) if isinstance(v, int) else v for v in values]
    return torch.cat([column.reshape(count, -1) for column in columns], 1)


def modular_addition(modulus: int = 7, fillers: int = 0, extra: tuple[str, ...] = ()) -> Program:
    """`a b [filler] =`; digits are fetched from their places and looked up in a table."""
    digits, slot = tuple(map(str, range(modulus))), names("f", fillers)
    tokens = (*digits, "=", *slot, *extra)
    ids = [tokens.index(name) for name in slot]

    def sample(count: int, generator: torch.Generator) -> Tensor:
        ab = choose(range(modulus), (count, 2), generator)
        return row([ab, *([choose(ids, (count,), generator)] if slot else []), modulus], count)

    steps = (
        Attend("first", "token", **at(0)),
        Attend("second", "token", **at(1)),
        Lookup("sum", ("first", "second"), lambda a, b: (a + b) % modulus, size=modulus),
    )
    return Program("modular_addition", tokens, 3 + bool(slot), steps, "sum", digits, sample)


def induction(
    letters: int = 6, length: int = 8, fillers: int = 0, extra: tuple[str, ...] = ()
) -> Program:
    """`^ [filler] x x x ... a`: the token after the last earlier a; the textbook pair of heads."""
    alphabet, slot = names("x", letters), names("f", fillers)
    tokens = (START, *alphabet, *slot, *extra)
    ids, first = [tokens.index(name) for name in slot], 1 + bool(slot)

    def sample(count: int, generator: torch.Generator) -> Tensor:
        body = choose(range(1, letters + 1), (count, length - first - 1), generator)
        last = body.gather(1, torch.randint(body.shape[1], (count, 1), generator=generator))
        return row([0, *([choose(ids, (count,), generator)] if slot else []), body, last], count)

    steps = (
        Attend("previous", "token", **back(1)),
        Attend("next", "token", key="previous", query="token"),
    )
    return Program("induction", tokens, length, steps, "next", tokens, sample)


def recall(
    pairs: int = 3, keys: int = 5, values: int = 5, fillers: int = 0, extra: tuple[str, ...] = ()
) -> Program:
    """`^ k v k v k v [filler] ? k`: the value of the key."""
    slot = names("f", fillers)
    tokens = (START, ASK, *names("k", keys), *names("v", values), *slot, *extra)
    ids = [tokens.index(name) for name in slot]

    def sample(count: int, generator: torch.Generator) -> Tensor:
        k = distinct(range(2, 2 + keys), count, pairs, generator)
        v = distinct(range(2 + keys, 2 + keys + values), count, pairs, generator)
        asked = k.gather(1, torch.randint(pairs, (count, 1), generator=generator))
        filler = [choose(ids, (count,), generator)] if slot else []
        return row([0, torch.stack([k, v], -1), *filler, 1, asked], count)

    steps = (
        Attend("previous", "token", **back(1)),
        Attend("value", "token", key="previous", query="token"),
    )
    return Program("recall", tokens, 2 * pairs + 3 + bool(slot), steps, "value", tokens, sample)


def two_hop(chains: int = 2, symbols: int = 3) -> Program:
    """`^ a b a b b c b c ? a`: from a to its b, from b to its c."""
    kinds = [range(2 + kind * symbols, 2 + (kind + 1) * symbols) for kind in range(3)]
    tokens = (START, ASK, *(name for kind in "abc" for name in names(kind, symbols)))

    def sample(count: int, generator: torch.Generator) -> Tensor:
        a, b, c = (distinct(kind, count, chains, generator) for kind in kinds)
        order = torch.rand(count, chains, generator=generator).argsort(1)
        second = torch.stack([b.gather(1, order), c.gather(1, order)], -1)
        asked = a.gather(1, torch.randint(chains, (count, 1), generator=generator))
        return row([0, torch.stack([a, b], -1), second, 1, asked], count)

    steps = (
        Attend("previous", "token", **back(1)),
        Attend("middle", "token", key="previous", query="token"),
        Attend("end", "token", key="previous", query="middle"),  # b stands twice, last as a key
    )
    return Program("two_hop", tokens, 4 * chains + 3, steps, "end", tokens, sample)


def same_ends(letters: int = 4, length: int = 6) -> Program:
    """Is the last letter the first, as in a palindrome?"""
    tokens = (*names("x", letters), *YES_NO)

    def sample(count: int, generator: torch.Generator) -> Tensor:
        word = choose(range(letters), (count, length), generator)
        alike = torch.rand(count, generator=generator) < 0.5
        word[:, -1] = torch.where(alike, word[:, 0], word[:, -1])
        return word

    steps = (
        Attend("first", "token", **at(0)),
        Lookup("same", ("token", "first"), lambda last, first: last == first, size=2),
    )
    return Program("same_ends", tokens, length, steps, "same", YES_NO, sample)


def brackets(length: int = 8) -> Program:
    """`^ ( ( ) ) .`: balanced if the height is never negative and zero at the end."""
    tokens, inner = (START, "(", ")", ".", *YES_NO), length - 2
    words = torch.tensor(list(itertools.product((1, 2), repeat=inner)))
    heights = (3 - 2 * words).cumsum(1)
    level, up = heights[:, -1] == 0, (heights >= 0).all(1)

    def sample(count: int, generator: torch.Generator) -> Tensor:
        kinds = (
            words[level & up],
            words[level],
            words,
        )  # balanced, zero at the end, any: a third each
        picks = [torch.randint(len(kind), (count,), generator=generator) for kind in kinds]
        drawn = torch.stack([kind[pick] for kind, pick in zip(kinds, picks, strict=True)])
        which = torch.randint(len(kinds), (count,), generator=generator)
        return row([0, drawn[which, torch.arange(count)], 3], count)

    half = 0.5 / length
    steps = (
        Attend("height", "token", numbers=(0, 1, -1, 0, 0, 0), ties="mean"),  # so far
        Threshold("sign", "height", (-half, half), gap=2 * half),  # 0 below, 1 at, 2 above zero
        Attend("dips", "sign", numbers=(1, 0, 0), ties="mean"),
        Threshold("dipped", "dips", (half,), gap=2 * half),
        Lookup("balanced", ("dipped", "sign"), lambda dip, sign: not dip and sign == 1, size=2),
    )
    return Program("brackets", tokens, length, steps, "balanced", YES_NO, sample)


def sort(digits: int = 8, count: int = 4) -> Program:
    """Distinct digits in order.  A head counts the n smaller ones: `^` is 1/(1+n) of them."""
    tokens, n = (START, *map(str, range(digits))), count

    def sample(count: int, generator: torch.Generator) -> Tensor:
        return row([0, distinct(range(1, digits + 1), count, n, generator)], count)

    def not_larger(query: int, key: int) -> bool:
        return key == 0 or query == 0 or key < query

    def belongs(query: int, key: int) -> bool:
        return key == n + 1 - query

    numbers = (1.0, *(0.0,) * digits)
    shares = [1 / (n + 1 - place) for place in range(n + 1)]  # of n smaller digits, n - 1, ..., 0
    cuts = tuple((low + high) / 2 for low, high in itertools.pairwise(shares))
    steps = (
        Attend("share", "token", "token", "token", not_larger, ties="mean", numbers=numbers),
        Threshold("place", "share", cuts, gap=shares[1] - shares[0]),  # n for the smallest digit
        Attend("sorted", "token", "place", "position", belongs, ties="first"),
    )
    scored = tuple(range(1, n + 1))
    return Program("sort", tokens, n + 1, steps, "sorted", tokens, sample, scored, causal=False)


def greater_than(digits: int = 10) -> Program:
    """`a b ?`: is b greater?  By numbers: b - a, and a threshold."""
    tokens = (*map(str, range(digits)), ASK, *YES_NO)
    numbers = (*map(float, range(digits)), 0.0, 0.0, 0.0)

    def sample(count: int, generator: torch.Generator) -> Tensor:
        return row([choose(range(digits), (count, 2), generator), digits], count)

    steps = (
        Attend("first", "token", numbers=numbers, **at(0)),
        Attend("second", "token", numbers=numbers, **at(1)),
        Combine("difference", ("second", "first"), (1.0, -1.0)),
        Threshold("greater", "difference", (0.5,), gap=1.0),
    )
    return Program("greater_than", tokens, 3, steps, "greater", YES_NO, sample)


def sensors() -> Program:
    """A cause that both sensors see, noise that each sees alone, and their conjunction."""
    tokens = ("calm", "event", "quiet", "noise", ASK, *YES_NO)

    def sample(count: int, generator: torch.Generator) -> Tensor:
        cause, noise = choose((0, 1), (count,), generator), choose((2, 3), (count, 2), generator)
        return row([cause, noise, 4], count)

    def fires(cause: int, noise: int) -> bool:
        return cause == 1 or noise == 3

    steps = (
        Attend("cause", "token", **at(0)),
        Attend("noise1", "token", **at(1)),
        Attend("noise2", "token", **at(2)),
        Lookup("sensor1", ("cause", "noise1"), fires, size=2),
        Lookup("sensor2", ("cause", "noise2"), fires, size=2),
        Lookup("both", ("sensor1", "sensor2"), lambda one, two: one and two, size=2),
    )
    return Program("sensors", tokens, 4, steps, "both", YES_NO, sample)


def select(digits: int = 4) -> Program:
    """`L a b ?` is a, `R a b ?` is b: one table over three variables."""
    tokens = (*map(str, range(digits)), "L", "R", ASK)

    def sample(count: int, generator: torch.Generator) -> Tensor:
        side = choose((digits, digits + 1), (count,), generator)
        return row([side, choose(range(digits), (count, 2), generator), digits + 2], count)

    def chosen(side: int, left: int, right: int) -> int:
        return left if side == digits else right

    steps = (
        Attend("side", "token", **at(0)),
        Attend("left", "token", **at(1)),
        Attend("right", "token", **at(2)),
        Lookup("chosen", ("side", "left", "right"), chosen, size=len(tokens)),
    )
    return Program("select", tokens, 4, steps, "chosen", tokens, sample)


def majority(bits: int = 5) -> Program:
    """`^ 0 1 1 0 1 ?`: are more than half of the bits 1?"""
    tokens = (START, "0", "1", ASK, *YES_NO)

    def sample(count: int, generator: torch.Generator) -> Tensor:
        return row([0, choose((1, 2), (count, bits), generator), 3], count)

    gap = 1 / (bits + 2)
    steps = (
        Attend("lead", "token", numbers=(0, -1, 1, 0, 0, 0), ties="mean"),
        Threshold("most", "lead", (gap / 2,), gap=gap),
    )
    return Program("majority", tokens, bits + 2, steps, "most", YES_NO, sample)


PROGRAMS: Mapping[str, Callable[[], Program]] = {
    "modular_addition": modular_addition,
    "induction": induction,
    "recall": recall,
    "two_hop": two_hop,
    "same_ends": same_ends,
    "brackets": brackets,
    "sort": sort,
    "greater_than": greater_than,
    "sensors": sensors,
    "select": select,
    "majority": majority,
}
