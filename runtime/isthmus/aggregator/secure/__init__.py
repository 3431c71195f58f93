"""Secure aggregation at the aggregator: instances of the protocol, their timers, and what survives a crash."""
