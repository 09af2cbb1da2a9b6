"""Budgets of memory for so many prompts at a time, since tiny models fit into any that a user would
write.
"""

from __future__ import annotations

from circuits.ablation import Ablation
from circuits.engine import Engine
from circuits.engine.memory import footprint
from circuits.prompts import Prompts


def memory_for(n_prompts: int, engine: Engine, prompts: Prompts, ablation: Ablation) -> str:
    """The least memory with which `prepare` makes batches of `n_prompts`; it keeps some of them,
    hardly ever all.
    """
    size = footprint(engine, prompts)
    shared = size.shared(ablation.per_prompt) + size.mask
    return str(2 * (n_prompts * size.objective(ablation.per_prompt) + shared))
