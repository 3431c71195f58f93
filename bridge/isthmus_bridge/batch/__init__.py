"""The batch script of a pool."""
