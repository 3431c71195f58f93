"""Connections between the parts: certificates, gRPC channels, tunnels and addresses."""
