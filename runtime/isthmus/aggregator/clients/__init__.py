"""Clients of a job: membership, outgoing messages, history, selection."""
