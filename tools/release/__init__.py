"""Release tooling: ``python -m tools.release --help``."""
