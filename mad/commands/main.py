"""The `madcap` command: finds the sub-command, hands it its configuration, and tells errors in one
line.

    madcap COMMAND [key=value ...]

A sub-command is a module with a docstring (its help), a dataclass named after it (`extract.py`:
`Extract`), and `run(config: Extract) -> int | None`. It is imported when it is run, and `--help`
reads its source instead, so that nothing slow stands between a question and its answer.

Exit codes: 0 done, 1 the work failed, 2 the words cannot be run, 3 done but for some inputs, 130
interrupted. MADCAP_TRACEBACK=1 shows tracebacks.
"""

from __future__ import annotations

import os
import sys
from typing import Any

COMMANDS = {
    "demo": ("mad.commands.demo", "the whole path on a small shipped model, in a minute"),
    "extract": (
        "mad.commands.extract",
        "find the circuit behind a behaviour, and fit a detector to it",
    ),
    "plot": ("mad.commands.plot", "draw a circuit: SVG, PNG, PDF"),
    "score": (
        "mad.commands.score",
        "score new inputs by how far the model departs from the circuit",
    ),
    "fit": ("mad.commands.fit", "fit another detector to a circuit"),
    "train": ("mad.commands.train", "train a small model on a task"),
    "truth": ("mad.commands.truth", "test discovery methods where the circuit is known"),
    "bench": ("mad.commands.bench", "time the engine, or measure which detectors work"),
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
    flags = {FLAGS[word] for word in arguments if word in FLAGS}
    unknown = [word for word in arguments if word.startswith("-") and word not in FLAGS]
    words = [word for word in arguments if not word.startswith("-")]
    command = words.pop(0) if words else ""

    if unknown:
        return _fail(command, f"unknown option {unknown[0]!r}; settings are written key=value", 2)
    if "version" in flags:
        return _print_version()
    if command and command not in COMMANDS:
        return _fail("", _unknown_command(command), 2)
    try:
        if not command or "help" in flags:
            return _print_help(command, words)
        _set_up_logging(verbose="verbose" in flags)
        return _run(command, words, sweep="sweep" in flags, show="show" in flags)
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


def _run(command: str, words: list[str], *, sweep: bool, show: bool) -> int:
    import importlib

    from mad.commands.config import run_command, show_config
    from mad.commands.help import class_name

    module = importlib.import_module(COMMANDS[command][0])
    run = show_config if show else module.run
    return run_command(command, getattr(module, class_name(command)), run, words, sweep=sweep)


def _exit_code(error: Exception) -> int | None:
    """2 for words that cannot be run, 1 for what the library refuses, None for a defect, whose
    traceback is wanted.
    """
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

    return f"unknown command {command!r}{did_you_mean(command, list(COMMANDS))}; commands: {', '.join(COMMANDS)}"


def _print_help(command: str, words: list[str]) -> int:
    from mad.commands.help import command_help, overview

    sys.stdout.write(
        command_help(command, COMMANDS[command][0], words) if command else overview(COMMANDS)
    )
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
    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # its retries; what comes of them is told
    for package in ("circuits", "abstraction", "mad", "hydra"):
        logging.getLogger(package).setLevel(logging.INFO if verbose else logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
