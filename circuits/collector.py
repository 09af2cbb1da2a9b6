"""The garbage collector, kept from going over what is there to stay.

Importing transformers and wrapping a model make millions of objects and hardly any garbage.  Python
looks through them again after every few hundred new ones: a sixth of what a small model takes to
load.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Without the cyclic garbage collector, unless the caller has switched it off for longer.

    >>> import gc
    >>> with collector_paused():
    ...     gc.isenabled()
    False
    >>> gc.isenabled()
    True
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
