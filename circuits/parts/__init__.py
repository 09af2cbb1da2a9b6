"""Units: nodes, MLP neurons, and features of dictionaries, as parts that a mask may keep.

units        `Site` and `Units`: names and indices
dictionary   `read_dictionary`: sparse autoencoders and transcoders as SAELens writes them
readings     what a unit's numbers are in a run
divided      `Divided`: a model with its units, run under masks of them
division     `UnitsConfig` and `divide`: which units a model is divided into
objective    `prepare_units`: what a circuit of units is to explain
circuit      `UnitCircuit`: kept units with their scores, on disk
over         what an extraction of edges or of units is made with
"""

from circuits.parts.circuit import UnitCircuit, load_circuit
from circuits.parts.dictionary import Dictionary, read_dictionary
from circuits.parts.divided import Divided
from circuits.parts.division import UnitsConfig, divide
from circuits.parts.units import Site, Units

__all__ = [
    "Dictionary",
    "Divided",
    "Site",
    "UnitCircuit",
    "Units",
    "UnitsConfig",
    "divide",
    "load_circuit",
    "read_dictionary",
]
