"""Which edges of a transformer compute a behaviour.

    model = circuits.load_model("gpt2")       a model, by hub name, folder or file
    prompts = model.prompts(records)          prompts, by its tokenizer
    engine = circuits.Engine(model)           the model as writers and readers
    found = circuits.extract(engine, ...)     a circuit with its figures
    circuits.evaluate(found.circuit, ...)     all figures of a circuit, with their errors
    circuits.draw_circuit(found.circuit, ...) its picture

Names are imported on first use, so that the command line answers before torch is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from circuits.lazy import lazy

if TYPE_CHECKING:
    from circuits import tasks as tasks
    from circuits.ablation import ABLATIONS as ABLATIONS
    from circuits.ablation import AblationConfig as AblationConfig
    from circuits.circuit import Circuit as Circuit
    from circuits.discovery import ACDC as ACDC
    from circuits.discovery import EAP as EAP
    from circuits.discovery import EAPIG as EAPIG
    from circuits.discovery import METHODS as METHODS
    from circuits.discovery import UGS as UGS
    from circuits.discovery import EdgePruning as EdgePruning
    from circuits.discovery import SubnetworkProbing as SubnetworkProbing
    from circuits.engine import Engine as Engine
    from circuits.evaluation.evaluate import Effort as Effort
    from circuits.evaluation.evaluate import evaluate as evaluate
    from circuits.extraction import Extraction as Extraction
    from circuits.extraction import extract as extract
    from circuits.graph import Graph as Graph
    from circuits.metrics import METRICS as METRICS
    from circuits.model.load import LoadedModel as LoadedModel
    from circuits.model.load import ModelConfig as ModelConfig
    from circuits.model.load import from_bridge as from_bridge
    from circuits.model.load import from_module as from_module
    from circuits.model.load import load_model as load_model
    from circuits.model.output_head import OutputHead as OutputHead
    from circuits.parts import UnitCircuit as UnitCircuit
    from circuits.parts import UnitsConfig as UnitsConfig
    from circuits.parts import load_circuit as load_circuit
    from circuits.plot import draw_circuit as draw_circuit
    from circuits.prompts import Prompts as Prompts
    from circuits.prompts import prompts_from_records as prompts_from_records
    from circuits.prompts import read_records as read_records
    from circuits.selection import Selection as Selection

_WHERE = {
    "ABLATIONS": "circuits.ablation",
    "ACDC": "circuits.discovery",
    "AblationConfig": "circuits.ablation",
    "Circuit": "circuits.circuit",
    "EAP": "circuits.discovery",
    "EAPIG": "circuits.discovery",
    "EdgePruning": "circuits.discovery",
    "Effort": "circuits.evaluation.evaluate",
    "Engine": "circuits.engine",
    "Extraction": "circuits.extraction",
    "Graph": "circuits.graph",
    "LoadedModel": "circuits.model.load",
    "METHODS": "circuits.discovery",
    "METRICS": "circuits.metrics",
    "ModelConfig": "circuits.model.load",
    "OutputHead": "circuits.model.output_head",
    "Prompts": "circuits.prompts",
    "Selection": "circuits.selection",
    "SubnetworkProbing": "circuits.discovery",
    "UGS": "circuits.discovery",
    "UnitCircuit": "circuits.parts",
    "UnitsConfig": "circuits.parts",
    "draw_circuit": "circuits.plot",
    "evaluate": "circuits.evaluation.evaluate",
    "extract": "circuits.extraction",
    "from_bridge": "circuits.model.load",
    "from_module": "circuits.model.load",
    "load_circuit": "circuits.parts",
    "load_model": "circuits.model.load",
    "prompts_from_records": "circuits.prompts",
    "read_records": "circuits.prompts",
    "tasks": "circuits.tasks",
}

__getattr__, __dir__ = lazy(__name__, _WHERE)
