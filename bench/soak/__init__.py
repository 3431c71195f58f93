"""Soak test of a job with hostile clients, compared with the same job without them: ``python -m bench.soak``."""
