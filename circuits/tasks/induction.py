"""Induction: what followed the last token when it stood there before comes next.

Two forms, over token ids drawn at random from the vocabulary (Elhage et al. 2021, "A mathematical
framework for transformer circuits"; Olsson et al. 2022, arXiv 2209.11895):

    one_repeat   A B C D E F B -> C   one token occurs twice, all others once
    block        A B C D A B C -> D   a block of different tokens, then again up to `length`

Corrupt, one_repeat: the earlier occurrence of the last token becomes a token that is nowhere else
in the prompt, so nothing repeats and nothing follows from it.  It is never at position 0, where no
token stands before it: the trained model `l_2_2` of Gross's
guarantees-based-mechanistic-interpretability (2 layers, 1 head, vocabulary 26, context 8; see Gross
et al. 2024, arXiv 2406.11779) is right in 45 % of such prompts and in all others.

Corrupt, block: every token of the first block that the prompt repeats becomes another one that is
nowhere in the clean prompt, again so that nothing repeats.

Models that were trained on it have ids of their own, 26 by default.  A language model's prompts are
of all tokens of its tokenizer but the special ones, which it has never read inside a text: the
first 17 ids of SmolLM2 are such.

Wrong answers are the other tokens of the clean prompt: the logit difference says how far the right
one stands out from its context.  With `l_2_2` it is 99.7 on clean and -0.2 on corrupt prompts of
the first form.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from math import perm
from typing import Any

from circuits.prompts.tokens import begins_with_bos
from circuits.tasks.task import Task

FORMS = ("one_repeat", "block")
WITHOUT_TOKENIZER = 26  # token ids


@dataclass
class Induction:
    """Prompts that repeat random tokens."""

    name: str = "induction"
    form: str = "one_repeat"  # one token occurs twice; or "block": a block of tokens is repeated
    # token ids are drawn from 0 .. vocabulary - 1; null: 26, or all of the model's tokenizer
    vocabulary: int | None = None
    # ids that are in no prompt; null: those of the tokenizer's special tokens
    without: list[int] | None = None
    length: int = 8  # tokens in a prompt; a block has (length + 1) // 2 of them
    # id before each prompt, not counted in its length; null: BOS, where the tokenizer puts it there
    bos: int | None = None

    def fitted(self, tokenizer: Any) -> Induction:
        """With the ids that a model with this tokenizer reads in a text."""
        if tokenizer is None:
            return self
        vocabulary = len(tokenizer) if self.vocabulary is None else self.vocabulary
        without = tokenizer.all_special_ids if self.without is None else self.without
        bos = self.bos
        if bos is None and begins_with_bos(tokenizer):
            bos = tokenizer.bos_token_id
        return replace(self, vocabulary=vocabulary, without=sorted(without), bos=bos)


def generate(config: Induction, count: int, seed: int) -> list[dict]:
    """`count` different prompts with their counterfactuals.

    Raises:
        ValueError: an unknown form, a prompt too short, a vocabulary too small, or `count` outside
            what they give.
    """
    vocabulary = WITHOUT_TOKENIZER if config.vocabulary is None else config.vocabulary
    left_out = set(config.without or ())
    ids = [token for token in range(vocabulary) if token not in left_out]
    distinct, needed, available = _sizes(config, len(ids))
    if len(ids) < needed:
        left = f" leaves {len(ids)} without {sorted(left_out)}" if len(ids) < vocabulary else ""
        raise ValueError(
            f"vocabulary={vocabulary}{left}, but form={config.form} with length={config.length} "
            f"needs {needed} different tokens; raise vocabulary or lower length"
        )
    if not 1 <= count <= available:
        raise ValueError(
            f"count={count}, but form={config.form} with vocabulary={vocabulary} and "
            f"length={config.length} gives 1 to {available} prompts; change count or raise "
            "vocabulary"
        )
    generator, first = random.Random(seed), [] if config.bos is None else [config.bos]
    draw = _one_repeat if config.form == "one_repeat" else _block
    records: dict[tuple[int, ...], dict] = {}
    while len(records) < count:
        tokens = generator.sample(ids, needed)
        own, fresh = tokens[:distinct], tokens[distinct:]  # fresh: only the corrupt prompt has them
        clean, corrupt, answer = draw(own, fresh, config.length, generator)
        if tuple(clean) not in records:
            records[tuple(clean)] = {
                "clean": [*first, *clean],
                "corrupt": [*first, *corrupt],
                "answers": [answer],
                "wrong_answers": [token for token in own if token not in (answer, clean[-1])],
                "label": 0,
                "id": f"induction-{config.form}-{seed}-{len(records)}",
            }
    return list(records.values())


def _sizes(config: Induction, n_ids: int) -> tuple[int, int, int]:
    """Different tokens in a clean prompt, in it and its corrupt one, and how many prompts exist."""
    if config.form == "one_repeat":
        shortest, distinct, places, fresh = 4, config.length - 1, config.length - 3, 1
    elif config.form == "block":
        shortest, distinct, places = 5, (config.length + 1) // 2, 1
        fresh = config.length - distinct
    else:
        raise ValueError(f"form={config.form!r} is none of {', '.join(FORMS)}; choose one of them")
    if config.length < shortest:
        raise ValueError(
            f"length={config.length}, but form={config.form} needs at least {shortest}; raise "
            "length"
        )
    return distinct, distinct + fresh, perm(n_ids, distinct) * places


def _one_repeat(
    tokens: list[int], fresh: list[int], length: int, generator: random.Random
) -> tuple[list[int], list[int], int]:
    """Clean, corrupt and answer; the earlier occurrence is at position 1 .. length - 3."""
    earlier = generator.randint(1, length - 3)
    clean = [*tokens, tokens[earlier]]
    return clean, [*tokens[:earlier], *fresh, *clean[earlier + 1 :]], tokens[earlier + 1]


def _block(
    tokens: list[int], fresh: list[int], length: int, generator: random.Random
) -> tuple[list[int], list[int], int]:
    """Clean, corrupt and answer; after a whole second block the answer is the first token again."""
    repeated = length - len(tokens)
    clean = [*tokens, *tokens[:repeated]]
    return clean, [*fresh, *clean[repeated:]], tokens[repeated % len(tokens)]


TASK = Task("induction", Induction, generate)
