"""Servers: the admission webhook, the health probes and the gateway for sites that dial out."""
