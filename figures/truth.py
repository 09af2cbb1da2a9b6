"""The picture of docs/ground-truth.md, methods where the truth is known.  Run: this file."""

import shutil
import tempfile
from pathlib import Path

from mad.commands.main import main

with tempfile.TemporaryDirectory() as folder:
    code = main(["truth", f"out={folder}/truth"])
    if code:
        raise SystemExit(code)
    shutil.copyfile(Path(folder, "truth", "truth.png"), Path(__file__).parent / "truth.png")
