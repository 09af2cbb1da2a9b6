"""The pictures of README: the demo's circuit and its scores.  Run: python figures/demo.py"""

import shutil
import tempfile
from pathlib import Path

from mad.commands.main import main

PICTURES = {
    "circuit.png": "demo_circuit.png",
    "scores.png": "demo_scores.png",
    "roc.png": "demo_roc.png",
}

with tempfile.TemporaryDirectory() as folder:
    code = main(["demo", f"out={folder}/demo"])
    if code:
        raise SystemExit(code)
    for made, kept in PICTURES.items():
        shutil.copyfile(Path(folder, "demo", made), Path(__file__).parent / kept)
