"""Task families: generators of prompt records, by name.

Each module has a config dataclass, `generate(config, count, seed)`, and a `TASK` that names the
two.  None of them imports torch.
"""

from __future__ import annotations

from circuits.tasks import file, induction, pronoun, recall
from circuits.tasks.task import Task

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK for module in (file, induction, pronoun, recall)
}
