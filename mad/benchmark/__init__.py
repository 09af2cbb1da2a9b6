"""Detectors on tasks with anomalies: how well they separate, whom they flag, and what the engine's
work costs.
"""
