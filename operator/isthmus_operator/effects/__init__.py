"""The outside world: the API server, the bridges, the aggregators. Thin, bounded in time, and without decisions."""
