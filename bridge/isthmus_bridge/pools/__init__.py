"""Pools: journal, submission, reconciliation and status."""
