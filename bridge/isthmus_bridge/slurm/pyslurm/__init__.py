"""The adapter that uses pyslurm."""
