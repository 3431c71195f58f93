"""Connections between the parts: certificates, gRPC channels, HTTP servers, tunnels and addresses."""
