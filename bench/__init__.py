"""Benchmarks. Each module is a command that prints JSON lines; figures are ratios within one run."""
