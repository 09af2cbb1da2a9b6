"""Associative recall: `[BOS] k1 v1 k2 v2 k3 v3 k4 v4 [filler] [QUERY] k_i` is answered with `v_i`.

A two-layer transformer learns it by induction (Olsson et al. 2022, arXiv 2209.11895): a head of
layer 0 writes at each value the key that stands before it, and a head of layer 1 looks from the
query key for that key and copies the value. Keys are split in two, so that a model trained on all
of them can be looked at on the `trusted` ones and tried on the `unseen` ones. The fillers mean
nothing; there may be several slots for them.

The corrupt prompt has the same tokens in other places, so no bag of tokens can tell the two apart.
With n pairs, slot s holds (k[s], v[s]) in the clean prompt and (k[s-d], v[s+d]) in the corrupt one,
which asks for k[i+d] and not for k[i], all modulo n. Asking for another key alone would leave every
pair as it was, and the edges of the previous-token head would carry no difference. With all three
moved, the retrieving head goes wrong whichever of its inputs come from the corrupt prompt, so no
edge of the mechanism is free:

    queries, keys or values alone     answer v[i+d]
    two of the three                  answer v[i+2d]
    all three (the corrupt prompt)    answer v[i+3d]

It takes d, 2d, 3d != 0 modulo n, hence n >= 4; d is drawn for each prompt from all that do.

Shapes: batch B, pairs P, filler slots F, sequence length S = 2 P + F + 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from jaxtyping import Int
from numpy.random import Generator

from circuits.tasks.task import Task, token_records

# One token each; the fillers, the keys and the values follow. RESERVED is in no prompt made here.
BOS, QUERY, RESERVED = 0, 1, 2
FEWEST_PAIRS = 4  # with fewer there is no shift d as above
BARREN_DRAWS = 50  # draws in a row without one new prompt after which the prompts count as used up


@dataclass
class Recall:
    """Prompts of associative recall."""

    name: str = "recall"
    pairs: int = 4  # key-value pairs in a prompt, at least 4
    # keys of the first part, and of the second
    trusted_keys: int = 32
    unseen_keys: int = 16
    values: int = 32  # values, from which each prompt takes `pairs` different ones
    fillers: int = 4  # meaningless tokens, one of which stands in each filler slot
    filler_slots: int = 1  # filler slots before the query marker
    keys: str = "trusted"  # which keys the prompts use: "trusted", "unseen" or "all"


@dataclass(frozen=True)
class Vocabulary:
    """The token ids: BOS, QUERY, RESERVED, then fillers, trusted keys, unseen keys, values."""

    fillers: range
    trusted: range
    unseen: range
    values: range
    size: int


@dataclass(frozen=True)
class Choices:
    """What each part of a prompt is drawn from: token ids, and the pairs that may be asked for."""

    keys: range
    values: range
    slots: range
    fillers: range


@dataclass(frozen=True)
class Contexts:
    """A batch of prompts by their parts; every entry but `slot` is a token id."""

    keys: Int[np.ndarray, "B P"]
    values: Int[np.ndarray, "B P"]
    slot: Int[np.ndarray, " B"]  # which pair is asked for, 0 .. P-1
    filler: Int[np.ndarray, "B *F"]  # no second axis where there is one filler slot

    @property
    def answers(self) -> Int[np.ndarray, " B"]:
        """The value that follows the key asked for."""
        return np.take_along_axis(self.values, self.slot[:, None], axis=1)[:, 0]


def vocabulary(config: Recall) -> Vocabulary:
    """The token ids that `config` lays out."""
    ranges, first = [], RESERVED + 1
    for name in ("fillers", "trusted_keys", "unseen_keys", "values"):
        size = getattr(config, name)
        if size < 1:
            raise ValueError(f"{name}={size}, but at least 1 is needed; raise {name}")
        ranges.append(range(first, first + size))
        first += size
    return Vocabulary(*ranges, size=first)


def prompt_length(config: Recall) -> int:
    """Tokens in a prompt: BOS, the pairs, the fillers, QUERY, the key asked for."""
    return 2 * config.pairs + config.filler_slots + 3


def choices(config: Recall) -> Choices:
    """What `config` draws from: the keys that it names, and all values, slots and fillers.

    Raises:
        ValueError: an unknown choice of keys.
    """
    ids = vocabulary(config)
    everything = range(ids.trusted.start, ids.unseen.stop)
    keys = {"trusted": ids.trusted, "unseen": ids.unseen, "all": everything}
    if config.keys not in keys:
        raise ValueError(f"keys={config.keys!r} is none of {', '.join(keys)}; choose one of them")
    return Choices(keys[config.keys], ids.values, range(config.pairs), ids.fillers)


def draw(
    config: Recall, count: int, generator: Generator, parts: Choices | None = None
) -> Contexts:
    """`count` random prompts; keys differ within a prompt, and so do values.

    Raises:
        ValueError: fewer than 4 pairs or no filler slot, an unknown choice of keys, or too few keys
            or values for the pairs.
    """
    if config.pairs < FEWEST_PAIRS:
        raise ValueError(
            f"pairs={config.pairs}, but the corrupt prompt needs at least {FEWEST_PAIRS}; raise "
            "pairs"
        )
    if config.filler_slots < 1:
        raise ValueError(
            f"filler_slots={config.filler_slots}, but at least 1 is needed; raise filler_slots"
        )
    parts = choices(config) if parts is None else parts
    fillers = (count,) if config.filler_slots == 1 else (count, config.filler_slots)
    return Contexts(
        keys=_without_replacement(parts.keys, "keys", config.pairs, count, generator),
        values=_without_replacement(parts.values, "values", config.pairs, count, generator),
        slot=generator.integers(parts.slots.start, parts.slots.stop, size=count),
        filler=generator.integers(parts.fillers.start, parts.fillers.stop, size=fillers),
    )


def tokens(contexts: Contexts) -> Int[np.ndarray, "B S"]:
    """The prompts as token ids."""
    count, pairs = contexts.keys.shape
    asked = np.take_along_axis(contexts.keys, contexts.slot[:, None], axis=1)  # B 1
    body = np.stack([contexts.keys, contexts.values], axis=2)  # B P 2
    body = body.reshape(count, 2 * pairs)  # B 2P: k1 v1 k2 v2 ...
    bos, query = np.full((count, 1), BOS), np.full((count, 1), QUERY)
    return np.column_stack([bos, body, contexts.filler, query, asked])  # B S


def counterfactual(contexts: Contexts, generator: Generator) -> Contexts:
    """The same tokens, rearranged so that no part of the retrieval is as it was (see the top)."""
    count, pairs = contexts.keys.shape
    shifts = np.array([d for d in range(1, pairs) if 2 * d % pairs != 0 and 3 * d % pairs != 0])
    shift = generator.choice(shifts, size=count)  # B, the d of the module docstring
    slots = np.arange(pairs)
    return replace(
        contexts,
        keys=np.take_along_axis(contexts.keys, (slots - shift[:, None]) % pairs, axis=1),
        values=np.take_along_axis(contexts.values, (slots + shift[:, None]) % pairs, axis=1),
        slot=(contexts.slot + 2 * shift) % pairs,  # where key k[i+d] now stands
    )


def draw_distinct(
    config: Recall, count: int, generator: Generator, filler: int | None = None
) -> Contexts:
    """`count` random prompts, no two alike; `filler`, if given, stands in every filler slot.

    Raises:
        ValueError: `config` does not have that many prompts, or `draw` refuses it.
    """

    def drawn(rows: int) -> Contexts:
        batch = draw(config, rows, generator)
        if filler is None:
            return batch
        return replace(batch, filler=np.full_like(batch.filler, filler))

    return distinct(drawn, count)


def distinct(drawn: Callable[[int], Contexts], count: int) -> Contexts:
    """The first `count` different prompts of those that `drawn(number)` returns.

    Raises:
        ValueError: there are not that many different prompts.
    """
    found, barren = drawn(0), 0
    while len(found.slot) < count:
        if barren == BARREN_DRAWS:
            raise ValueError(
                f"count={count}, but only {len(found.slot)} different prompts were found; lower "
                "count or add keys"
            )
        more = join([found, drawn(count)])
        _, first = np.unique(tokens(more), axis=0, return_index=True)
        barren = barren + 1 if len(first) == len(found.slot) else 0
        found = select(more, np.sort(first))
    return select(found, slice(None, count))


def select(contexts: Contexts, rows: slice | Int[np.ndarray, " C"]) -> Contexts:
    """The prompts at `rows`."""
    return Contexts(*(getattr(contexts, part.name)[rows] for part in fields(Contexts)))


def join(batches: Sequence[Contexts]) -> Contexts:
    """All prompts of the batches, in order; at least one batch."""
    names = [part.name for part in fields(Contexts)]
    return Contexts(*(np.concatenate([getattr(b, name) for b in batches]) for name in names))


def records(
    clean: Contexts, corrupt: Contexts, answers: Int[np.ndarray, " B"], group: str, seed: int
) -> list[dict]:
    """One record a prompt; the wrong answers are the other values of the prompt."""
    prompts = tokens(clean), tokens(corrupt)
    return token_records("recall", *prompts, answers, clean.values, group, seed)


def with_counterfactuals(
    contexts: Contexts, group: str, seed: int, generator: Generator
) -> list[dict]:
    """`records` of prompts, rearranged prompts as their corrupt ones, and what recall answers."""
    return records(contexts, counterfactual(contexts, generator), contexts.answers, group, seed)


def generate(config: Recall, count: int, seed: int) -> list[dict]:
    """`count` different prompts with their counterfactuals, over the keys that `config` names.

    Raises:
        ValueError: see `draw` and `draw_distinct`.
    """
    generator = np.random.default_rng(seed)
    clean = draw_distinct(config, count, generator)
    return with_counterfactuals(clean, config.keys, seed, generator)


def _without_replacement(
    choices: range, name: str, pairs: int, count: int, generator: Generator
) -> Int[np.ndarray, "B P"]:
    if len(choices) < pairs:
        raise ValueError(
            f"{len(choices)} {name} to choose from, but a prompt has {pairs} pairs; add {name}"
        )
    return choices.start + generator.random((count, len(choices))).argsort(axis=1)[:, :pairs]


TASK = Task("recall", Recall, generate)
