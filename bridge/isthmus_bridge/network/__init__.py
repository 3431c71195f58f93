"""Network connections: the listener for callers, the tunnels to gateways, and the relay for clients."""
