"""Ports for servers that start later, or stop for a while."""

import secrets
import socket

_given: set[int] = set()


def free_port(host: str = "127.0.0.1") -> int:
    """Return a free port below those of outgoing connections and of NodePorts, so that no other process takes it."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        if port in _given:
            continue
        with socket.socket() as listener:
            try:
                listener.bind((host, port))
            except OSError:
                continue
        _given.add(port)
        return port
