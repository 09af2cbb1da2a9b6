"""The model as writers and readers: clean runs, runs under edge masks, gradients at the readers.

engine       `Engine`, the only way into a model
masked       one run under masks
live_nodes   which work a mask leaves
incremental  runs of circuits that lack a few edges of one that was run
memory       how much of it fits in a budget
"""

from circuits.engine.engine import Clean, Engine

__all__ = ["Clean", "Engine"]
