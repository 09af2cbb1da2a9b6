"""Pictures of circuits and of their figures."""
