"""State of a job's training, which the other parts of the aggregator share: rounds, decisions, metrics."""
