"""A single-node Kubernetes cluster: its daemons, configuration, certificates, DNS and storage."""
