"""Processes that work side by side and end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Returns a pool of processes with one thread each: the models are small.

    They end when their parent does, even if it is killed and cannot tell them to.
    """
    return ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker
    )


def _start_worker() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch  # takes a while: the thread above is watching already

    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """Waits until the parent is gone, and takes this process with it, whatever it is doing."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is a process that another one has started"
    parent.join()
    os._exit(1)
