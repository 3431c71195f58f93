"""Measurements of a run: Prometheus metrics, statistics of each round, experiment tracking."""
