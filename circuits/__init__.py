"""Which edges of a transformer compute a behaviour.

The names below are imported on first use, so that the command line answers before torch is loaded.
"""

from __future__ import annotations

from circuits.lazy import lazy

_WHERE = {
    "ABLATIONS": "circuits.ablation",
    "ACDC": "circuits.discovery",
    "AblationConfig": "circuits.ablation",
    "Circuit": "circuits.circuit",
    "EAP": "circuits.discovery",
    "EAPIG": "circuits.discovery",
    "Engine": "circuits.engine",
    "Graph": "circuits.graph",
    "OutputHead": "circuits.model.output_head",
    "METRICS": "circuits.metrics",
    "ModelConfig": "circuits.model.load",
    "Prompts": "circuits.prompts",
    "Selection": "circuits.selection",
    "draw_circuit": "circuits.plot.circuit",
    "extract": "circuits.extraction",
    "from_bridge": "circuits.model.load",
    "from_module": "circuits.model.load",
    "load_model": "circuits.model.load",
    "prompts_from_records": "circuits.prompts",
    "read_records": "circuits.prompts",
    "tasks": "circuits.tasks",
}

__all__ = list(_WHERE)  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__ = lazy(__name__, _WHERE)
