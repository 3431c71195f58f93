"""Makes releases: ``python -m release --help``."""
