"""Pools: the journal, submission, reconciliation, and what is reported of them."""
