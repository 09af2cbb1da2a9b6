"""Which models the user has named to madcap on this machine.

A run folder says which model its circuit was found on, and a folder may be a stranger's.  What it
says is followed only where the user's own word stands behind it: the model comes with madcap
(`pkg://`), or the user has given the same path or hub name before, to an extraction or as `model=`.
These are kept, one JSON string a line, in `$XDG_STATE_HOME/madcap/known_models`
(`~/.local/state/madcap/known_models`).
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from circuits.model.load import local_path

log = logging.getLogger(__name__)


def known_models() -> Path:
    """The file that remembers them."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "madcap" / "known_models"


def recorded(path: str) -> str:
    """A model's path as a run folder records it: absolute where it is local, else as it is."""
    here = not path.startswith("pkg://") and local_path(path).exists()
    return str(local_path(path).resolve()) if here else path


def remember(*paths: str | None) -> None:
    """Notes that the user has named these models; warns where that cannot be written down."""
    new = [recorded(path) for path in paths if path is not None and not is_known(recorded(path))]
    if not new:
        return
    file = known_models()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as sink:
            sink.write("".join(json.dumps(path) + "\n" for path in new))
    except OSError as error:
        log.warning(
            "%s cannot be written (%s), so that `madcap score` and `fit` will ask for model=%s",
            file,
            error.strerror,
            new[0],
        )


def is_known(path: str) -> bool:
    """Whether a recorded path comes with madcap or was named by the user before."""
    return path.startswith("pkg://") or json.dumps(path) in _lines()


def _lines() -> set[str]:
    try:
        return set(known_models().read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return set()


def refuse_unknown(source: Path, *paths: str | None) -> None:
    """Raises ValueError for a model that a folder names and the user has not named before."""
    for path in paths:
        if path is not None and not is_known(path):
            raise ValueError(
                f"{source} names the model {path!r}, which has not been given to madcap on this "
                "machine, so that nothing is read or fetched; if you trust it, say where the model "
                "is: model=PATH or model=HUB_NAME"
            )
