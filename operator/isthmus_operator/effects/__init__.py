"""Effects: calls to the API server, the bridges and the aggregators. Thin, bounded in time, and without decisions."""
