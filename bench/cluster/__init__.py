"""Helpers for the operator's benchmarks: the operator's process, hollow nodes and simulated pods."""
