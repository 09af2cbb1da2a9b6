"""What a circuit is worth: figures with their errors, beside random circuits of its size.

bootstrap       standard errors over prompts
areas           faithfulness over MIB's ten sizes: CPR, CMD
figures         what every extraction measures
verdicts        what the figures say against the circuit, or against each other
completeness    knock-outs of nodes, and of what the circuit leaves out
minimality      each edge by itself
known           ROC and AUC against a known circuit
stability       circuits found on redrawn prompts
evaluate        all of it
"""
