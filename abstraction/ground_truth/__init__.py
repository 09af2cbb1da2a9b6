"""Transformers whose circuit is exactly known: compiled, trained and Tracr models, and what
discovery makes of them.
"""
