"""Checks and settings for the administrator of a site: the policy, Slurm, certificates, file modes, orders."""
