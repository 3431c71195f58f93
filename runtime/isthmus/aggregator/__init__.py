"""The aggregator: one process per FederatedJob that runs the rounds. ``python -m isthmus.aggregator``."""
