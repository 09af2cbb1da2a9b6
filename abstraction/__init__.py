"""Does the circuit explain the behaviour: causal claims and their tests.  Nothing is here yet."""
