"""Floods below gRPC: HTTP/2 frames, TLS and TCP, with a certificate or without one."""

import socket
import ssl
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from ..harness.aggregator_process import SERVER_NAME
from . import http2
from .http2 import END_HEADERS, HEADERS, PING, RST_STREAM, SETTINGS

Flood = Callable[[int, Path], None]
HELD_SECONDS = 0.5
_FRAMES = 200
_REQUEST = http2.request(SERVER_NAME)
# An entry of HPACK's static table, which can be referenced without sending it first.
_STATIC = b"\x8f" * 14_000


def _frames(port: int, tls: Path, make: Callable[[int], bytes]) -> None:
    with suppress(OSError), http2.connect(port, SERVER_NAME, tls) as connection:
        connection.settimeout(5)
        for number in range(_FRAMES):
            connection.sendall(make(1 + 2 * number))
        time.sleep(HELD_SECONDS)


def header_bomb(port: int, tls: Path) -> None:
    """Send calls that each reference an entry of HPACK's table 12,000 times."""
    _frames(
        port, tls,
        lambda stream: http2.frame(
            HEADERS, END_HEADERS, stream, _REQUEST + (http2.ENTRY if stream == 1 else b"") + http2.NAMED
        ),
    )  # fmt: skip


def static_header_bomb(port: int, tls: Path) -> None:
    """Send header blocks that repeat an entry of HPACK's static table."""
    _frames(port, tls, lambda stream: http2.frame(HEADERS, END_HEADERS, stream, _REQUEST + _STATIC))


def open_calls(port: int, tls: Path) -> None:
    """Open calls without sending a message."""
    _frames(port, tls, lambda stream: http2.frame(HEADERS, END_HEADERS, stream, _REQUEST))


def rapid_reset(port: int, tls: Path) -> None:
    """Open calls and reset them at once."""
    reset = b"\0\0\0\x08"
    _frames(
        port, tls,
        lambda stream: http2.frame(HEADERS, END_HEADERS, stream, _REQUEST) + http2.frame(RST_STREAM, 0, stream, reset),
    )  # fmt: skip


def small_frames(port: int, tls: Path) -> None:
    """Send an endless series of settings and pings."""
    _frames(port, tls, lambda _: http2.frame(SETTINGS, 0, 0) * 20 + http2.frame(PING, 0, 0, b"12345678") * 20)


def garbage(port: int, tls: Path) -> None:
    """Send bytes that are not HTTP/2."""
    _frames(port, tls, lambda stream: bytes([stream % 256]) * 4096)


def strangers(port: int, tls: Path) -> None:
    """Open connections without a certificate, and incomplete handshakes."""
    with ExitStack() as stack:
        for number in range(20):
            with suppress(OSError):
                plain = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
                plain.sendall(b"\x16\x03\x01" + bytes([number]))
        with suppress(OSError, ssl.SSLError), http2.connect(port, SERVER_NAME, None) as connection:
            connection.settimeout(5)
            connection.recv(1)


FLOODS: tuple[Flood, ...] = (
    header_bomb, static_header_bomb, open_calls, rapid_reset, small_frames, garbage, strangers,
)  # fmt: skip
