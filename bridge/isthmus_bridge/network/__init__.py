"""Connections: the tunnels to gateways, the guard of the TLS port, and the relay for the clients."""
