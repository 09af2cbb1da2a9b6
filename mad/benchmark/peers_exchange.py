"""A peer in its own environment: the folder it reads, its process, and its names of edges.

The two sides share no package.  This side writes weights, prompts and settings as safetensors and
JSON; `mad/benchmark/peers_side.py`, which another Python runs, answers one request a line.  A side
that waits sleeps, so that work on both can take turns.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from circuits.files import write_json
from circuits.graph import Graph
from circuits.names import parse_node, split_reader
from circuits.prompts import Prompts

SIDE = Path(__file__).with_name("peers_side.py")
NEEDS = Path(__file__).with_name("peers.txt")


def write_exchange(
    folder: Path, module: Any, prompts: Prompts, graph: Graph, *, threads: int
) -> None:
    """Writes what the peer's side reads.

    Args:
        module: a HuggingFace GPT-2 model; its weights are written as safetensors.
        prompts: of one length, scored at their last token, with corrupt prompts and answers.
        graph: its edges are listed in the order of a sweep.
        threads: of the peer's side.
    """
    module.save_pretrained(folder / "model", safe_serialization=True)
    write_json(folder / "prompts.json", {"prompts": _records(prompts)})
    settings = {"threads": threads, "prompts": len(prompts), "edges": peer_edges(graph)}
    write_json(folder / "settings.json", settings)


def _records(prompts: Prompts) -> list[dict[str, list[int]]]:
    """Prompts in auto-circuit's form; ValueError for what it cannot hold."""
    size = prompts.clean.shape[1]
    whole = bool((prompts.lengths == size).all())
    if not whole or prompts.positions.tolist() != [[size - 1]] * len(prompts):
        raise ValueError("the peer takes prompts of one length that are scored at the last token")
    fields = {
        "clean": prompts.clean,
        "corrupt": prompts.corrupt,
        "answers": prompts.answers,
        "wrong_answers": prompts.wrong_answers,
    }
    rows = {}
    for name, values in fields.items():
        if values is None:
            raise ValueError(f"the prompts have no {name}, which the peer needs")
        rows[name] = values.flatten(1).tolist()
    return [dict(zip(rows, record)) for record in zip(*rows.values())]


def peer_edges(graph: Graph) -> list[str]:
    """The edges in the order of a sweep, by auto-circuit's names.

    >>> peer_edges(Graph(n_layers=1, n_heads=1))[:4]
    ['MLP 0->Resid End', 'A0.0->Resid End', 'Resid Start->Resid End', 'A0.0->MLP 0']
    """
    return [
        f"{_peer_node(graph.writers[writer])}->{_peer_node(graph.readers[reader])}"
        for reader, writer in graph.sweep_order()
    ]


def _peer_node(name: str) -> str:
    """auto-circuit's name of a writer or a reader."""
    bare, port = split_reader(name)
    node = parse_node(bare)
    head = f"A{node.layer}.{node.head}" + (f".{port.upper()}" if port else "")
    names = {"input": "Resid Start", "mlp": f"MLP {node.layer}", "logits": "Resid End"}
    return names.get(node.kind, head)


class PeerProcess:
    """The peer's side as a process that ends with the `with` block.

    >>> with PeerProcess("no/such/python", Path(".")) as peer:
    ...     peer.ask("forward")
    Traceback (most recent call last):
    ValueError: peers=no/such/python is no Python that can be run; `make bench-peers` makes one \
with the peers, or give that of an environment with what mad/benchmark/peers.txt lists

    Raises:
        ValueError: there is no such Python, or the peers are not in its environment.
    """

    versions: dict[str, str]

    def __init__(self, python: str, folder: Path, *, threads: int = 1, side: Path = SIDE) -> None:
        self.log = folder / "peer.log"
        count = str(threads)
        environment = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
        remedy = (
            "`make bench-peers` makes one with the peers, or give that of an environment with what "
            f"mad/benchmark/{NEEDS.name} lists"
        )
        try:
            with self.log.open("w") as log:
                self.process = subprocess.Popen(
                    [python, "-I", str(side), str(folder)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment,
                )
        except OSError as error:
            raise ValueError(f"peers={python} is no Python that can be run; {remedy}") from error
        try:
            self.versions = self._answer()["versions"]
        except OSError as error:
            self.close()
            raise ValueError(f"peers={python} cannot run the peers ({error}); {remedy}") from error

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def ask(self, work: str, **arguments: Any) -> dict[str, Any]:
        """What the peer answers; OSError, with the last line it printed, where it has ended."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"work": work, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise OSError(self._last_words()) from None
        return self._answer()

    def close(self) -> None:
        """Ends the process, which stops at the end of its requests."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.close()
        except BrokenPipeError:  # it ended first
            pass
        self.process.stdout.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise OSError(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        self.process.wait()
        lines: Sequence[str] = self.log.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
        return f"the peer's process ended with {self.process.returncode}: {last.strip()}"
