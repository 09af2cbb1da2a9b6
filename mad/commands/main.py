"""The `madcap` command: finds the sub-command, hands it its configuration, tells errors in a line.

    madcap COMMAND [key=value ...]
    madcap compare FOLDER FOLDER ... [key=value ...]

A sub-command is a module with a docstring (its help), a dataclass named after it (`extract.py`:
`Extract`), and `run(config: Extract) -> int | None`. It is imported when it is run, and `--help`
reads its source instead, so that nothing slow stands between a question and its answer.

Exit codes: 0 done, 1 the work failed, 2 what was typed cannot be run, 3 done but for some inputs,
130 interrupted. MADCAP_TRACEBACK=1 shows tracebacks.
"""

from __future__ import annotations

import os
import sys
from typing import Any

PACKAGE = "mad.commands"
COMMANDS = {
    "demo": "the whole path on a small shipped model, in a minute",
    "extract": "find the circuit behind a behaviour, and fit a detector to it",
    "plot": "draw a circuit: SVG, PNG, PDF",
    "evaluate": "measure a circuit in every way, beside random ones",
    "compare": "put several runs side by side",
    "export": "write a circuit for EAP-IG, MIB, Graphviz, Gephi",
    "score": "score new inputs by how far the model departs from the circuit",
    "fit": "fit another detector to a circuit",
    "train": "train a small model on a task",
    "truth": "test discovery methods where the circuit is known",
    "bench": "time the engine, or measure which detectors work",
}

FLAGS = {
    "-h": "help",
    "--help": "help",
    "-m": "sweep",
    "--multirun": "sweep",
    "-v": "verbose",
    "--verbose": "verbose",
    "--cfg": "show",
    "--version": "version",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit code."""
    # Idle OpenMP threads that spin made small models 30 times slower on a shared machine. torch
    # reads this when loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = {FLAGS[argument] for argument in arguments if argument in FLAGS}
    unknown = [a for a in arguments if a.startswith("-") and a not in FLAGS]
    command, *overrides = [a for a in arguments if not a.startswith("-")] or [""]

    if unknown:
        return _fail(command, f"unknown option {unknown[0]!r}; settings are written key=value", 2)
    if "version" in flags:
        return _print_version()
    if command and command not in COMMANDS:
        return _fail("", _unknown_command(command), 2)
    try:
        if not command or "help" in flags:
            return _print_help(command, overrides)
        _set_up_logging(verbose="verbose" in flags)
        return _run(command, overrides, sweep="sweep" in flags, show="show" in flags)
    except KeyboardInterrupt:
        return _fail(command, "interrupted", 130)
    except BrokenPipeError:  # the reader of our output has gone, as in `madcap ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        code = _exit_code(error)
        if code is None or os.environ.get("MADCAP_TRACEBACK", "0") != "0":
            raise
        return _fail(command, _message(error), code)


def _run(command: str, overrides: list[str], *, sweep: bool, show: bool) -> int:
    import importlib

    from circuits.collector import collector_paused
    from mad.commands.config import run_command, show_config
    from mad.commands.help import class_name
    from mad.commands.overrides import gathered

    with collector_paused():
        module = importlib.import_module(f"{PACKAGE}.{command}")
    run = show_config if show else module.run
    overrides = gathered(command, overrides)
    return run_command(command, getattr(module, class_name(command)), run, overrides, sweep=sweep)


def _exit_code(error: Exception) -> int | None:
    """2 for what cannot be run, 1 for what the library refuses, None for a defect, told in full."""
    from mad.commands.overrides import UsageError

    if isinstance(error, UsageError):
        return 2
    return 1 if isinstance(error, ValueError | OSError) else None


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(str(part) for part in (error.strerror, error.filename) if part)
    return " ".join(str(error).split()) or type(error).__name__


def _fail(command: str, message: str, code: int) -> int:
    sys.stderr.write(f"{' '.join(['madcap', command]).strip()}: error: {message}\n")
    return code


def _unknown_command(command: str) -> str:
    from mad.commands.overrides import did_you_mean

    near = did_you_mean(command, list(COMMANDS))
    return f"unknown command {command!r}{near}; commands: {', '.join(COMMANDS)}"


def _print_help(command: str, overrides: list[str]) -> int:
    from mad.commands.help import command_help, overview

    text = (
        command_help(command, f"{PACKAGE}.{command}", overrides) if command else overview(COMMANDS)
    )
    sys.stdout.write(text)
    sys.stdout.flush()
    return 0


def _print_version() -> int:
    from importlib.metadata import version

    sys.stdout.write(f"madcap {version('madcap')}\n")
    return 0


def _set_up_logging(*, verbose: bool) -> None:
    """Warnings to stderr; with `verbose` also what madcap's own packages say they do."""
    import logging

    from rich.console import Console
    from rich.logging import RichHandler

    console = Console(stderr=True)
    handler: Any = RichHandler(console=console, show_time=False, show_path=False)
    if not console.is_terminal:  # one message, one line
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    # Its retries are silent; what comes of them is told.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    for package in ("circuits", "abstraction", "mad", "hydra"):
        logging.getLogger(package).setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger("mad.progress").setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
