"""Detectors on tasks with anomalies, and what the engine's work costs.

plan         what is measured: tasks, detectors, how many prompts of what
subject      one model with its trusted prompts and the groups that a detector is to tell apart
run          everything on everything, resumable; workers: the processes that it takes
results      the scores that a run leaves
auroc        how well scores separate anomalies from normals; flags: whom they flag
worst_case   the smallest AUROC over all places, of detectors, baselines and random circuits
summary      all of it; report, tables and pictures show it
roc          ROC curves and scores of a few detectors
speed        time and memory
peers        discovery beside another library; peers_work: what is compared; peers_exchange: the
             process that the peer is in; peers_side: what runs there
"""
