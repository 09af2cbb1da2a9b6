"""Does the circuit explain the behaviour: causal models, and transformers whose circuits are
exactly known.
"""
