"""Transformers whose circuit is known, and what discovery makes of them."""
