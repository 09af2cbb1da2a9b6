"""Task families: generators of prompt records, by name.

Each module has a config dataclass, `generate(config, count, seed)`, and a `TASK` that names the
two.  None of them imports torch.
"""

from __future__ import annotations

from circuits.tasks import file, induction, pronoun, recall
from circuits.tasks.task import Task

_TASKS = (file.TASK, induction.TASK, pronoun.TASK, recall.TASK)
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}
