"""Distributions over masks: gates in [0, 1] that are exactly 0 or 1 with some probability.

One parameter a gate, theta; u is uniform on (0, 1).

hard concrete   z = clamp(s (b - a) + a, 0, 1),  s = sigmoid((log u - log(1 - u) + theta) / T),
                a = -0.1, b = 1.1, T = 2/3
                (Louizos et al. 2018, arXiv 1712.01312; theta is their log alpha)
window          p = sigmoid(theta), w = p (1 - p),  z = 1 - clamp((u - p) / w + 1/2, 0, 1), with w
                held fixed in the gradient;  E[z] = p
                (Li and Janson 2024, arXiv 2409.09951: uniform gradient sampling)

In both a gate is above 1/2 with probability sigmoid(theta): so often a circuit that is drawn has it
open, and so it counts in a mask's size.  (Louizos et al. count P(z > 0) = sigmoid(theta - T
log(-a / b)), which also counts what is hardly open.)

Shapes: `*E` the axes of a mask, [R, W, *S] of edges and [U, *S] of units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.gates import gate_shapes, part_shares
from circuits.space import Space

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1  # of the hard concrete
LEAST = 1e-6  # the narrowest window, and how near to 0 and 1 uniform numbers may be


def _hard_concrete(theta: Tensor, uniform: Tensor) -> Tensor:
    soft = ((uniform.logit(LEAST) + theta) / TEMPERATURE).sigmoid()
    return (soft * (HIGH - LOW) + LOW).clamp(0, 1)


def _window(theta: Tensor, uniform: Tensor) -> Tensor:
    p = theta.sigmoid()
    width = (p * (1 - p)).detach().clamp(min=LEAST)
    return 1 - ((uniform - p) / width + 0.5).clamp(0, 1)


# (theta, uniform numbers) -> gates, with a gradient in theta
KINDS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hard_concrete": _hard_concrete,
    "window": _window,
}


@dataclass(frozen=True, eq=False)
class MaskDistribution:
    """A trained mask: the parameters of its gates.

    >>> from circuits.graph import Graph
    >>> graph = Graph(n_layers=1, n_heads=1)
    >>> shapes = gate_shapes(graph, "edges")
    >>> gates = {kind: torch.full(shape, 9.0) for kind, shape in shapes.items()}
    >>> trained = MaskDistribution(graph, "hard_concrete", "edges", gates)
    >>> round(trained.size()), int(trained.sample(1, seed=0).sum())
    (8, 8)

    Raises:
        ValueError: no such distribution or mask, or gates of other shapes, or not finite.
    """

    space: Space
    kind: str  # of `KINDS`
    over: str  # of `circuits.gates.OVER`
    gates: Mapping[str, Tensor]  # theta of each gate, by its kind

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a distribution {self.kind!r}, but there are {', '.join(KINDS)}")
        shapes = gate_shapes(self.space, self.over)
        given = {name: tuple(theta.shape) for name, theta in self.gates.items()}
        if given != shapes:
            raise ValueError(
                f"a mask over {self.over} has gates of {shapes}, but these are {given}"
            )
        if not all(theta.is_floating_point() for theta in self.gates.values()):
            raise ValueError("the parameters of a trained mask must be float")
        if not all(theta.isfinite().all() for theta in self.gates.values()):
            raise ValueError("the parameters of a trained mask are not finite")

    def probabilities(self) -> Float[Tensor, "*E"]:
        """How often each edge (or unit) is in a circuit that is drawn, dead ends included."""
        open_gates = {name: theta.sigmoid() for name, theta in self.gates.items()}
        return part_shares(open_gates, self.space)

    def size(self) -> float:
        """How many edges (or units) a circuit that is drawn has on average, dead ends included."""
        return self.probabilities().double().sum().item()

    def sample(self, count: int, seed: int) -> Bool[Tensor, "n *E"]:
        """Draws circuits, without dead ends; ValueError for fewer than 1."""
        if count < 1:
            raise ValueError(f"n={count}, but at least 1 circuit can be drawn")
        generator = torch.Generator().manual_seed(seed)
        drawn = []
        for _ in range(count):
            gates = {
                name: torch.rand(theta.shape, generator=generator) < theta.cpu().sigmoid()
                for name, theta in self.gates.items()
            }
            kept = part_shares(gates, self.space).bool()
            drawn.append(self.space.without_dead_ends(kept))
        return torch.stack(drawn)
