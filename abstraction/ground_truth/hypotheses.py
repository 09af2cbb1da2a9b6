"""What a program says of the model that runs it, as a hypothesis: each variable at each position
that the answer depends on is a node, which matters only through that variable.

Shapes: batch B, positions S.
"""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Int
from torch import Tensor

from abstraction.ground_truth.placement import Place, nodes_of, reads
from abstraction.ground_truth.program import Program
from abstraction.hypothesis import Claim, Hypothesis
from circuits.names import LOGITS

Key = tuple[tuple[str, ...], int | None]  # nodes of the model, and a position


def hypothesis_of(
    program: Program,
    places: Mapping[str, Place],
    *,
    split_input: bool = False,
    position_with_token: bool = False,
) -> Hypothesis:
    """Returns the hypothesis that a model runs a program with each step in its place.

    Positions are those of inputs of full length.  The variable `position` is the same on all of
    them, so that nothing is said of it, unless `position_with_token`: what reads it is given the
    token as well, of which a trained model may take notice.
    """
    features: dict[Key, dict[str, None]] = {((LOGITS,), None): {}}
    found: dict[Key, dict[Key, set[str]]] = {((LOGITS,), None): {}}
    for read in reversed(reads(program)):  # readers first
        variable = read.variable
        if variable == "position":
            if not position_with_token:
                continue
            variable = "token"
        nodes = places[read.step].nodes if read.step in places else (LOGITS,)
        for reader in [key for key in found if key[0] == nodes]:
            here = reader[1]
            if here is not None and f"{read.step}@{here}" not in features[reader]:
                continue  # another step that shares the node
            for position in read.positions:
                if here is not None and not _bears(read.port, position, here, program.causal):
                    continue
                child = (nodes_of(variable, places, split_input), position)
                features.setdefault(child, {})[f"{variable}@{position}"] = None
                port = read.port if read.port in ("q", "k", "v") else "qkv"
                found.setdefault(child, {})
                found[reader].setdefault(child, set()).update(port)
    return Hypothesis(
        program.name, {_name(key, features): _claim(key, found, features) for key in found}
    )


def values_of(program: Program, tokens: Int[Tensor, "B S"]) -> dict[str, Int[Tensor, " B"]]:
    """The value of each variable at each position, by the names that the hypothesis has."""
    values = program.causal_model.run({"token": tokens})
    return {
        f"{name}@{position}": values[name][:, position]
        for name in program.sizes
        for position in range(tokens.shape[1])
    }


def _bears(port: str, position: int, here: int, causal: bool) -> bool:
    """Whether what is read at one position bears on what is written at another."""
    return position <= here or not causal if port in ("k", "v") else position == here


def _name(key: Key, features: Mapping[Key, Mapping[str, None]]) -> str:
    return " and ".join(features[key]) or "answer"


def _claim(
    key: Key,
    found: Mapping[Key, Mapping[Key, set[str]]],
    features: Mapping[Key, Mapping[str, None]],
) -> Claim:
    nodes, position = key
    if nodes[0].startswith("input"):
        return Claim(nodes, tuple(features[key]), (position or 0,))
    reads = {
        _name(child, features): "".join(port for port in "qkv" if port in ports)
        for child, ports in found[key].items()
    }
    if position is None:
        return Claim(nodes, reads=reads)
    return Claim(nodes, tuple(features[key]), (position,), reads)
