"""Minimal HTTP/2 over TLS with a client's certificate, for frames that no gRPC library sends."""

import socket
import ssl
import struct
from pathlib import Path

DATA, HEADERS, RST_STREAM, SETTINGS, PING, CONTINUATION = 0, 1, 3, 4, 6, 9
END_STREAM, END_HEADERS = 1, 4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CONTROL = "/isthmus.federation.v1alpha1.Federation/Control"


def connect(port: int, server_name: str, tls: Path | None) -> ssl.SSLSocket:
    """Connect to a server on loopback and send the HTTP/2 preface. ``tls``: the certificate's directory, if any."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if tls is not None:
        context.load_cert_chain(tls / "tls.crt", tls / "tls.key")
    context.set_alpn_protocols(["h2"])
    plain = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection = context.wrap_socket(plain, server_hostname=server_name)
    connection.sendall(PREFACE + frame(SETTINGS, 0, 0))
    return connection


def frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    """Return a frame (RFC 9113, 4.1)."""
    return struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body


def length(number: int) -> bytes:
    """Return the length of a string as encoded in HPACK (RFC 7541, 5.1)."""
    if number < 127:
        return bytes([number])
    number -= 127
    encoded = b"\x7f"
    while number > 127:
        encoded += bytes([number & 127 | 128])
        number >>= 7
    return encoded + bytes([number])


def literal(name: bytes, value: bytes) -> bytes:
    """Return a header field that is not added to the peer's table."""
    return b"\0" + length(len(name)) + name + length(len(value)) + value


def request(server_name: str, path: str = CONTROL) -> bytes:
    """Return the header fields of a call."""
    fields = (
        (b":method", b"POST"),
        (b":scheme", b"https"),
        (b":path", path.encode()),
        (b":authority", server_name.encode()),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    )
    return b"".join(literal(name, value) for name, value in fields)


ENTRY = b"\x40\x03xbm" + length(4000) + b"b" * 4000
"""A field of 4,000 bytes that the peer remembers: as entry 62, the first that is not of the standard."""
NAMED = b"\xbe" * 12_000
"""That entry 12,000 times."""
