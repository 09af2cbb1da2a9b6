"""Does the circuit explain the behaviour: causal models, and transformers whose circuit is known.

    compiled = abstraction.compile(abstraction.PROGRAMS["recall"]())  weights that run a program
    trained = abstraction.load_trained("recall")                      trained to have its circuit
    planted = abstraction.plant("recall")                             with a second mechanism in it
    abstraction.put_to_the_test(...)                                  what discovery makes of them
    abstraction.scrub(engine, prompts, Hypothesis.load("a.yaml"))     what is left when all is
                                                                      exchanged that may be
    abstraction.scrub_circuit(engine, prompts, circuit)               the same of a circuit

Names are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from circuits.lazy import lazy

if TYPE_CHECKING:
    from abstraction.causal_model import CausalModel as CausalModel
    from abstraction.circuit_scrubbing import scrub_circuit as scrub_circuit
    from abstraction.ground_truth.compiled import Compiled as Compiled
    from abstraction.ground_truth.compiled import compile as compile
    from abstraction.ground_truth.effects import true_edges as true_edges
    from abstraction.ground_truth.options import Options as Options
    from abstraction.ground_truth.planted import Planted as Planted
    from abstraction.ground_truth.planted import plant as plant
    from abstraction.ground_truth.program import Program as Program
    from abstraction.ground_truth.programs import PROGRAMS as PROGRAMS
    from abstraction.ground_truth.scoreboard import put_to_the_test as put_to_the_test
    from abstraction.ground_truth.trained import Trained as Trained
    from abstraction.ground_truth.trained import load_trained as load_trained
    from abstraction.hypothesis import Hypothesis as Hypothesis
    from abstraction.recovery import Recovery as Recovery
    from abstraction.scrubbing import scrub as scrub

_WHERE = {
    "CausalModel": "abstraction.causal_model",
    "Compiled": "abstraction.ground_truth.compiled",
    "Hypothesis": "abstraction.hypothesis",
    "Options": "abstraction.ground_truth.options",
    "PROGRAMS": "abstraction.ground_truth.programs",
    "Planted": "abstraction.ground_truth.planted",
    "Program": "abstraction.ground_truth.program",
    "Recovery": "abstraction.recovery",
    "Trained": "abstraction.ground_truth.trained",
    "compile": "abstraction.ground_truth.compiled",
    "load_trained": "abstraction.ground_truth.trained",
    "plant": "abstraction.ground_truth.planted",
    "put_to_the_test": "abstraction.ground_truth.scoreboard",
    "scrub": "abstraction.scrubbing",
    "scrub_circuit": "abstraction.circuit_scrubbing",
    "true_edges": "abstraction.ground_truth.effects",
}

__getattr__, __dir__ = lazy(__name__, _WHERE)
