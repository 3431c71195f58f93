"""Ports for servers that start later, and may be away for a while."""

import secrets
import socket

_given: set[int] = set()


def free_port(host: str = "127.0.0.1") -> int:
    """One below those that the kernel gives to outgoing connections, and no NodePort: nobody takes it meanwhile."""
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
