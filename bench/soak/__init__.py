"""A job among hostile clients beside the same job without them: ``python -m bench.soak``."""
