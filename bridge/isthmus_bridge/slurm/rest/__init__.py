"""The adapter that uses slurmrestd."""
