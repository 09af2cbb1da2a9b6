"""Task families: generators of prompt records, by name.

Each module has a config dataclass and `generate(config, count, seed)`, which returns `count`
different records of the prompt schema (`circuits.prompts`), the same ones for the same seed.  None
of them imports torch.
"""

from __future__ import annotations

from collections.abc import Callable

from circuits.tasks import file, induction, pronoun, recall

# name -> (config dataclass, generate function)
TASKS: dict[str, tuple[type, Callable[..., list[dict]]]] = {
    "file": (file.File, file.generate),
    "induction": (induction.Induction, induction.generate),
    "pronoun": (pronoun.Pronoun, pronoun.generate),
    "recall": (recall.Recall, recall.generate),
}
