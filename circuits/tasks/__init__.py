"""Task families: generators of prompt records, by name.

Each module has a config dataclass, `generate(config, count, seed)`, and a `TASK` that names the
two.  A config of texts has `fitted(tokenizer)`, which keeps the words that the tokenizer serves, or
says why there are too few.  None of them imports torch.
"""

from __future__ import annotations

from circuits.tasks import (
    brackets,
    docstring,
    file,
    greater_than,
    induction,
    ioi,
    modular_addition,
    pronoun,
    recall,
    sva,
)
from circuits.tasks.task import Task

_MODULES = (
    *(file, induction, pronoun, recall, ioi, greater_than, sva, docstring),
    *(modular_addition, brackets),
)
TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in _MODULES}
