"""How long work takes, in seconds of a clock that waits for the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def seconds(device: torch.device, work: Callable[[], Any], repeats: int = 3) -> float:
    """Returns the median time that some work takes."""

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    times = []
    for _ in range(repeats):
        started = now()
        work()
        times.append(now() - started)
    return sorted(times)[len(times) // 2]
