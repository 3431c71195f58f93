"""Benchmarks: each module is a command that prints one JSON line. Figures are ratios within one run."""
