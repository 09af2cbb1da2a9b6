"""Where the values that writers have on a prompt go in the prompts that they are put into.

Shapes: prompts B, hosts K, positions T of hosts.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from circuits.engine import Engine
from circuits.prompts import InputError, Prompts
from circuits.prompts.errors import quote


def aligned(
    lengths: Int[Tensor, "B"], shift: Int[Tensor, "B K"], n_positions: int
) -> Int[Tensor, "B K T"]:
    """Returns the position of a prompt that stands where each position of a host does.

    Position p of a host takes position p + shift of a prompt of m tokens, within 1 to m - 1;
    position 0 takes position 0.
    """
    index = torch.arange(n_positions, device=shift.device) + shift[..., None]
    index = index.clamp(min=1).minimum((lengths - 1)[:, None, None])
    index[..., 0] = 0
    return index


def ends(prompts: Prompts) -> Int[Tensor, "B"]:
    """Returns how many tokens there are up to the last scored position of each prompt."""
    return prompts.positions.amax(1) + 1


def check_positions(engine: Engine, hosts: Prompts, prompts: Prompts) -> None:
    """Raises InputError for scored positions of prompts that hosts could not honour."""
    for some in (prompts, hosts):
        some.check_length(engine.graph.n_positions)
    several = ((prompts.positions >= 0).sum(1) > 1).any()
    if several and ((hosts.positions >= 0).sum(1) == 1).all():
        raise InputError(
            "positions names several tokens, but this detector's trusted prompts are scored at one "
            "each; name one, or use another detector"
        )
    if engine.graph.n_positions is None:
        return
    own, theirs = (set((ends(some) - 1).tolist()) for some in (prompts, hosts))
    if elsewhere := own - theirs:
        raise InputError(
            f"positions ends at {min(elsewhere)}, but edges are told apart by position, and this "
            f"detector's trusted prompts end at {quote(sorted(theirs))}; score there, or use "
            "another detector"
        )
