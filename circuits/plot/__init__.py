"""Pictures of circuits and of their figures; what draws them is imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from circuits.lazy import lazy

if TYPE_CHECKING:
    from circuits.plot.circuit import circuit_svg, draw_circuit
    from circuits.plot.curve import FaithfulnessCurve, RandomBand, draw_faithfulness_curve
    from circuits.plot.positions import draw_positions
    from circuits.plot.training import TrainingPoint, draw_training

_WHERE = {
    "FaithfulnessCurve": "circuits.plot.curve",
    "RandomBand": "circuits.plot.curve",
    "TrainingPoint": "circuits.plot.training",
    "circuit_svg": "circuits.plot.circuit",
    "draw_circuit": "circuits.plot.circuit",
    "draw_faithfulness_curve": "circuits.plot.curve",
    "draw_positions": "circuits.plot.positions",
    "draw_training": "circuits.plot.training",
}

__all__ = [*_WHERE]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = lazy(__name__, _WHERE)
