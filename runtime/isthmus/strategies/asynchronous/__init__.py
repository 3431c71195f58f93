"""Rules for asynchronous rounds, in which stale updates count with a discount."""
