"""Workers end with their parent, even when it is killed in the middle of their work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

PARENT = """
import os, pathlib, sys, time
from mad.benchmark.workers import worker_pool

def work(folder, number):
    import torch
    assert torch.get_num_threads() == 1
    pathlib.Path(folder, f"{number}.part").write_text(str(os.getpid()))
    pathlib.Path(folder, f"{number}.part").rename(pathlib.Path(folder, f"{number}.pid"))
    time.sleep(600)

if __name__ == "__main__":
    with worker_pool(2) as pool:
        for number in range(2):
            pool.submit(work, sys.argv[1], number)
"""


def alive(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        os.kill(process, 0)
        with open(f"/proc/{process}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:  # gone in between, or no Linux
        return os.path.isdir("/proc/self") is False


def wait_for(condition, seconds: float = 120) -> None:
    """Waits long enough for a busy machine."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_killing_the_parent_ends_its_workers(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment)
    try:
        wait_for(lambda: len([*tmp_path.glob("*.pid")]) == 2)
        workers = [int(file.read_text()) for file in tmp_path.glob("*.pid")]
        assert all(map(alive, workers))
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_for(lambda: not any(map(alive, workers)))
