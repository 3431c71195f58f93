"""Makes releases: ``python -m tools.release --help``."""
