"""Does departure from the circuit reveal another mechanism?  A measured answer: candidate scores on
tasks.

plan         what is measured
subject      one model with its trusted prompts and the groups that a score is to tell apart
lens         a circuit to look at inputs through, found on trusted prompts alone
candidates   scores that need a circuit
baselines    scores that need none
cells        AUROC and false alarms by task, regime, stratum and seed, with intervals
run          everything on everything, resumable
report       tables and pictures
"""
