"""Local runner: runs one FederatedJob on one machine, as processes, with the real protocol and without a cluster."""
