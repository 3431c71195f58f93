"""Checks of this repository's conventions, which ``make lint`` runs: ``python -m tools.checks``."""
