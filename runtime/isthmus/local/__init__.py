"""The local runner: one FederatedJob on one machine, as processes, over the real protocol and without any cluster."""
