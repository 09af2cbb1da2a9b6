"""Set-up of the suite: shapes are checked, no network, a thread a worker, repeatable examples."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

# Before anything imports a HuggingFace library, which reads these once.
for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[variable] = "1"
os.environ["WANDB_MODE"] = "disabled"
STATE = tempfile.TemporaryDirectory(prefix="madcap-state-")  # what madcap remembers between runs
os.environ["XDG_STATE_HOME"] = STATE.name
os.environ["MPLBACKEND"] = "agg"
# Idle OpenMP threads sleep instead of spinning: five times faster where the cores are shared (read
# once, by torch).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2  # workers share the cores
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

from jaxtyping import install_import_hook

# Before anything imports the packages: from here on every shape and type that they declare is
# checked. The "tower" of PEP 484 lets an int stand where a float is declared, as everywhere in
# Python.
install_import_hook(
    ["circuits", "abstraction", "mad"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(THREADS)
settings.register_profile("madcap", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("madcap")


# A family like another one that stays: the same proof on it runs in `make test-slow`.
LIKE_ANOTHER = {
    "mistral",
    "qwen2",
    "qwen3",
    "codegen",
    "gptj",
    "smollm3",
    "phi3",
    "gemma",
    "gptneo",
}
REPEATED = (
    "test_every_family.py",
    "test_departure.py",
    "test_observe.py",
    "test_memory.py",
    "test_altered.py",
    "test_stored.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(item, "callspec", None)
        names = set(re.split(r"[^a-z0-9]+", parameters.id)) if parameters else set()
        if item.path.name in REPEATED and names & LIKE_ANOTHER:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def cases() -> Path:
    """Models and circuits with known answers, in shared/cases beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "cases"
    if not folder.is_dir():
        pytest.skip(
            "the reference cases (../shared/cases) are not here; they are not part of the "
            "repository"
        )
    return folder
