"""Addresses of the form ``host:port``: IPv4, IPv6 and names."""

import socket

ANYWHERE = "[::]"
"""Host of a service that listens at all IPv4 and IPv6 addresses."""


def split(address: str) -> tuple[str, int]:
    """Split ``host:port``; brackets of an IPv6 address are removed. Raises ``ValueError``."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not port.isascii() or int(port) > 65535:
        raise ValueError(f"{address!r} is not HOST:PORT")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{address!r}: an IPv6 address goes into brackets, as in [::1]:8080")
    if not host:
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host, int(port)


def joined(host: str, port: int) -> str:
    """Join host and port to ``host:port``; an IPv6 address gets brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def unbound(host: str) -> tuple[socket.socket, str]:
    """Return a TCP socket that can be bound to a host, and the address to bind it to. Raises ``OSError``.

    ``::`` accepts connections of both families, and becomes ``0.0.0.0`` on a machine without IPv6.
    """
    if host in ("", "::"):
        try:
            both = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        except OSError:
            return socket.socket(socket.AF_INET, socket.SOCK_STREAM), "0.0.0.0"  # noqa: S104
        both.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        return both, "::"
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return socket.socket(found[0][0], socket.SOCK_STREAM), host


def bound(host: str, port: int) -> socket.socket:
    """Return a TCP socket that is bound to an address and ready to listen; see :func:`unbound`. Raises ``OSError``."""
    made, where = unbound(host)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((where, port))
    except OSError:
        made.close()
        raise
    return made
