"""Bare Debian root file systems, for tests on a fresh machine and with a newer Slurm."""
