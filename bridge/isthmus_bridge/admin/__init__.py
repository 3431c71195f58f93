"""Commands for a site's admin: checks of the policy, of Slurm and of file modes, certificates, orders."""
