"""State: what the operator knows of a job, from its stored record, the informer caches and the aggregator."""
