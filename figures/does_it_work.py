"""The pictures of docs/does-it-work.md, in half an hour.

Run: python figures/does_it_work.py [FOLDER OF STORIES260K]
"""

import shutil
import sys
from pathlib import Path

from mad.commands.main import main

OUT = Path("runs/detectors")  # kept: what is there is not computed again
PICTURES = ("worst", "false_alarms", "agree")

natural = [f"benchmark.natural={sys.argv[1]}"] if len(sys.argv) > 1 else []
if code := main(["bench", "suite=detectors", f"out={OUT}", *natural]):
    raise SystemExit(code)
for name in PICTURES:
    shutil.copyfile(OUT / f"{name}.png", Path(__file__).parent / f"detectors_{name}.png")
